"""Text-image similarity (Cai et al., SLUG, ICML 2025, the matrices of its figures)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..base import Data, Metric, Outputs, Score, Task
from ..targets.base import DualEncoder
from ._naming import mean, named


@dataclass(frozen=True, kw_only=True)
class Similarity(Metric):
    """Mean cosine x 100 of pictures with names, every name with every other: what an edit tears apart and what it leaves.

    Idea: the diagonal is what the model knows; only the concept's own cell should change.

        S_ij = 100 · mean over pictures of i of cos(v, t_j)

    Logged: ``similarity/forgotten``, the mean of the concepts' own cells, ``similarity/others``, that of the other names', each with its
    mean ± 1.96 standard errors, and the whole matrix with the names, for the report's plot.

    Deviations from the authors' code: test pictures of the task instead of ten famous faces.
    """

    needs = DualEncoder
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2407.11867"

    def better(self, name: str) -> bool:
        return not name.endswith("forgotten")

    def data(self, target: Any, task: Task) -> list[Data]:
        return [task.holdout]

    def score(self, target: DualEncoder, task: Task, outputs: Outputs) -> dict[str, Score]:
        cosines, y, gone, classes = named(target, task, outputs, task.holdout)
        cosines = cosines[:, : len(classes)]
        matrix = torch.stack([100 * cosines[y == i].double().mean(0) for i in range(len(classes))])  # (K, K)
        own = 100 * cosines.double().gather(1, y[:, None])[:, 0]
        table = {"names": list(classes), "matrix": [[round(v, 2) for v in row] for row in matrix.tolist()]}
        return {"forgotten": replace(mean(own[gone].tolist()), table=table), "others": mean(own[~gone].tolist())}
