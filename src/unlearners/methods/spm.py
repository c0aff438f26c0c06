"""Semi-permeable membranes, merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import lora, optim
from ..base import Method, Row, Task
from ..diffusion import Cond, TrajectoryPool, states
from ..errors import UsageError
from ..targets.base import TextToImage


@dataclass(frozen=True, kw_only=True)
class SPM(Method):
    """Concept Semi-Permeable Membrane (Lyu et al., CVPR 2024): one rank-1 adapter per layer, anchored where the concept is not.

    Idea: learn W + B A with B A of rank 1 in every layer of the transformer blocks, from ESD's loss towards a neutral prompt n,
        L_era = ||eps_theta(x_t, c) - (eps_0(x_t, n) - eta [eps_0(x_t, c) - eps_0(x_t, n)])||^2,
    and hold everything else by ||eps_theta(x_t, a) - eps_0(x_t, a)||^2 (latent anchoring) at random text states a, of 0.8 to 1.2 times
    the concept's norm, each accepted with probability 1 - cos(a, c):
        L = L_era + lambda L_anc.

    Logged: ``loss`` is L, ``erase`` is L_era, ``anchoring`` is L_anc before its weight.

    Deviations from the authors' code:
    1. The adapters are merged, at gamma = 1 for every prompt. Theirs multiplies them at inference by gamma, a similarity of prompt and
       concept: that gate is the method ``spm_gate``, which takes the run folder of this one. Without it prompts of other concepts are
       held by anchoring alone, and stacked concepts add up in full. UA is in both cases that of a prompt which names the concept.
    2. AdamW holds float32 moments; theirs 8-bit ones.
    3. The network is told the time of x_t; theirs tells it one that is a sampler's step (33 of 1000) noisier, less one.
    4. Pictures are sampled at the model's own size; theirs draws a size between half and all of it. No guidance rescaling on SDXL.
    5. ``pool`` is ours: one sampled trajectory feeds many updates. 0 is their procedure. ``warmup`` is a share of the steps (500 of 3000).
    """

    paper: ClassVar[str] = "arXiv:2312.16145"
    needs: ClassVar[type] = TextToImage
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "canvas": {"steps": 200, "lr": 1e-2, "lamb": 30.0, "batch": 4, "sampler_steps": 20, "pool": 16, "refresh": 1000},
    }

    params: str = r"unet\..*\.attentions\."
    """weights to adapt, those of linear and convolution layers of the UNet alone: a group or a regular expression"""
    rank: int = 1
    """of each weight's change"""
    alpha: float = 1.0
    """the adapter is scaled by alpha / rank"""
    steps: int = 3000
    """optimiser steps"""
    lr: float = 1e-4
    """highest learning rate of AdamW"""
    weight_decay: float = 0.01
    """of AdamW"""
    warmup: float = 1 / 6
    """share of the steps over which the learning rate rises"""
    cycles: int = 3
    """cosines from the highest learning rate to 0 after that"""
    eta: float = 1.0
    """negative guidance; 0 teaches the neutral prompt's prediction"""
    neutral: Literal["empty", "anchor"] = "empty"
    """what takes the concept's place: the empty prompt, or the task's anchor"""
    lamb: float = 1000.0
    """lambda, weight of the anchoring"""
    anchors: int = 4
    """random text states in each update"""
    batch: int = 1
    """states x_t in each update"""
    guidance: float = 3.0
    """classifier-free guidance while sampling x_t"""
    sampler_steps: int = 30
    """steps of a whole trajectory"""
    pool: int = 0
    """trajectories shared by the updates; 0 samples a new partial one for each"""
    refresh: int = 100
    """updates after which the pool is sampled anew"""

    def __post_init__(self) -> None:
        if min(self.rank, self.steps, self.batch, self.sampler_steps, self.refresh, self.anchors, self.cycles) < 1 or self.pool < 0:
            raise UsageError("rank, steps, batch, sampler_steps, refresh, anchors and cycles must be at least 1, and pool at least 0")
        if not 0 <= self.warmup < 1:
            raise UsageError("warmup is a share of the steps: at least 0 and below 1")

    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        from diffusers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup as restarts

        with torch.no_grad():
            c, null = target.encode(list(task.said)), target.null()
            n = target.null(len(c)) if self.neutral == "empty" else target.encode(lora.neutrals(task, self.neutral))
        pool = TrajectoryPool()
        how: dict[str, Any] = {
            "size": self.pool, "refresh": self.refresh, "batch": self.batch, "guidance": self.guidance, "steps": self.sampler_steps,
            "first": 1,
        }  # fmt: skip
        row = torch.arange(self.anchors) % self.batch  # the state at which each anchor is held

        with lora.adapted(target, self.params, self.rank, self.alpha) as theta:
            opt = optim.make("adamw", theta.weights, lr=self.lr, weight_decay=self.weight_decay)
            rate = restarts(opt, int(self.warmup * self.steps), self.steps, self.cycles)
            for _ in target.steps(self.steps, opt, rate, pool):
                x_t, t, k = states(target, pool, c, null, **how)  # (B, 4, h, w), (B,), (B,)
                a = anchors(c[k[row]])
                x, s = torch.cat([x_t, x_t[row]]), torch.cat([t, t[row]])  # (B + M, 4, h, w), (B + M,)
                with theta.off():
                    e_c, e_n = lora.each(target, x_t, t, c[k], n[k])
                    e_a = target.eps(x_t[row], t[row], a)  # (M, 4, h, w)
                goal = e_n - self.eta * (e_c - e_n)
                e = target.eps(x, s, Cond.cat([c[k], a])).float()
                erase, anchoring = F.mse_loss(e[: len(k)], goal.float()), F.mse_loss(e[len(k) :], e_a.float())
                loss = erase + self.lamb * anchoring
                opt.zero_grad()
                loss.backward()
                opt.step()
                rate.step()
                yield {"loss": loss.item(), "erase": erase.item(), "anchoring": anchoring.item()}


def anchors(c: Cond) -> Cond:
    """Random text states, one for each row of ``c``: see ``SPM``. SDXL's pooled vectors are drawn in the same way, its sizes kept."""
    return Cond(_anchor(c.states), None if c.pooled is None else _anchor(c.pooled), c.time_ids)


def _anchor(c: Tensor) -> Tensor:
    """Rows like those of ``c`` (M, …): of uniform direction but for the refusals, and 0.8 to 1.2 times as long."""
    flat = c.flatten(1)  # (M, d)
    a = torch.empty_like(flat)
    open_ = torch.ones(len(flat), dtype=torch.bool, device=flat.device)  # rows not yet accepted
    while open_.any():
        z = torch.randn(flat.shape).to(flat)
        accept = torch.rand(len(flat)).to(flat) < 1 - F.cosine_similarity(z, flat)
        a = torch.where((open_ & accept)[:, None], z, a)
        open_ = open_ & ~accept
    length = (0.8 + 0.4 * torch.rand(len(flat))).to(flat) * flat.norm(dim=1)
    drawn: Tensor = (length[:, None] * F.normalize(a)).view_as(c)
    return drawn
