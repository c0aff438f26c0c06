"""Optimisers and schedules by name, with the fused kernels where there are any."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "cosine", "multistep", "onecycle"]


def make(kind: Optimizer, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> Any:
    """An optimiser of ``params``; ``momentum`` is SGD's alone."""
    if kind == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    cls = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
    return cls(params, lr=lr, weight_decay=weight_decay, fused=True)


def schedule(optimizer: Any, kind: Schedule, total: int) -> LambdaLR:
    """The learning rate over ``total`` steps, as a factor of its start.

    cosine: to 0. multistep: a tenth from 50 % and again from 75 % on (epochs 91 and 136 of 182). onecycle: a line up in the first
    25 %, a line down to 0. Stateful, so that ``Target.steps`` can checkpoint it.
    """
    factor = {
        "constant": lambda s: 1.0,
        "cosine": lambda s: 0.5 * (1 + math.cos(math.pi * min(1.0, s / total))),
        "multistep": lambda s: 0.1 ** ((s >= 0.5 * total) + (s >= 0.75 * total)),
        "onecycle": lambda s: max(0.0, min((s + 1) / max(1.0, 0.25 * total), (total - s) / max(1.0, 0.75 * total))),
    }[kind]
    return LambdaLR(optimizer, factor)
