"""Selective synaptic dampening."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from .. import config, saliency
from ..base import Auto, Method, Row, Task
from ..data import Examples
from ..errors import UsageError
from ..latents import Asked, Latents
from ..targets.base import Learner
from ._learn import joined, least, settled


@dataclass(frozen=True, kw_only=True)
class SSD(Method):
    """Selective synaptic dampening (Foster et al., AAAI 2024): shrink the weights that matter far more for the forget set than for all.

    Idea: no training. The diagonal of the Fisher information says how much each weight matters, once for all data D = D_f and D_r
    together and once for D_f:

        I = E over batches b of (grad L_b)^2,    theta_i <- min(lambda I_D,i / I_f,i, 1) theta_i    where I_f,i > alpha I_D,i

    L_b is the mean loss of a batch (for dual encoders mean(1 - cos) of its pairs), so a batch of 1 gives the diagonal itself. One pass
    over D, one over D_f, one step.

    Logged: ``chosen`` is the share of weights that are dampened, ``factor`` the mean of their factors (1 when there is none).

    Deviations from the authors' code:
    1. The gradients are taken in evaluation mode and on the pictures as they are.
    2. Batches count by their size, so that a short last one does not count as much as a whole one.
    """

    paper: ClassVar[str] = "arXiv:2308.07707"
    needs: ClassVar[type] = Learner
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "classifier": {"batch": 64},
        "ddpm": {"batch": 64},
        "clip": {"batch": 64},
    }

    params: str = "full"
    """weights that may be dampened"""
    alpha: float = 10.0
    """how many times more a weight must matter for the forget set"""
    lamb: float = 1.0
    """lambda, the strength: lower dampens more"""
    batch: int | Auto = "auto"
    """examples in each gradient that is squared"""
    pictures: int = config.later(800)
    """pictures of each side that a text-to-image model draws itself when the task names none"""

    def __post_init__(self) -> None:
        if least(self.batch, self.pictures) < 1 or min(self.alpha, self.lamb) < 0:
            raise UsageError("batch and pictures must be at least 1, and alpha and lamb at least 0")

    def resolve(self, target: Any, task: Task) -> Self:
        return settled(self, target, task)

    def run(self, target: Learner, task: Task) -> Iterator[Row]:
        target.differentiable()
        asked, batch = Asked(pictures=self.pictures), int(self.batch)
        D_f, D_r = target.forgotten(task, asked), target.retained(task, asked)
        w = target.trainable(self.params)  # theta
        I_D = saliency.mean(w, target.forgetting, self.mixed(D_f, D_r, batch), Tensor.square)
        I_f = saliency.mean(w, target.forgetting, D_f.batches(batch), Tensor.square)
        for _ in target.steps(1):
            chosen, factors, total = 0, 0.0, 0
            for n, p in w.items():
                where = I_f[n] > self.alpha * I_D[n]
                beta = (self.lamb * I_D[n] / I_f[n]).clamp(max=1)
                with torch.no_grad():
                    p.copy_(torch.where(where, beta * p, p))
                chosen, total = chosen + int(where.sum()), total + p.numel()
                factors += float(beta[where].sum())
            yield {"chosen": chosen / total, "factor": factors / chosen if chosen else 1.0}

    def mixed(self, D_f: Examples | Latents, D_r: Examples | Latents, batch: int) -> Iterator[dict[str, Any]]:
        """D_f and D_r as one shuffled set, in batches."""
        for rows in torch.randperm(len(D_f) + len(D_r)).split(batch):
            f, r = D_f.batch(rows[rows < len(D_f)]), D_r.batch(rows[rows >= len(D_f)] - len(D_f))
            yield joined(f, r)
