"""NegGrad+."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import Self

from .. import optim
from ..base import Auto, Method, Row, Task
from ..errors import UsageError
from ..targets.base import Trainable
from ._learn import least, optimizer, settled
from ._mask import Masked, first


@dataclass(frozen=True, kw_only=True)
class NegGradPlus(Method, Masked):
    """NegGrad+ (Kurmanji et al., NeurIPS 2023): ascend on the forget set and descend on the retained data in the same step.

    Idea: gradient ascent that the retained data holds in place.

        min over theta of alpha E_{D_r} L(theta; x, y) - (1 - alpha) E_{D_f} L(theta; x, y)

    with L the family's own training loss. A step draws one batch of each; an epoch is one pass over D_r, and D_f begins again
    whenever it is used up. With a ``mask`` (SalUn's, as an option) only the weights in it move.

    Logged: ``loss`` is the objective; ``retain`` and ``forget`` are L on the two batches; with a mask the first row has ``mask_seconds``.

    Deviations from the authors' code:
    1. The two batches go through the network one after the other, so batch normalisation never mixes their statistics.
    2. ``alpha`` was chosen by the authors for each experiment; 0.95 is ours.
    """

    paper: ClassVar[str] = "arXiv:2302.09880"
    needs: ClassVar[type] = Trainable
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "classifier": {"epochs": 10, "lr": 0.01},
        "short": {"epochs": 1, "batch": 128, "lr": 0.01},
        "ddpm": {"steps": 1000, "batch": 128, "lr": 1e-4, "optimizer": "adam", "weight_decay": 0.0, "clip": 1.0},
    }

    params: str = "full"
    """weights to train"""
    alpha: float = 0.95
    """weight of the retained data, in 0 … 1; the forget set has the rest"""
    epochs: int | Auto = "auto"
    """passes over the retained data"""
    steps: int | Auto = "auto"
    """optimiser steps; above 0 it replaces epochs"""
    batch: int | Auto = "auto"
    """examples of each set in each step"""
    lr: float | Auto = "auto"
    """learning rate"""
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
        if least(self.epochs, self.batch) < 1 or least(self.steps, self.clip) < 0:
            raise UsageError("epochs and batch must be at least 1, and steps and clip at least 0")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha is {self.alpha} but shares the weight between D_r and D_f; give a number from 0 to 1")
        self.masking()

    def resolve(self, target: Any, task: Task) -> Self:
        return settled(self, target, task)

    def run(self, target: Trainable, task: Task) -> Iterator[Row]:
        batch, clip, forget = int(self.batch), float(self.clip), target.open(task.forget)
        D_f, D_r = forget.loader(batch), target.open(task.retain).loader(batch)
        w = target.trainable(self.params)  # theta
        freeze, spent = self.freeze(target, lambda: forget, w, batch)
        opt = optimizer(self, w.values())
        target.train(self.norm)

        for i in target.steps(int(self.steps) or int(self.epochs) * len(D_r), opt, D_f, D_r):
            L_f, L_r = target.loss(D_f.draw()), target.loss(D_r.draw())
            loss = self.alpha * L_r - (1 - self.alpha) * L_f
            opt.zero_grad()
            loss.backward()
            freeze.gradients()
            if clip:
                torch.nn.utils.clip_grad_norm_(w.values(), clip)
            opt.step()
            freeze.restore()
            yield {"loss": loss.item(), "retain": L_r.item(), "forget": L_f.item(), **first(i, spent)}
