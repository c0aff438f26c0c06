"""Cosine of pictures with their own texts (Radford et al., ICML 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..base import Data, Metric, Outputs, Score, Task
from ..targets.base import DualEncoder
from ._naming import mean, own


@dataclass(frozen=True, kw_only=True)
class Cosine(Metric):
    """Mean cosine x 100 of pictures with their own texts, of pairs that were held back from the edit.

    Idea: where nobody has named the pictures of a test set, the pairs themselves say whether picture and text have moved apart.

        cosine = 100 / n · sum over pairs of cos(v, t)

    Logged: ``cosine/forgotten`` and ``cosine/retained``, each the mean ± 1.96 standard errors, n = pairs of the validation share.

    Deviations from the authors' code: none; CLIP's paper defines the similarity, and the split is ours.
    """

    needs = DualEncoder
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2103.00020"

    def better(self, name: str) -> bool:
        return not name.endswith("forgotten")

    def data(self, target: Any, task: Task) -> list[Data]:
        return [replace(d, split="validation") for d in (task.forget, task.retain)]

    def score(self, target: DualEncoder, task: Task, outputs: Outputs) -> dict[str, Score]:
        sides = zip(("forgotten", "retained"), self.data(target, task), strict=True)
        return {name: mean([100 * c for c in own(*outputs.logits(data)).double().tolist()]) for name, data in sides}
