"""Unlearning accuracy (Zhang et al., NeurIPS 2024 Datasets and Benchmarks)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Metric, Outputs, Request, Score, Task, rate
from ..targets.base import TextToImage


@dataclass(frozen=True, kw_only=True)
class UA(Metric):
    """Unlearning accuracy: percentage of pictures, asked to show the concept, in which the judge no longer recognises it.

    Idea: forgetting is the judge's failure on the prompts that name the concept.

        UA = 100 / n · sum over probes naming the concept and seeds of [judge(x) != concept]      (100 - accuracy)

    Logged: the value in percent, its 95 % Wilson interval, n = pictures, and one 0 or 1 for each picture.

    Deviations from the authors' code:
      1. The judge and the prompts come from the task; theirs are a fine-tuned ViT and 60 styles × 20 objects.
      2. An interval is reported; pictures are treated as independent, although seeds are shared between prompts.
      3. Broken pictures count as forgotten here as they do there: read UA with FID and the kept accuracies.
    """

    needs = TextToImage
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2402.11846"

    def requests(self, target: TextToImage, task: Task) -> list[Request]:
        return [Request(p.prompt, s) for p in task.probes if task.names_concept(p) for s in task.seeds]

    def score(self, target: TextToImage, task: Task, outputs: Outputs) -> Score:
        truth = [p.truth[task.axis] for p in task.probes if task.names_concept(p) for _ in task.seeds]
        labels = outputs.labels(self.requests(target, task), task.axis) if truth else []
        return rate([a != b for a, b in zip(labels, truth, strict=True)])
