"""Testing accuracy (Fan et al., SalUn, ICLR 2024; for dual encoders Cai et al., SLUG, ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Data, Metric, Outputs, Score, Task, rate
from ..targets.base import DualEncoder, Recogniser
from ..targets.classifier import Classifier
from ._logits import right
from ._naming import named, within


@dataclass(frozen=True, kw_only=True)
class TA(Metric):
    """Testing accuracy: percentage of pictures that no model has trained on and that are named right.

    Idea: the model still generalises. Where a whole class is forgotten, the task's held-out data are without it.

        TA = 100 / |D_t| · sum over (x, y) in D_t of [argmax f(x) = y]                       (a classifier)
        TA@k = 100 / n · sum over pictures of other things of [the name is among the k nearest]     (a dual encoder)

    Logged: the value in percent, its 95 % Wilson interval, n = pictures, and one 0 or 1 for each picture. No augmentation. Of a dual
    encoder ``ta/top1`` and ``ta/top5`` on the concept's own domain, without its pictures, and ``ta/<source>`` for each other domain.

    Deviations from the authors' code: none for classifiers, where the goal is the value of a model retrained without the forget set.
    SLUG averages TA over 100 names that include the forgotten one; here it does not. As there, a file of names (``--names``) adds names
    that no picture has to those that a picture of the concept's own domain may be taken for.
    """

    needs = Recogniser
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2310.12508"

    def data(self, target: Any, task: Task) -> list[Data]:
        return [task.holdout, *(task.utility if isinstance(target, DualEncoder) else ())]

    def score(self, target: Recogniser, task: Task, outputs: Outputs) -> Score | dict[str, Score]:
        if isinstance(target, Classifier):
            return rate(right(outputs, task.holdout))
        assert isinstance(target, DualEncoder)
        cosines, y, gone, _ = named(target, task, outputs, task.holdout)
        found = {f"top{k}": within(cosines[~gone], y[~gone], k) for k in (1, 5)}
        for data in task.utility:
            cosines, y = outputs.logits(data)
            name = data.source.rstrip("/").rpartition("/")[2]
            found[data.source if name in found else name] = within(cosines, y, 1)
        return found
