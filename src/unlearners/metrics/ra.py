"""Remaining accuracy (Fan et al., SalUn, ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Data, Metric, Outputs, Score, Task, rate
from ..targets.classifier import Classifier
from ._logits import right


@dataclass(frozen=True, kw_only=True)
class RA(Metric):
    """Remaining accuracy: percentage of the training pictures that are kept and still named right.

    Idea: what was not to be forgotten is still known.

        RA = 100 / |D_r| · sum over (x, y) in D_r of [argmax f(x) = y]

    Logged: the value in percent, its 95 % Wilson interval, n = pictures, and one 0 or 1 for each picture. No augmentation.

    Deviations from the authors' code: none. The goal is the value of a model retrained without the forget set.
    """

    needs = Classifier
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2310.12508"

    def data(self, target: Classifier, task: Task) -> list[Data]:
        return [task.retain]

    def score(self, target: Classifier, task: Task, outputs: Outputs) -> Score:
        return rate(right(outputs, task.retain))
