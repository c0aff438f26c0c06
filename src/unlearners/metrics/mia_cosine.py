"""The membership attack that SLUG reports (Cai et al., ICML 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..base import Data, Metric, Outputs, Score, Task
from ..data import splits
from ..targets.base import DualEncoder
from ._naming import own


@dataclass(frozen=True, kw_only=True)
class MIACosine(Metric):
    """Membership attack on the cosine of picture and text: how well the forget set is told from pairs never trained on, in percent.

    Idea: a dual encoder puts pairs it has trained on nearer to each other; one number for each pair, one threshold.

        s = cos(v, t);   g: logistic regression on s, forget set against as many unseen pairs
        MIA = 100 · mean over seeds and splits of the accuracy of g on the half it has not seen

    50 says that nothing can be told, or that both were unseen. An edit that tears the forget set away from its texts makes it easy to
    tell again: in the paper 72.8 for the original and above 90 for most methods.

    Logged: the mean and mean ± 1.96 standard deviations over the splits, n = pairs of the forget set; nan with n = 0 where the data
    have no unseen pairs.

    Deviations from the authors' code: the unseen pairs are the retained data's own test split; theirs are of another collection (CC3M),
    which can be told by its look.
    """

    needs = DualEncoder
    higher_is_better: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2407.11867"

    seeds: int = 10
    """draws of the balanced sets"""
    splits: int = 10
    """random halves of each"""

    def data(self, target: Any, task: Task) -> list[Data]:
        if "test" not in splits(task.retain.source):
            return []
        return [task.forget, replace(task.retain, split="test", rows="")]

    def score(self, target: DualEncoder, task: Task, outputs: Outputs) -> Score:
        if not self.data(target, task):
            return Score(value=math.nan, n=0)
        members, others = (own(*outputs.logits(d)).double().numpy() for d in self.data(target, task))
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
