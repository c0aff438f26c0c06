"""Boundary Expanding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .. import optim
from ..base import Method, Row, Task
from ..errors import UsageError
from ..targets.classifier import Classifier


@dataclass(frozen=True, kw_only=True)
class BoundaryExpand(Method):
    """Boundary Expanding (Chen et al., CVPR 2023): send the forget set into an extra class, then drop that class.

    Idea: a shadow class K takes the forgotten examples over. Once it is gone they are spread over the classes that remain.

        min over theta, u of E_{D_f} CE([f_theta(x), u' h_theta(x)], K),    h_theta(x): the input of the last layer

    The retained data is not opened. The row u starts at random, belongs to this method and is gone after the last step; the model
    keeps its shapes throughout.

    Logged: ``loss`` is the cross-entropy above; ``shadow`` is the share of the batch that class K holds.

    Deviations from the authors' code:
    1. The extra row is dropped, as the paper says. SalUn's release keeps it, so that it is evaluated with K + 1 answers and its
       forget accuracy is low for that reason alone.
    """

    paper: ClassVar[str] = "arXiv:2303.11570"
    needs: ClassVar[type] = Classifier
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "short": {"epochs": 2, "batch": 128, "lr": 1e-3},
    }

    params: str = "full"
    """weights to train, beside the extra row"""
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
        if min(self.epochs, self.batch) < 1 or min(self.steps, self.clip) < 0:
            raise UsageError("epochs and batch must be at least 1, and steps and clip at least 0")

    def run(self, target: Classifier, task: Task) -> Iterator[Row]:
        D_f = target.open(task.forget).loader(self.batch)
        u = nn.Linear(target.head.in_features, 1).to(target.device)
        w = [*target.trainable(self.params).values(), *u.parameters()]  # theta, u
        opt = optim.make(self.optimizer, w, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        K = target.head.out_features
        target.train(self.norm)

        for _ in target.steps(self.steps or self.epochs * len(D_f), opt, D_f, u):
            h = target.features(D_f.draw()["x"]).float()  # (B, F)
            f = torch.cat([target.head(h), u(h)], dim=1)  # (B, K + 1)
            loss = F.cross_entropy(f, torch.full((len(f),), K, device=f.device))
            opt.zero_grad()
            loss.backward()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(w, self.clip)
            opt.step()
            yield {"loss": loss.item(), "shadow": (f.argmax(1) == K).float().mean().item()}
