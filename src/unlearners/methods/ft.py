"""Fine-tuning on what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .. import config, optim
from ..base import Method, Row, Task
from ..errors import UsageError
from ..latents import Asked
from ..targets.base import Learner


@dataclass(frozen=True, kw_only=True)
class FT(Method):
    """Fine-tuning (Warnecke et al., NDSS 2023): go on training on the retained data and let the rest be forgotten.

    Idea: a network that no longer sees the forget set loses it by itself, a little.

        min over theta of E_{D_r} L(theta; x, y)

    with L the family's own training loss (cross-entropy, the noise error of a diffusion model, CLIP's contrastive loss). The forget set
    is not opened.

    Logged: ``loss`` is L on the batch.

    Deviations from the authors' code:
    1. The learning rate is constant from the first step to the last; the release of SalUn has milestones at epochs 91 and 136, which
       ten epochs never reach.
    """

    paper: ClassVar[str] = "arXiv:2108.11577"
    needs: ClassVar[type] = Learner
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "short": {"epochs": 1, "batch": 128, "lr": 0.01},
        "ddpm": {"steps": 1000, "batch": 128, "lr": 1e-4, "optimizer": "adam", "weight_decay": 0.0, "clip": 1.0},
        "clip": {"epochs": 10, "batch": 32, "lr": 1e-6, "optimizer": "adamw", "weight_decay": 0.1},
    }

    params: str = "full"
    """weights to train"""
    epochs: int = 10
    """passes over the retained data"""
    steps: int = 0
    """optimiser steps; above 0 it replaces epochs"""
    batch: int = 256
    """examples in each step"""
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
    pictures: int = config.later(800)
    """pictures that a text-to-image model draws itself when the task names none"""

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.pictures) < 1 or self.steps < 0 or self.clip < 0:
            raise UsageError("epochs, batch and pictures must be at least 1, and steps and clip at least 0")

    def run(self, target: Learner, task: Task) -> Iterator[Row]:
        D_r = target.retained(task, Asked(pictures=self.pictures)).loader(self.batch)
        w = list(target.trainable(self.params).values())  # theta
        opt = optim.make(self.optimizer, w, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        target.train(self.norm)

        for _ in target.steps(self.steps or self.epochs * len(D_r), opt, D_r):
            loss = target.loss(D_r.draw())
            opt.zero_grad()
            loss.backward()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(w, self.clip)
            opt.step()
            yield {"loss": loss.item()}
