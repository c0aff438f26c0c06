"""Gradient ascent, then fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import Self

from .. import optim
from ..base import Auto, Method, Row, Task
from ..errors import UsageError
from ..latents import Asked
from ..targets.base import Learner
from ._learn import least, optimizer, settled
from ._mask import Masked, first


@dataclass(frozen=True, kw_only=True)
class GAFT(Method, Masked):
    """Gradient ascent and fine-tuning in turn (the baseline GAFT of SLUG, Cai et al., ICML 2025).

    Idea: every epoch climbs the loss of the forget set in one pass, and mends what that broke in a pass over the retained set.

        theta <- theta + lr grad L_f(theta; D_f),    then    theta <- theta - lr grad L(theta; D_r)

    with L the family's own training loss and L_f the one that ascent raises: mean(1 - cos) for dual encoders, L for all others.
    With ``mask=saliency`` (SalUn's, as an option) it is what SLUG's tables call SalUn.

    Logged: ``forget`` is L_f or ``retain`` is L on the batch of the step; ``loss`` what the step lowers. With a mask
    the first row has ``mask_seconds``.

    Deviations from the authors' code:
    1. The learning rate is constant; theirs decays by a cosine over the epochs. AdamW has its usual betas.
    2. All weights decay alike; theirs spare gains and biases.
    3. The paper has it on CLIP alone. On classifiers "auto" takes the settings of ``ga`` (lr 1e-4), on diffusion models SalUn's.
    """

    paper: ClassVar[str] = "arXiv:2407.11867"
    needs: ClassVar[type] = Learner
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "classifier": {"epochs": 5, "lr": 1e-4},
        "clip": {"epochs": 10, "batch": 32, "lr": 1e-6, "optimizer": "adamw", "weight_decay": 0.1},
    }

    params: str = "full"
    """weights to train"""
    epochs: int | Auto = "auto"
    """passes over both sets"""
    steps: int | Auto = "auto"
    """optimiser steps; above 0 it replaces epochs"""
    batch: int | Auto = "auto"
    """examples in each step"""
    lr: float | Auto = "auto"
    """learning rate; the paper takes 1e-6 and 1e-7"""
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
    pictures: int = 800
    """pictures of each side that a text-to-image model draws itself when the task names none"""

    def __post_init__(self) -> None:
        if least(self.epochs, self.batch, self.pictures) < 1 or least(self.steps, self.clip) < 0:
            raise UsageError("epochs, batch and pictures must be at least 1, and steps and clip at least 0")
        self.masking()

    def resolve(self, target: Any, task: Task) -> Self:
        return settled(self, target, task)

    def run(self, target: Learner, task: Task) -> Iterator[Row]:
        target.differentiable()
        asked, batch, clip = Asked(pictures=self.pictures), int(self.batch), float(self.clip)
        forget = target.forgotten(task, asked)
        D_f, D_r = forget.loader(batch), target.retained(task, asked).loader(batch)
        w = target.trainable(self.params)  # theta
        freeze, spent = self.freeze(target, lambda: forget, w, batch)
        opt = optimizer(self, w.values())
        target.train(self.norm)
        epoch = len(D_f) + len(D_r)
        for i in target.steps(int(self.steps) or int(self.epochs) * epoch, opt, D_f, D_r):
            if i % epoch < len(D_f):
                loss, name = -target.forgetting(D_f.draw()), "forget"
            else:
                loss, name = target.loss(D_r.draw()), "retain"
            opt.zero_grad()
            loss.backward()
            freeze.gradients()
            if clip:
                torch.nn.utils.clip_grad_norm_(w.values(), clip)
            opt.step()
            freeze.restore()
            value = loss.item()
            yield {"loss": value, name: -value if name == "forget" else value, **first(i, spent)}
