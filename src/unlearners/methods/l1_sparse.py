"""Fine-tuning towards sparse weights."""

from __future__ import annotations

import math
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
class L1Sparse(Method, Masked):
    """l1-sparse unlearning (Jia et al., NeurIPS 2023): fine-tune on the retained data under a fading l1 penalty.

    Idea: a sparse model remembers less, so fine-tuning forgets more while the weights are pushed towards zero.

        min over theta of E_{D_r} L(theta; x, y) + alpha_e ||theta||_1,    alpha_e = alpha (1 - e / (E - E_free))

    with e = 0, 1, … the epoch of E and no penalty in the last E_free. theta is what ``params`` selects, biases and normalisation
    included. The forget set is not opened, unless a ``mask`` is to be found on it (SalUn's, as an option: only the weights in it move).

    Logged: ``loss`` is the objective, ``retain`` is L on the batch, ``alpha`` is alpha_e, ``norm`` is ||theta||_1; with a mask the
    first row has ``mask_seconds``.

    Deviations from the authors' code:
    1. On classifiers alpha is 1e-4. The release's default is 0.2 (preset ``release``), which is far too strong: it destroys the model.
    2. When ``steps`` is given, E is the number of epochs begun in them.
    3. Preset ``ddpm`` has an alpha of ours; nobody published one.
    """

    paper: ClassVar[str] = "arXiv:2304.04934"
    needs: ClassVar[type] = Trainable
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "classifier": {"alpha": 1e-4, "epochs": 10, "lr": 0.01},
        "release": {"alpha": 0.2},
        "short": {"epochs": 1, "batch": 128, "lr": 0.01},
        "ddpm": {"alpha": 1e-6, "steps": 1000, "batch": 128, "lr": 1e-4, "optimizer": "adam", "weight_decay": 0.0, "clip": 1.0},
    }

    params: str = "full"
    """weights to train"""
    alpha: float | Auto = "auto"
    """weight of the penalty in the first epoch"""
    free: int = 0
    """E_free: epochs at the end without a penalty"""
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

    def __post_init__(self) -> None:
        if least(self.epochs, self.batch) < 1 or least(self.steps, self.clip, self.alpha, self.free) < 0:
            raise UsageError("epochs and batch must be at least 1, and steps, clip, alpha and free at least 0")
        self.masking()

    def resolve(self, target: Any, task: Task) -> Self:
        return settled(self, target, task)

    def run(self, target: Trainable, task: Task) -> Iterator[Row]:
        batch, clip = int(self.batch), float(self.clip)
        D_r = target.open(task.retain).loader(batch)
        w = target.trainable(self.params)  # theta
        freeze, spent = self.freeze(target, lambda: target.open(task.forget), w, batch)
        opt = optimizer(self, w.values())
        target.train(self.norm)
        total = int(self.steps) or int(self.epochs) * len(D_r)
        fading = math.ceil(total / len(D_r)) - self.free  # E - E_free
        if fading < 1:
            raise UsageError(f"free={self.free} leaves no epoch with a penalty; give fewer free epochs or train longer")

        for i in target.steps(total, opt, D_r):
            alpha = float(self.alpha) * max(0.0, 1 - i // len(D_r) / fading)  # alpha_e
            L_r = target.loss(D_r.draw())
            l1 = torch.stack([p.abs().sum() for p in w.values()]).sum()  # ||theta||_1
            loss = L_r + alpha * l1
            opt.zero_grad()
            loss.backward()
            freeze.gradients()
            if clip:
                torch.nn.utils.clip_grad_norm_(w.values(), clip)
            opt.step()
            freeze.restore()
            yield {"loss": loss.item(), "retain": L_r.item(), "alpha": alpha, "norm": l1.item(), **first(i, spent)}
