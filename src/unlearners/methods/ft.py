"""Fine-tuning on what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import Self

from .. import config, optim
from ..base import Auto, Method, Row, Task
from ..errors import UsageError
from ..latents import Asked
from ..targets.base import Learner
from ._learn import least, optimizer, settled
from ._mask import Masked, first


@dataclass(frozen=True, kw_only=True)
class FT(Method, Masked):
    """Fine-tuning (Warnecke et al., NDSS 2023): go on training on the retained data and let the rest be forgotten.

    Idea: a network that no longer sees the forget set loses it by itself, a little.

        min over theta of E_{D_r} L(theta; x, y)

    with L the family's own training loss (cross-entropy, the noise error of a diffusion model, CLIP's contrastive loss). The forget set
    is not opened, unless a ``mask`` is to be found on it (SalUn's, as an option: only the weights in it move).

    Logged: ``loss`` is L on the batch; with a mask the first row has ``mask_seconds``.

    Deviations from the authors' code:
    1. The learning rate is constant from the first step to the last; the release of SalUn has milestones at epochs 91 and 136, which
       ten epochs never reach.
    2. On Stable Diffusion nobody published settings of FT; there "auto" takes SalUn's (Adam, lr 1e-5, batch 8, 5 epochs).
    """

    paper: ClassVar[str] = "arXiv:2108.11577"
    needs: ClassVar[type] = Learner
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "classifier": {"epochs": 10, "lr": 0.01},
        "short": {"epochs": 1, "batch": 128, "lr": 0.01},
        "ddpm": {"steps": 1000, "batch": 128, "lr": 1e-4, "optimizer": "adam", "weight_decay": 0.0, "clip": 1.0},
        "clip": {"epochs": 10, "batch": 32, "lr": 1e-6, "optimizer": "adamw", "weight_decay": 0.1},
    }

    params: str = "full"
    """weights to train"""
    epochs: int | Auto = "auto"
    """passes over the retained data"""
    steps: int | Auto = "auto"
    """optimiser steps; above 0 it replaces epochs"""
    batch: int | Auto = "auto"
    """examples in each step"""
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
    pictures: int = config.later(800)
    """pictures that a text-to-image model draws itself when the task names none"""

    def __post_init__(self) -> None:
        if least(self.epochs, self.batch, self.pictures) < 1 or least(self.steps, self.clip) < 0:
            raise UsageError("epochs, batch and pictures must be at least 1, and steps and clip at least 0")
        self.masking()

    def resolve(self, target: Any, task: Task) -> Self:
        return settled(self, target, task)

    def run(self, target: Learner, task: Task) -> Iterator[Row]:
        target.differentiable()
        asked, batch, clip = Asked(pictures=self.pictures), int(self.batch), float(self.clip)
        D_r = target.retained(task, asked).loader(batch)
        w = target.trainable(self.params)  # theta
        freeze, spent = self.freeze(target, lambda: target.forgotten(task, asked), w, batch)
        opt = optimizer(self, w.values())
        target.train(self.norm)

        for i in target.steps(int(self.steps) or int(self.epochs) * len(D_r), opt, D_r):
            loss = target.loss(D_r.draw())
            opt.zero_grad()
            loss.backward()
            freeze.gradients()
            if clip:
                torch.nn.utils.clip_grad_norm_(w.values(), clip)
            opt.step()
            freeze.restore()
            yield {"loss": loss.item(), **first(i, spent)}
