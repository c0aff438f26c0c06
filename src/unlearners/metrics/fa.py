"""Forget accuracy (Cai et al., SLUG, ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..banks import forgotten
from ..base import Data, Metric, Outputs, Score, Task
from ..errors import unknown
from ..targets.base import DualEncoder
from ._naming import named, within


@dataclass(frozen=True, kw_only=True)
class FA(Metric):
    """Forget accuracy: percentage of pictures of what is to be forgotten that are still named right, zero-shot.

    Idea: the concept's name is told from all other names by its nearness to the picture.

        FA@k = 100 / n · sum over pictures of the concept of [its name is among the k nearest names]

    A concept that is no name of the test pictures is refused. Capitals, "_" and "-" make no difference.

    Logged: ``fa/top1`` and ``fa/top5`` in percent with 95 % Wilson intervals, n = test pictures of the concept.

    Deviations from the authors' code:
      1. Test pictures take no part in choosing the layer or the step; theirs do.
      2. Names and their wording come from the task's data; theirs are 10,177 CelebA names followed by a full stop. A file of names
         (``--names``, or ``names`` of the task's test pictures) adds those that no picture has.
    """

    needs = DualEncoder
    higher_is_better: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2407.11867"

    def data(self, target: Any, task: Task) -> list[Data]:
        classes = target.open(task.holdout).classes
        if not any(forgotten(classes, task)):
            raise unknown(f"name of {task.holdout.source}", task.concepts[0], classes)
        return [task.holdout]

    def score(self, target: DualEncoder, task: Task, outputs: Outputs) -> dict[str, Score]:
        cosines, y, gone, _ = named(target, task, outputs, task.holdout)
        return {f"top{k}": within(cosines[gone], y[gone], k) for k in (1, 5)}
