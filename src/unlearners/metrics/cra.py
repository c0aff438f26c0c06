"""Cross-domain retain accuracy (Zhang et al., NeurIPS 2024 Datasets and Benchmarks)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Metric, Outputs, Request, Score, Task, rate
from ..targets.base import Denoiser


@dataclass(frozen=True, kw_only=True)
class CRA(Metric):
    """Cross-domain retain accuracy: percentage of other things in pictures without the concept that the judge still names right.

    Idea: forgetting a style must leave the objects alone, and the other way round.

        CRA = 100 / n · sum over domains d other than the concept's, probes not naming the concept, seeds, of [judge_d(x) = truth_d]

    Logged: the value in percent, its 95 % Wilson interval, n = pairs of picture and domain, and one 0 or 1 for each pair.

    Deviations from the authors' code:
      1. The judge and the prompts come from the task; theirs are a fine-tuned ViT and 60 styles × 20 objects.
      2. Every other domain that a probe has a truth for counts, each picture × domain once; theirs has two domains, so one is left.
      3. An interval is reported; pairs are treated as independent, although pictures share seeds.
    """

    needs = Denoiser
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2402.11846"

    def requests(self, target: Denoiser, task: Task) -> list[Request]:
        kept = [p for p in task.probes if not task.names_concept(p) and set(p.truth) - {task.axis}]
        return [r for p in kept for r in task.pictures(p)]

    def score(self, target: Denoiser, task: Task, outputs: Outputs) -> Score:
        flags: list[bool] = []
        kept = [p for p in task.probes if not task.names_concept(p)]
        for domain in sorted({d for p in kept for d in p.truth} - {task.axis}):
            pairs = [(r, p.truth[domain]) for p in kept if domain in p.truth for r in task.pictures(p)]
            labels = outputs.labels([request for request, _ in pairs], domain)
            flags += [label == truth for label, (_, truth) in zip(labels, pairs, strict=True)]
        return rate(flags)
