"""Robust membership inference attack (Zarifzadeh et al., ICML 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Data, Metric, Outputs, Score, Task, rate
from ..targets.classifier import Classifier
from ._logits import confidence

FALSE = 0.01  # the rate of false alarms at which true ones are counted


@dataclass(frozen=True, kw_only=True)
class RMIA(Metric):
    """Robust membership attack: how well reference models that never saw the forget set tell it from unseen pictures; 50 is forgotten.

    Idea: a trace is left in x when the model is surer of x than models without it are, more than it is for random pictures z.

        p(x) = ((1 + a) · mean over references of p_ref(x) + 1 - a) / 2                  (offline: references that did not see x)
        r(x) = p_model(x) / p(x);      score(x) = share of the population z with r(x) / r(z) >= gamma
        auc = 100 · P(score of a forget picture > score of an unseen one), ties half

    Logged: ``rmia/auc``, n = |D_f|, interval of Hanley & McNeil (1982); ``rmia/tpr_at_1fpr``: percentage of D_f above the threshold
    that at most 1 % of the unseen pictures pass, Wilson interval. Much below 50 tells the forget set apart too: it is known *less* than
    unseen pictures. nan with n = 0 without references; nan where logits are not finite.

    Deviations from the authors' code:
      1. One half of the test pictures, drawn once and for all, is the population z, the other half are the unseen ones. Where a class
         is forgotten, the test pictures of that class are the unseen ones and all others are z.
      2. Plain softmax probabilities; the paper's default is a Taylor softmax at temperature 2. No augmented queries.
      3. gamma is 1 as in the code; the paper's 2 ranks pictures the same way, but ties most of them where accuracy is near 100 %.
    """

    needs = Classifier
    higher_is_better: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2312.03262"

    a: float = 0.3
    """how much surer of x models are that saw it, from 0 (wholly sure) to 1 (not at all); 0.3 is the paper's for CIFAR-10"""
    gamma: float = 1.0
    """by how much r(x) must exceed r(z)"""

    def data(self, target: Classifier, task: Task) -> list[Data]:
        own = [replace(task.forget, split=task.holdout.split)] if task.forget.rows.startswith("class=") else []
        return [task.forget, task.holdout, *own]

    def score(self, target: Classifier, task: Task, outputs: Outputs) -> dict[str, Score]:
        if not outputs.references:
            return dict.fromkeys(("auc", "tpr_at_1fpr"), Score(value=math.nan, n=0))
        f, t, *own = (self.ratio(outputs, data) for data in self.data(target, task))
        half = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
        z, out = (t, own[0]) if own else (t[half[::2]], t[half[1::2]])
        if not all(r.isfinite().all() for r in (f, z, out)):
            return dict.fromkeys(("auc", "tpr_at_1fpr"), Score(value=math.nan, n=len(f)))
        inside, outside = (above(r, z, self.gamma) for r in (f, out))
        threshold = outside.sort(descending=True).values[int(FALSE * len(outside))]
        return {"auc": auc(inside, outside), "tpr_at_1fpr": rate((inside > threshold).tolist())}

    def ratio(self, outputs: Outputs, data: Data) -> Tensor:
        """r (N,) of every picture of ``data``, float64."""
        logits, y = outputs.logits(data)
        p_out = torch.stack([confidence(ref(data)[0].double(), y) for ref in outputs.references]).mean(0)
        p = ((1 + self.a) * p_out + 1 - self.a) / 2
        return confidence(logits.double(), y) / p.clamp_min(torch.finfo(torch.float64).tiny)


def above(r: Tensor, z: Tensor, gamma: float) -> Tensor:
    """For each of r (N,) the share of z (M,) with r / z >= gamma, without the N × M table: (N,)."""
    return torch.searchsorted(z.sort().values, r / gamma, right=True).double() / len(z)


def auc(inside: Tensor, outside: Tensor) -> Score:
    """100 · area under the ROC curve of telling ``inside`` from ``outside`` by a high value, with its 95 % interval."""
    n, m = len(inside), len(outside)
    order = outside.sort().values
    less, least = (torch.searchsorted(order, inside, right=side).double() for side in (False, True))
    area = float((less + least).mean()) / (2 * m)
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    variance = (area * (1 - area) + (n - 1) * (q1 - area * area) + (m - 1) * (q2 - area * area)) / (n * m)
    half = 1.959963984540054 * math.sqrt(max(0.0, variance))
    return Score(value=100 * area, n=n, low=100 * max(0.0, area - half), high=100 * min(1.0, area + half))
