"""The confidence attack that SalUn reports as MIA (Song & Mittal, USENIX Security 2021; Fan et al., ICLR 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..base import Data, Metric, Outputs, Score, Task, rate
from ..targets.classifier import Classifier
from ._logits import confidence

C = 3.0


@dataclass(frozen=True, kw_only=True)
class MIA(Metric):
    """Membership attack on confidence: percentage of the forget set that the attacker takes for pictures never trained on.

    Idea: a classifier is surer of what it trained on; an attacker learns that on D_r and test pictures, then looks at D_f.

        s(x, y) = softmax(f(x))_y;   g: SVC (RBF kernel, C = 3, gamma = 1) on s of |D_t| of D_r (members) and of D_t (not)
        MIA = 100 / |D_f| · sum over D_f of [g(s) says "not a member"]

    Logged: the value in percent, its 95 % Wilson interval, n = |D_f|, and one 0 or 1 for each picture. Higher is more forgotten, but
    the goal is the value of a model retrained without D_f. nan where logits are not finite.

    Deviations from the authors' code:
      1. Equal values of one side are one point with their number as its weight: the same problem, smaller (libsvm's tolerance apart).
      2. Where D_r is smaller than the test data, as many of those are taken, so that the attacker stays unbiased.
      3. The members are spread evenly over D_r; theirs are the first, which are the first classes where data are sorted (``take``).
      4. Their four other attackers (correctness, entropy, modified entropy, all probabilities), which they do not report, are left out.
    """

    needs = Classifier
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2310.12508"

    shadow: int = 0
    """members, and as many others, that the attacker learns from; 0: as many as there are test pictures"""
    take: Literal["spread", "first"] = "spread"
    """which of them: evenly spread over D_r, or the first in its order (theirs)"""

    def data(self, target: Classifier, task: Task) -> list[Data]:
        return [task.forget, task.retain, task.holdout]

    def score(self, target: Classifier, task: Task, outputs: Outputs) -> Score:
        f, r, t = (confidence(*outputs.logits(data)) for data in self.data(target, task))
        if not all(s.isfinite().all() for s in (f, r, t)):
            return Score(value=math.nan, n=len(f))
        k = min(len(r), len(t), self.shadow or len(t))
        return rate(unseen(self.chosen(r, k), self.chosen(t, k), f))

    def chosen(self, s: Tensor, k: int) -> Tensor:
        """``k`` of the N values ``s``."""
        return s[:k] if self.take == "first" else s[torch.arange(k) * len(s) // max(k, 1)]


def unseen(members: Tensor, others: Tensor, asked: Tensor) -> list[bool]:
    """Which of the values ``asked`` the support vector machine takes for ``others``."""
    from sklearn.svm import SVC

    s = np.concatenate([members.double().numpy(), others.double().numpy()])
    side = np.repeat([1.0, 0.0], [len(members), len(others)])
    points, times = np.unique(np.stack([s, side], 1), axis=0, return_counts=True)
    machine = SVC(C=C, kernel="rbf", gamma="auto").fit(points[:, :1], points[:, 1], sample_weight=times)
    values, back = np.unique(asked.double().numpy(), return_inverse=True)
    return (machine.predict(values[:, None]) == 0)[back].tolist()  # type: ignore[no-any-return]
