"""Random labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import Self

from .. import config, optim
from ..base import Auto, Method, Relabel, Row, Task
from ..errors import UsageError
from ..targets.base import Trainable
from ._learn import least, optimizer, settled
from ._relabel import DDPM, Lessons, Order


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
        "classifier": {"labels": "other", "alpha": 1.0, "epochs": 10, "lr": 0.01},
        "release": {"order": "sequential", "labels": "any", "drop": "both"},
        "mixed": {"order": "mixed", "labels": "any"},
        "short": {"order": "sequential", "epochs": 1, "batch": 128, "lr": 0.01},
        "ddpm": DDPM,
        "ddpm-release": {**DDPM, "drop": "both"},
    }

    params: str = "full"
    """weights to train"""
    labels: Relabel | Auto = "auto"
    """y': uniform over the other classes, uniform over all of them (the release's), or (y + 1) mod K"""
    drop: Literal["retain", "both"] = config.later("retain")
    """where diffusion drops one label in ten: on retained images (retain), or also in both passes of forgetting (both, the release's)"""
    order: Order = "joint"
    """joint: a batch of each set in every step; sequential: each epoch a pass over D_f, then one over D_r; mixed: both shuffled together"""
    alpha: float | Auto = "auto"
    """weight of the retained data in joint order, the only one with a weight; 0 is |D_r| / |D_f|: every example weighs the same"""
    epochs: int | Auto = "auto"
    """passes over the retained data"""
    steps: int | Auto = "auto"
    """optimiser steps; above 0 it replaces epochs"""
    batch: int | Auto = "auto"
    """retained examples in each step; in sequential order also forgotten ones"""
    forget_batch: int | Auto = "auto"
    """forgotten examples in each joint step; 0: so many that an epoch is one pass over D_f too, at least 16"""
    lr: float | Auto = "auto"
    """learning rate; the paper of SalUn searches 1e-3 to 1e-1"""
    optimizer: optim.Optimizer | Auto = "auto"
    """which optimiser"""
    momentum: float = 0.9
    """momentum of sgd"""
    weight_decay: float | Auto = "auto"
    """weight decay"""
    clip: float | Auto = "auto"
    """largest gradient norm; 0 does not clip"""
    norm: Literal["update", "freeze"] = "update"
    """whether batch normalisation uses and updates its batch statistics, or keeps the original's"""

    def __post_init__(self) -> None:
        if least(self.epochs, self.batch) < 1 or least(self.forget_batch, self.steps, self.clip, self.alpha) < 0:
            raise UsageError("epochs and batch must be at least 1, and forget_batch, steps, clip and alpha at least 0")

    def resolve(self, target: Any, task: Task) -> Self:
        return settled(self, target, task)

    def run(self, target: Trainable, task: Task) -> Iterator[Row]:
        forget, retain = target.open(task.forget), target.open(task.retain)
        lessons = Lessons(self, target, forget, retain)
        w, clip = list(target.trainable(self.params).values()), float(self.clip)  # theta
        opt = optimizer(self, w)
        target.train(self.norm)

        for i in target.steps(int(self.steps) or int(self.epochs) * lessons.epoch, opt, *lessons.loaders):
            loss, parts = lessons.loss(i)
            opt.zero_grad()
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(w, clip)
            opt.step()
            yield {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
