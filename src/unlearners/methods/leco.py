"""LECO: concept erasure in a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from .. import lora, optim
from ..base import Method, Row, Task
from ..diffusion import TrajectoryPool, states
from ..errors import UsageError
from ..targets.base import TextToImage


@dataclass(frozen=True, kw_only=True)
class LECO(Method):
    """Low-rank Erasing of COncepts (p1atdev, 2023): the loss of ESD, learnt in a LoRA.

    Idea: W stays as it is and W + (alpha / r) B A is trained, so the teacher eps_0 is the same network with the LoRA off, and what is
    learnt is small enough to share. With target prompt c, positive prompt p (c itself as a rule) and neutral prompt n:
        eps_theta(x_t, c) <- eps_0(x_t, n) -+ g [eps_0(x_t, p) - eps_0(x_t, "")]        (- erases, + enhances)
    with x_t sampled by the model in training from c. With n = "" and g = eta this is ESD's equation 7.

    Logged: ``loss`` is the mean squared error of the equation above; ``distance`` is ||eps_theta(c) - eps_0(p)|| / ||eps_0(p)||.

    Deviations from the authors' code:
    1. The network is told the time of x_t; theirs tells it one that is a sampler's step (20 of 1000) noisier, less one.
    2. LoRA and losses are float32; theirs trains bfloat16 weights.
    3. The LoRA is merged at the end: the result is a patch like any other. Export it as a LoRA to get the factors back.
    4. Pictures are sampled at the model's own size. On SDXL guidance is not rescaled (theirs by 0.7).
    5. ``pool`` is ours: one sampled trajectory feeds many updates. 0 is their procedure. A pool also holds states of pure noise.
    """

    paper: ClassVar[str] = "https://github.com/p1atdev/LECO"
    needs: ClassVar[type] = TextToImage
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "kohya": {"params": r"unet\..*\.attentions\.", "rank": 8, "alpha": 4.0, "sampler_steps": 40},
        "canvas": {"alpha": 4.0, "steps": 150, "lr": 2e-3, "batch": 8, "sampler_steps": 20, "pool": 16, "refresh": 1000},
    }

    params: str = r"unet\..*\.attn[12]\."
    """weights to adapt, those of linear and convolution layers of the UNet alone: a group or a regular expression"""
    rank: int = 4
    """r, the rank of each weight's change"""
    alpha: float = 1.0
    """the LoRA is scaled by alpha / rank"""
    steps: int = 500
    """optimiser steps"""
    lr: float = 1e-4
    """learning rate of AdamW"""
    weight_decay: float = 0.01
    """of AdamW"""
    g: float = 1.0
    """how far the prediction is moved along the concept's direction"""
    action: Literal["erase", "enhance"] = "erase"
    """move it against the direction, or along it"""
    positive: str = ""
    """prompt that gives the direction; empty is the concept's own"""
    neutral: Literal["empty", "anchor"] = "empty"
    """prompt the prediction starts from: the empty one, or the task's anchor"""
    batch: int = 1
    """states x_t in each update"""
    guidance: float = 3.0
    """classifier-free guidance while sampling x_t"""
    sampler_steps: int = 50
    """steps of a whole trajectory"""
    pool: int = 0
    """trajectories shared by the updates; 0 samples a new partial one for each"""
    refresh: int = 100
    """updates after which the pool is sampled anew"""

    def __post_init__(self) -> None:
        if min(self.rank, self.steps, self.batch, self.sampler_steps, self.refresh) < 1 or self.pool < 0:
            raise UsageError("rank, steps, batch, sampler_steps and refresh must be at least 1, and pool at least 0")

    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        with torch.no_grad():
            c, null = target.encode(list(task.said)), target.null()
            p = target.encode([self.positive] * len(c)) if self.positive else c
            n = target.encode(lora.neutrals(task, self.neutral))
        sign = -1 if self.action == "erase" else 1
        pool = TrajectoryPool()
        how: dict[str, Any] = {
            "size": self.pool, "refresh": self.refresh, "batch": self.batch, "guidance": self.guidance, "steps": self.sampler_steps,
            "first": 1,
        }  # fmt: skip

        with lora.adapted(target, self.params, self.rank, self.alpha) as theta:
            opt = optim.make("adamw", theta.weights, lr=self.lr, weight_decay=self.weight_decay)
            for _ in target.steps(self.steps, opt, pool):
                x_t, t, k = states(target, pool, c, null, **how)  # (B, 4, h, w), (B,), (B,)
                with theta.off():
                    asked = [p[k], null.repeat(len(k)), *([n[k]] if self.neutral == "anchor" else [])]
                    e_p, e_0, *e_n = lora.each(target, x_t, t, *asked)  # (B, 4, h, w) each
                goal = (e_n or [e_0])[0] + sign * self.g * (e_p - e_0)
                e = target.eps(x_t, t, c[k])
                loss = F.mse_loss(e.float(), goal.float())
                opt.zero_grad()
                loss.backward()
                opt.step()
                yield {"loss": loss.item(), "distance": ((e.detach() - e_p).norm() / e_p.norm()).item()}
