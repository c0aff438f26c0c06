"""In-domain retain accuracy (Zhang et al., NeurIPS 2024 Datasets and Benchmarks)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Metric, Outputs, Probe, Request, Score, Task, rate
from ..targets.base import Denoiser


@dataclass(frozen=True, kw_only=True)
class IRA(Metric):
    """In-domain retain accuracy: percentage of pictures of the concept's neighbours that the judge still names right.

    Idea: forgetting one style must leave the other styles alone.

        IRA = 100 / n · sum over probes of the same domain not naming the concept, and seeds, of [judge(x) = truth]

    Logged: the value in percent, its 95 % Wilson interval, n = pictures, and one 0 or 1 for each picture.

    Deviations from the authors' code:
      1. The judge and the prompts come from the task; theirs are a fine-tuned ViT and 60 styles × 20 objects.
      2. An interval is reported; pictures are treated as independent, although seeds are shared between prompts.
    """

    needs = Denoiser
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2402.11846"

    def probes(self, task: Task) -> list[Probe]:
        """Those that name something of the concept's domain, but not the concept."""
        return [p for p in task.probes if task.axis in p.truth and not task.names_concept(p)]

    def requests(self, target: Denoiser, task: Task) -> list[Request]:
        return [r for p in self.probes(task) for r in task.pictures(p)]

    def score(self, target: Denoiser, task: Task, outputs: Outputs) -> Score:
        truth = [p.truth[task.axis] for p in self.probes(task) for _ in task.pictures(p)]
        labels = outputs.labels(self.requests(target, task), task.axis) if truth else []
        return rate([a == b for a, b in zip(labels, truth, strict=True)])
