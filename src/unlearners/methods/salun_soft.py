"""Saliency unlearning with a mask that training finds itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from .. import config, optim, saliency
from ..base import Auto, Method, Relabel, Row, Task
from ..errors import UsageError
from ..targets.base import Trainable
from ._learn import least, optimizer, settled
from ._relabel import DDPM, Lessons, Order


@dataclass(frozen=True, kw_only=True)
class SalUnSoft(Method):
    """SalUn-soft (Fan et al., ICLR 2024): wrong labels under an l1 pull to the original weights, so that few weights move.

    Idea: nobody chooses a mask. After every step the weights that moved least go back, and all others go back by the same amount:

        min over theta of E_{D_f, y' != y} L(theta; x, y') + alpha E_{D_r} L(theta; x, y) + beta ||theta - theta_0||_1
        Delta = theta - theta_0,  tau = the k-th smallest |Delta|,  k = floor(rho (1 - s / S) N)
        theta <- theta_0 + sign(Delta) max(|Delta| - tau, 0)

    with s = 0, 1, … the step of S: the proximal step of the penalty, whose beta follows from how many weights are to rest. L is the
    cross-entropy; for diffusion models the first term is ||eps_theta(x_t | y) - stopgrad eps_theta(x_t | y')||^2. Weights that go
    back have the bits of theta_0. In ``joint`` order a step draws one batch of each set, and an epoch is one pass over D_r.

    Logged: ``loss``, ``forget`` and ``retain`` as in ``salun``, without the penalty; ``tau``; ``moved`` is the share of weights that
    are not at the anchor.

    Deviations from the authors' code:
    1. Preset ``release`` has what it does otherwise: the anchor is taken anew when an epoch begins, so it is theta_0 in the first
       alone (``renew=epoch``); k falls once an epoch (``decay=epoch``); labels are any, passes follow one another.
    2. Its option for rho is missing from its command line, so it has no default there; 0.5 is SalUn's density.
    3. Preset ``ddpm`` has the setting of ``salun``; the release has no soft variant for it.
    """

    paper: ClassVar[str] = "arXiv:2310.12508"
    needs: ClassVar[type] = Trainable
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "classifier": {"labels": "other", "alpha": 1.0, "epochs": 10, "lr": 0.013},
        "release": {"order": "sequential", "labels": "any", "drop": "both", "renew": "epoch", "decay": "epoch"},
        "short": {"order": "sequential", "epochs": 1, "batch": 128, "lr": 0.01},
        "ddpm": DDPM,
    }

    params: str = "full"
    """weights to train"""
    rho: float = 0.5
    """share of the weights that go back to the anchor after the first step; it falls linearly to 0"""
    renew: Literal["never", "epoch"] = "never"
    """what weights go back to: always the original's (the paper), or those at the start of each epoch (the release's)"""
    decay: Literal["step", "epoch"] = "step"
    """whether the share falls with every step, or once an epoch (the release's)"""
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
    """learning rate (of the release's README, for SalUn)"""
    optimizer: optim.Optimizer | Auto = "auto"
    """sgd, adam or adamw"""
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
        if not 0 <= self.rho <= 1:
            raise UsageError(f"rho is {self.rho} but must be between 0 and 1")

    def resolve(self, target: Any, task: Task) -> Self:
        return settled(self, target, task)

    def run(self, target: Trainable, task: Task) -> Iterator[Row]:
        forget, retain = target.open(task.forget), target.open(task.retain)
        lessons = Lessons(self, target, forget, retain)
        w, clip = target.trainable(self.params), float(self.clip)  # theta
        opt = optimizer(self, w.values())
        anchor = _Anchor(w)
        N = sum(p.numel() for p in w.values())
        target.train(self.norm)
        epoch = lessons.epoch
        S = int(self.steps) or int(self.epochs) * epoch

        for s in target.steps(S, opt, *lessons.loaders, *([anchor] if self.renew == "epoch" else [])):
            if self.renew == "epoch" and s % epoch == 0:
                anchor.take(w)
            loss, parts = lessons.loss(s)
            opt.zero_grad()
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(w.values(), clip)
            opt.step()
            gone = s if self.decay == "step" else s // epoch * epoch
            tau = anchor.pull(w, saliency.count(self.rho, N * (S - gone)) // S)
            moved = torch.stack([(p != a).sum() for p, a in zip(w.values(), anchor.values.values(), strict=True)]).sum() / N
            values = torch.stack([moved, loss.detach(), *(p.detach() for p in parts.values())]).tolist()
            yield dict(zip(["moved", "loss", *parts], values, strict=True)) | {"tau": tau}


class _Anchor:
    """The weights that others go back to, which ``Target.steps`` can checkpoint."""

    def __init__(self, w: Mapping[str, Tensor]) -> None:
        self.values: dict[str, Tensor] = {}
        self.take(w)

    def take(self, w: Mapping[str, Tensor]) -> None:
        self.values = {n: p.detach().clone() for n, p in w.items()}

    @torch.no_grad()
    def pull(self, w: Mapping[str, Tensor], k: int) -> float:
        """The proximal step towards the anchor that puts the ``k`` weights which moved least (and equals of the last) on it; its tau."""
        if k == 0:
            return 0.0
        pairs = [(p.detach(), self.values[n]) for n, p in w.items()]
        far = torch.cat([(p - a).abs().flatten() for p, a in pairs])  # |Delta|, (N,)
        ((tau, _),) = saliency.kth([far], [len(far) - k + 1])  # the k-th smallest is the (N - k + 1)-th largest
        for p, a in pairs:
            delta = p - a
            rest = delta.abs() <= tau
            torch.where(rest, a, a + delta.sign() * (delta.abs() - tau), out=p)  # chosen, so that -0.0 stays -0.0
        return tau

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state
