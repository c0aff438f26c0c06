"""Gradient ascent."""

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
class GA(Method, Masked):
    """Gradient ascent (Thudi et al., EuroS&P 2022): climb the training loss of the forget set.

    Idea: training minimised the loss on these examples; undo it by maximising. Nothing holds the rest of the model in place.

        min over theta of -E_{D_f} L(theta; x, y)

    with L the family's own training loss, for dual encoders mean(1 - cos) of the pairs (as SLUG has it). The retained data is not opened.
    With a ``mask`` (SalUn's, as an option) only the weights in it move.

    Logged: ``loss`` is -L on the batch, ``forget`` is L; with a mask the first row has ``mask_seconds``.

    Deviations from the authors' code:
    1. SalUn's authors advise lr 5e-4 to 1e-3 where 1e-4 changes nothing; the default is their README's 1e-4.
    2. Stable Diffusion sees one latent of each picture, made once; SalUn's release, whose settings the presets ``sd`` and ``sd-nsfw``
       are, encodes the pictures in every step.
    3. On diffusion models L is a mean over the picture's numbers; SalUn's release takes the sum and adds a retain term, which is
       ``neggrad_plus`` here.
    """

    paper: ClassVar[str] = "arXiv:2109.13398"
    needs: ClassVar[type] = Learner
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "classifier": {"epochs": 5, "lr": 1e-4},
        "short": {"epochs": 2, "batch": 128, "lr": 5e-4},
        "ddpm": {"steps": 1000, "batch": 128, "lr": 1e-4, "optimizer": "adam", "weight_decay": 0.0, "clip": 1.0},
        "sd": {"epochs": 5, "batch": 8, "lr": 1e-5, "optimizer": "adam", "weight_decay": 0.0},
        "sd-nsfw": {
            "steps": 100, "batch": 8, "lr": 1e-5, "optimizer": "adam", "weight_decay": 0.0, "prompts": ("a photo of a nude person",),
        },
        "canvas": {"steps": 20, "batch": 16, "lr": 1e-5, "optimizer": "adam", "weight_decay": 0.0, "pictures": 64},
        "clip": {"epochs": 10, "batch": 32, "lr": 1e-6, "optimizer": "adamw", "weight_decay": 0.1},
    }  # fmt: skip

    params: str = "full"
    """weights to train"""
    epochs: int | Auto = "auto"
    """passes over the forget set"""
    steps: int | Auto = "auto"
    """optimiser steps; above 0 it replaces epochs"""
    batch: int | Auto = "auto"
    """examples in each step"""
    lr: float | Auto = "auto"
    """learning rate; the paper of SalUn searches 1e-5 to 1e-3"""
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
    """pictures that a text-to-image model draws itself when the task names none"""
    prompts: tuple[str, ...] = ()
    """their prompts; empty: the task's"""

    def __post_init__(self) -> None:
        if least(self.epochs, self.batch, self.pictures) < 1 or least(self.steps, self.clip) < 0:
            raise UsageError("epochs, batch and pictures must be at least 1, and steps and clip at least 0")
        self.masking()

    def resolve(self, target: Any, task: Task) -> Self:
        return settled(self, target, task)

    def run(self, target: Learner, task: Task) -> Iterator[Row]:
        target.differentiable()
        batch, clip = int(self.batch), float(self.clip)
        forget = target.forgotten(task, Asked(pictures=self.pictures, forget=self.prompts))
        D_f = forget.loader(batch)
        w = target.trainable(self.params)  # theta
        freeze, spent = self.freeze(target, lambda: forget, w, batch)
        opt = optimizer(self, w.values())
        target.train(self.norm)

        for i in target.steps(int(self.steps) or int(self.epochs) * len(D_f), opt, D_f):
            loss = -target.forgetting(D_f.draw())
            opt.zero_grad()
            loss.backward()
            freeze.gradients()
            if clip:
                torch.nn.utils.clip_grad_norm_(w.values(), clip)
            opt.step()
            freeze.restore()
            yield {"loss": loss.item(), "forget": -loss.item(), **first(i, spent)}
