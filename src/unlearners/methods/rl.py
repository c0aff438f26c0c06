"""Random labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import optim
from ..base import Method, Row, Task
from ..errors import UsageError
from ..targets.base import Trainable


@dataclass(frozen=True, kw_only=True)
class RL(Method):
    """Random labels (Golatkar et al., CVPR 2020): teach wrong labels on the forget set and the right ones on the rest.

    Idea: what is paired with a wrong answer in every pass is no longer known. It is SalUn without its mask.

        min over theta of E_{D_f, y' != y} L(theta; x, y') + alpha E_{D_r} L(theta; x, y)

    with L the cross-entropy; for diffusion models the first term is ||eps_theta(x_t | y) - stopgrad eps_theta(x_t | y')||^2. In
    ``joint`` order a step draws one batch of each set, an epoch is one pass over D_r, and D_f begins again whenever it is used up.

    Logged: ``loss`` is the objective of the step; ``forget`` and ``retain`` are L on the batches it used (sequential: one of them).

    Deviations from the authors' code:
    1. Wrong labels are wrong: y' is never y. SalUn's release draws from all K classes, so 1/K stay right (``labels=any``).
    2. One joint step with alpha, as SalUn's paper writes it. The release runs a pass over D_f and then a pass over D_r, without
       alpha (``order=sequential``; preset ``release`` has both). At alpha = 1 a joint step gives D_f the weight of D_r.
    3. Preset ``ddpm`` has the release's fixed neighbour (y + 1) mod K and its retain weight, 1e-3 on an error summed over
       3 * 32 * 32 numbers, which is 3.072 on the mean that is used here.
    """

    paper: ClassVar[str] = "arXiv:1911.04933"
    needs: ClassVar[type] = Trainable
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "release": {"order": "sequential", "labels": "any"},
        "short": {"order": "sequential", "epochs": 1, "batch": 128, "lr": 0.01},
        "ddpm": {
            "labels": "next", "alpha": 3.072,
            "steps": 1000, "batch": 128, "forget_batch": 128, "lr": 1e-4, "optimizer": "adam", "weight_decay": 0.0, "clip": 1.0,
        },
    }  # fmt: skip

    params: str = "full"
    """weights to train"""
    labels: Literal["other", "any", "next"] = "other"
    """y': uniform over the other classes, uniform over all of them (the release's), or (y + 1) mod K"""
    order: Literal["joint", "sequential"] = "joint"
    """joint: a batch of each set in every step; sequential: each epoch a pass over D_f, then one over D_r"""
    alpha: float = 1.0
    """weight of the retained data in joint order; sequential order has none"""
    epochs: int = 10
    """passes over the retained data"""
    steps: int = 0
    """optimiser steps; above 0 it replaces epochs"""
    batch: int = 256
    """retained examples in each step; in sequential order also forgotten ones"""
    forget_batch: int = 0
    """forgotten examples in each joint step; 0: so many that an epoch is one pass over D_f too, at least 16"""
    lr: float = 0.01
    """learning rate; the paper of SalUn searches 1e-3 to 1e-1"""
    optimizer: optim.Optimizer = "sgd"
    """which optimiser"""
    momentum: float = 0.9
    """momentum of sgd"""
    weight_decay: float = 5e-4
    """weight decay"""
    clip: float = 0.0
    """largest gradient norm; 0 does not clip"""
    norm: Literal["update", "freeze"] = "update"
    """whether batch normalisation uses and updates its batch statistics, or keeps the original's"""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1 or min(self.forget_batch, self.steps, self.clip, self.alpha) < 0:
            raise UsageError("epochs and batch must be at least 1, and forget_batch, steps, clip and alpha at least 0")

    def run(self, target: Trainable, task: Task) -> Iterator[Row]:
        forget, retain = target.open(task.forget), target.open(task.retain)
        joint = self.order == "joint"
        share = self.forget_batch or max(16, round(self.batch * len(forget) / len(retain)))
        D_f, D_r = forget.loader(share if joint else self.batch), retain.loader(self.batch)
        w = list(target.trainable(self.params).values())  # theta
        opt = optim.make(self.optimizer, w, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        target.train(self.norm)
        epoch = len(D_r) if joint else len(D_f) + len(D_r)

        for i in target.steps(self.steps or self.epochs * epoch, opt, D_f, D_r):
            parts: dict[str, Tensor] = {}
            if joint or i % epoch < len(D_f):
                parts["forget"] = target.loss(target.relabel(D_f.draw(), self.labels))
            if joint or i % epoch >= len(D_f):
                parts["retain"] = target.loss(D_r.draw())
            loss = parts["forget"] + self.alpha * parts["retain"] if joint else next(iter(parts.values()))
            opt.zero_grad()
            loss.backward()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(w, self.clip)
            opt.step()
            yield {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
