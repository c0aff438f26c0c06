"""Boundary Shrink."""

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
class BoundaryShrink(Method):
    """Boundary Shrink (Chen et al., CVPR 2023): give each forgotten example to the class across its nearest boundary.

    Idea: one adversarial step of the original finds the neighbouring class; fine-tuning on it moves the boundary over the example.

        x' = clip(x + bound sign grad_x CE(theta_0; x, y), 0, 1),    y' = argmax_{k != y} f_0(x')_k
        min over theta of E_{D_f} CE(theta; x, y')

    The retained data is not opened.

    Logged: ``loss`` is the cross-entropy towards y'; ``crossed`` is the share of x' that the original itself gives to another class.

    Deviations from the authors' code:
    1. y' is the nearest *incorrect* class. SalUn's release takes the plain argmax, which is y where x' did not cross the boundary
       (``incorrect=False``, preset ``release``).
    2. x' is not rounded to multiples of 1/255.
    """

    paper: ClassVar[str] = "arXiv:2303.11570"
    needs: ClassVar[type] = Classifier
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "release": {"incorrect": False},
        "short": {"epochs": 2, "batch": 128, "lr": 1e-3},
    }

    params: str = "full"
    """weights to train"""
    bound: float = 0.1
    """how far x' may be from x, in every pixel, on a scale of 0 to 1"""
    incorrect: bool = True
    """never give an example back its own class"""
    epochs: int = 10
    """passes over the forget set"""
    steps: int = 0
    """optimiser steps; above 0 it replaces epochs"""
    batch: int = 256
    """examples in each step"""
    lr: float = 1e-5
    """learning rate; the paper of SalUn searches 1e-6 to 1e-4"""
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
        if min(self.epochs, self.batch) < 1 or min(self.steps, self.clip, self.bound) < 0:
            raise UsageError("epochs and batch must be at least 1, and steps, clip and bound at least 0")

    def run(self, target: Classifier, task: Task) -> Iterator[Row]:
        D_f = target.open(task.forget).loader(self.batch)
        w = list(target.trainable(self.params).values())  # theta
        old = target.frozen()  # theta_0
        opt = optim.make(self.optimizer, w, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        target.train(self.norm)

        for _ in target.steps(self.steps or self.epochs * len(D_f), opt, D_f):
            batch = D_f.draw()
            x, y = batch["x"], batch["y"]
            near, crossed = self.neighbour(old, x, y)  # (B,), (B,)
            loss = F.cross_entropy(target.logits(x), near)
            opt.zero_grad()
            loss.backward()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(w, self.clip)
            opt.step()
            yield {"loss": loss.item(), "crossed": crossed.float().mean().item()}

    def neighbour(self, old: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """y' (B,) of pictures x (B, 3, H, W) in [0, 1] with labels y (B,), and whether x' crossed the original's boundary (B,)."""
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(old.logits(x), y, reduction="sum"), x)
        with torch.no_grad():
            z = old.logits((x + self.bound * slope.sign()).clamp(0, 1))  # (B, K)
            crossed = z.argmax(1) != y
            return (z.scatter(1, y[:, None], -torch.inf) if self.incorrect else z).argmax(1), crossed
