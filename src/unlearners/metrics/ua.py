"""Unlearning accuracy (Zhang et al., NeurIPS 2024 Datasets and Benchmarks; for classifiers Fan et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Data, Metric, Outputs, Request, Score, Target, Task, kebab, rate
from ..errors import UsageError
from ..targets.base import Denoiser
from ..targets.classifier import Classifier
from ._logits import missed


@dataclass(frozen=True, kw_only=True)
class UA(Metric):
    """Unlearning accuracy: percentage of pictures of what is to be forgotten in which it is no longer recognised.

    Idea: forgetting is failure on the concept: of the judge on pictures that a generator draws of it, or of a classifier on D_f itself.

        UA = 100 / n · sum over probes naming the concept and seeds of [judge(x) != concept]      (a model that draws)
        UA = 100 - 100 / n · sum over (x, y) in D_f of [argmax f(x) = y]                          (a classifier)

    Logged: the value in percent, its 95 % Wilson interval, n = pictures, and one 0 or 1 for each picture.

    Deviations from the authors' code:
      1. The judge and the prompts come from the task; theirs are a fine-tuned ViT and 60 styles × 20 objects.
      2. An interval is reported; pictures are treated as independent, although seeds are shared between prompts.
      3. Pictures that show nothing count as forgotten here as they do there: read UA with FID and the kept accuracies. Pictures with
         values that are not finite are refused, and UA is nan where a classifier's logits are not finite.
      4. For classifiers as in SalUn, without augmentation. There the goal is not 100 but the value of a model retrained without D_f.
    """

    needs = Target
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2402.11846"

    def requests(self, target: Any, task: Task) -> list[Request]:
        if not isinstance(target, Denoiser):
            return []
        return [r for p in task.probes if task.names_concept(p) for r in task.pictures(p)]

    def data(self, target: Any, task: Task) -> list[Data]:
        return [task.forget] if isinstance(target, Classifier) else []

    def score(self, target: Any, task: Task, outputs: Outputs) -> Score:
        if isinstance(target, Classifier):
            return missed(outputs, task.forget)
        if not isinstance(target, Denoiser):
            raise UsageError(f"ua reads drawn pictures or logits, and a {kebab(target)} gives neither; leave it out with --metrics")
        truth = [p.truth[task.axis] for p in task.probes if task.names_concept(p) for _ in task.pictures(p)]
        labels = outputs.labels(self.requests(target, task), task.axis) if truth else []
        return rate([a != b for a, b in zip(labels, truth, strict=True)])
