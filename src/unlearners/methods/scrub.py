"""SCRUB: a student that selectively disobeys its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import optim
from ..base import Method, Row, Task
from ..errors import UsageError
from ..targets.classifier import Classifier


@dataclass(frozen=True, kw_only=True)
class SCRUB(Method):
    """SCRUB (Kurmanji et al., NeurIPS 2023): leave the teacher on the forget set, stay with it on the retained data.

    Idea: the original is the teacher of a student that starts as its copy. The first epochs each begin with a pass over D_f that
    drives the student away (max steps), and every epoch has a pass over D_r that brings it back (min steps).

        max over theta of E_{D_f} d(x; theta)
        min over theta of E_{D_r} [alpha d(x; theta) + gamma CE(theta; x, y)]
        d(x; theta) = T^2 KL(softmax(f_0(x) / T) || softmax(f_theta(x) / T))

    Logged: ``loss`` is what the step minimises; in max steps ``distance_forget`` is d on the batch; in min steps ``distance`` is d
    and ``retain`` the cross-entropy.

    Deviations from the authors' code:
    1. No rewinding (SCRUB+R), and no averaging of the weights.
    2. The authors choose gamma (0.99 to 1), alpha (0.5 or 0.001) and T (2 to 4) for each experiment; the defaults are one choice.
    3. Both sets have the same batch size.
    4. The gradient of d is zero where student and teacher agree. With ``norm=freeze`` the first max steps move by weight decay
       only; batch statistics tell the two apart otherwise.
    """

    paper: ClassVar[str] = "arXiv:2302.09880"
    needs: ClassVar[type] = Classifier
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "short": {"epochs": 1, "max_epochs": 1, "decay": (), "batch": 128, "lr": 5e-4, "weight_decay": 5e-4},
    }

    params: str = "full"
    """weights to train"""
    alpha: float = 0.5
    """weight of the distance to the teacher on the retained data"""
    gamma: float = 0.99
    """weight of the cross-entropy on the retained data"""
    temperature: float = 4.0
    """T, which softens both distributions"""
    epochs: int = 10
    """passes over the retained data"""
    max_epochs: int = 3
    """first epochs that begin with a pass over the forget set"""
    decay: tuple[int, ...] = (5, 8, 9)
    """epochs (the first is 0) from which the learning rate is ten times smaller than before"""
    batch: int = 256
    """examples in each step"""
    lr: float = 5e-4
    """learning rate at the start"""
    optimizer: optim.Optimizer = "adam"
    """which optimiser"""
    momentum: float = 0.9
    """momentum of sgd"""
    weight_decay: float = 0.1
    """weight decay"""
    clip: float = 0.0
    """largest gradient norm; 0 does not clip"""
    norm: Literal["update", "freeze"] = "update"
    """whether batch normalisation uses and updates its batch statistics, or keeps the original's"""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1 or min(self.max_epochs, self.clip, self.alpha, self.gamma) < 0 or self.temperature <= 0:
            raise UsageError("epochs and batch must be at least 1, temperature above 0, and max_epochs, clip, alpha and gamma at least 0")

    def run(self, target: Classifier, task: Task) -> Iterator[Row]:
        D_f, D_r = target.open(task.forget).loader(self.batch), target.open(task.retain).loader(self.batch)
        w = list(target.trainable(self.params).values())  # theta
        old = target.frozen()  # theta_0, the teacher
        opt = optim.make(self.optimizer, w, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        target.train(self.norm)
        plan = [(e, step) for e in range(self.epochs) for step in self.steps_of(e, len(D_f), len(D_r))]

        for i in target.steps(len(plan), opt, D_f, D_r):
            e, step = plan[i]
            for group in opt.param_groups:
                group["lr"] = self.lr * 0.1 ** sum(e >= late for late in self.decay)
            row: Row
            if step == "max":
                d, _ = self.distance(target, old, D_f.draw())
                loss, row = -d, {"distance_forget": d.item()}
            else:
                batch = D_r.draw()
                d, logits = self.distance(target, old, batch)
                ce = F.cross_entropy(logits, batch["y"])
                loss, row = self.alpha * d + self.gamma * ce, {"distance": d.item(), "retain": ce.item()}
            opt.zero_grad()
            loss.backward()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(w, self.clip)
            opt.step()
            yield {"loss": loss.item(), **row}

    def steps_of(self, e: int, forget: int, retain: int) -> list[str]:
        """The steps of epoch ``e``: "max" for each of ``forget`` batches while that lasts, then "min" for each of ``retain``."""
        return ["max"] * (forget if e < self.max_epochs else 0) + ["min"] * retain

    def distance(self, target: Classifier, old: Classifier, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """d, averaged over the batch, and the student's logits (B, K)."""
        T = self.temperature
        with torch.no_grad():
            p = F.log_softmax(old.logits(batch["x"]) / T, dim=1)  # (B, K), teacher
        logits = target.logits(batch["x"])
        q = F.log_softmax(logits / T, dim=1)
        return T**2 * F.kl_div(q, p, reduction="batchmean", log_target=True), logits
