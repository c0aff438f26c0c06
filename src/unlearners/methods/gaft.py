"""Gradient ascent, then fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .. import optim
from ..base import Method, Row, Task
from ..errors import UsageError
from ..latents import Asked
from ..targets.base import Learner


@dataclass(frozen=True, kw_only=True)
class GAFT(Method):
    """Gradient ascent and fine-tuning in turn (the baseline GAFT of SLUG, Cai et al., ICML 2025).

    Idea: every epoch climbs the loss of the forget set in one pass, and mends what that broke in a pass over the retained set.

        theta <- theta + lr grad L_f(theta; D_f),    then    theta <- theta - lr grad L(theta; D_r)

    with L the family's own training loss and L_f the one that ascent raises: mean(1 - cos) for dual encoders, L for all others.

    Logged: ``forget`` is L_f or ``retain`` is L on the batch of the step; ``loss`` what the step lowers.

    Deviations from the authors' code:
    1. The learning rate is constant; theirs decays by a cosine over the epochs. AdamW has its usual betas.
    2. All weights decay alike; theirs spare gains and biases.
    """

    paper: ClassVar[str] = "arXiv:2407.11867"
    needs: ClassVar[type] = Learner
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}}

    params: str = "full"
    """weights to train"""
    epochs: int = 10
    """passes over both sets"""
    steps: int = 0
    """optimiser steps; above 0 it replaces epochs"""
    batch: int = 32
    """examples in each step"""
    lr: float = 1e-6
    """learning rate; the paper takes 1e-6 and 1e-7"""
    optimizer: optim.Optimizer = "adamw"
    """which optimiser"""
    momentum: float = 0.9
    """momentum of sgd"""
    weight_decay: float = 0.1
    """weight decay"""
    clip: float = 0.0
    """largest gradient norm; 0 does not clip"""
    norm: Literal["update", "freeze"] = "update"
    """whether batch normalisation uses and updates its batch statistics, or keeps the original's"""
    pictures: int = 800
    """pictures of each side that a text-to-image model draws itself when the task names none"""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.pictures) < 1 or self.steps < 0 or self.clip < 0:
            raise UsageError("epochs, batch and pictures must be at least 1, and steps and clip at least 0")

    def run(self, target: Learner, task: Task) -> Iterator[Row]:
        asked = Asked(pictures=self.pictures)
        D_f, D_r = target.forgotten(task, asked).loader(self.batch), target.retained(task, asked).loader(self.batch)
        w = list(target.trainable(self.params).values())  # theta
        opt = optim.make(self.optimizer, w, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        target.train(self.norm)
        epoch = len(D_f) + len(D_r)
        for i in target.steps(self.steps or self.epochs * epoch, opt, D_f, D_r):
            if i % epoch < len(D_f):
                loss, name = -target.forgetting(D_f.draw()), "forget"
            else:
                loss, name = target.loss(D_r.draw()), "retain"
            opt.zero_grad()
            loss.backward()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(w, self.clip)
            opt.step()
            value = loss.item()
            yield {"loss": value, name: -value if name == "forget" else value}
