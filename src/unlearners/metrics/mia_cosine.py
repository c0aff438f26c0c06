"""The membership attack that SLUG reports (Cai et al., ICML 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..base import Data, Metric, Outputs, Score, Task
from ..data import part, pick, splits
from ..errors import UsageError
from ..targets.base import DualEncoder
from ._naming import own


@dataclass(frozen=True, kw_only=True)
class MIACosine(Metric):
    """Membership attack on the cosine of picture and text: how well the forget set is told from unseen pairs of its concept, in percent.

    Idea: a dual encoder puts pairs it has trained on nearer to each other; one number for each pair, one threshold.

        s = cos(v, t);   g: logistic regression on s, forget set against as many unseen pairs
        MIA = 100 · mean over seeds and splits of the accuracy of g on the half it has not seen

    The unseen pairs are test pairs of the same concept, so that they differ from the forget set in nothing but membership. 50 says that
    nothing can be told: that is the value of a model that never saw the forget set, and of one that generalises well. An edit that tears
    the concept apart moves seen and unseen pairs alike.

    ``mia_cosine/paper`` is what SLUG reports: against unseen pairs of everything. It tells how near the concept's pictures are to its name
    beside those of other things, which can be easy for a model that has memorised nothing.

    Logged: both means, each ± 1.96 standard deviations over the splits, n = pairs of the forget set; nan where cosines are not finite.
    Where the data have no unseen pairs of the concept the metric is refused.

    Deviations from the authors' code:
      1. The main value is against the same concept, see above.
      2. For ``paper`` the unseen pairs are the retained data's own test split; theirs are of another collection (CC3M), which can be told
         by its look.
    """

    needs = DualEncoder
    higher_is_better: ClassVar[bool] = False
    version: ClassVar[int] = 2  # 1 was what is "paper" now
    paper: ClassVar[str] = "arXiv:2407.11867"

    seeds: int = 10
    """draws of the balanced sets"""
    splits: int = 10
    """random halves of each"""

    def data(self, target: Any, task: Task) -> list[Data]:
        paper = [replace(task.retain, split="test", rows="")] if "test" in splits(task.retain.source) else []
        return [task.forget, unseen(target, task), *paper]

    def score(self, target: DualEncoder, task: Task, outputs: Outputs) -> dict[str, Score]:
        members, *others = (own(*outputs.logits(d)).double().numpy() for d in self.data(target, task))
        return {name: self.told(members, pairs) for name, pairs in zip(("", "paper"), others, strict=False)}

    def told(self, members: Any, others: Any) -> Score:
        """How well the cosines ``members`` (n,) are told from ``others`` (m,)."""
        if not (np.isfinite(members).all() and np.isfinite(others).all()):
            return Score(value=math.nan, n=len(members))
        found = 100 * np.array([a for seed in range(self.seeds) for a in self.attacked(members, others, seed)])
        mean, half = float(found.mean()), 1.96 * float(found.std())
        return Score(value=mean, n=len(members), low=mean - half, high=mean + half, per_item=tuple(found.tolist()))

    def attacked(self, members: Any, others: Any, seed: int) -> list[float]:
        """Accuracies of the attacker on random halves of equally many of both."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

        rng, k = np.random.default_rng(seed), min(len(members), len(others))
        s = np.concatenate([rng.choice(members, k, replace=False), rng.choice(others, k, replace=False)])
        halves = StratifiedShuffleSplit(n_splits=self.splits, test_size=0.5, random_state=seed)
        z = (s - s.mean()) / (s.std() or 1.0)  # else the penalty would hold the slope of so small numbers down
        return list(cross_val_score(LogisticRegression(), z[:, None], np.repeat([1, 0], k), cv=halves))


def unseen(target: Any, task: Task) -> Data:
    """Test pairs of the concept: of the forget set's own source or, where that has none, of the retained data's."""
    concept = task.forget.rows if task.forget.rows.startswith(("class=", "caption=")) else ""
    stays = task.retain.rows
    asked = [replace(task.forget, split="test", rows=concept)]
    asked += [replace(task.retain, split="test", rows=stays.removeprefix("not "))] if stays.startswith("not ") else []
    for data in asked:
        if "test" in splits(data.source) and len(pick(data, *part(data, target.side))) > 1:
            return data
    raise UsageError(
        f"mia_cosine has no unseen pairs of {', '.join(task.concepts)} to compare with; give data with a test split that shows it, or "
        "leave mia_cosine out with --metrics"
    )
