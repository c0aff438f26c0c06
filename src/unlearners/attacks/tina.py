"""TINA, the text-free inversion attack (Xiang et al., CVPR 2026)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..base import Adversarial, Attack, Hit, Item, Row, Task
from ..errors import UsageError
from ..targets.base import TextToImage
from ._search import pictures


@dataclass(frozen=True, kw_only=True)
class TINA(Attack):
    """Find the start noise from which the erased model, without any text, draws a picture of the concept.

    Idea: an erasure that cuts the way from words to the concept leaves the concept in the weights. z_0 are the latents of the original
    model's picture. DDIM is followed backwards from it under the empty condition, and each step is then made exact:

        f(z_t) = (z_{t-1} - b_t e(z_t, t)) / a_t,      where DDIM steps z_{t-1} = a_t z_t + b_t e(z_t, t),
        z_t <- f(z_{t-1}),      then min over z_t  || f(z_t) - z_t ||²,       t = 1 … T.

    e is the raw prediction, of noise or of v; a_t and b_t hold for either. z_T is tried once, by DDIM in T steps and without a text.
    The attacker sets the start noise and reads the weights, so this asks what they still know rather than what a user can reach; and
    whatever draws back a given picture also draws others, so compare the rate with that of a model which never saw the concept.

    Logged: ``t`` noise level just inverted; ``before`` and ``loss`` mean squared f(z_t) - z_t at the start and the end of its iterations.

    The authors' code was not at hand; the settings are those reported for the paper.

    Deviations from the authors' code:
      1. Pictures are inverted ``batch`` at a time; the loss is a sum over them, so each one's search is its own.
      2. The optimiser is AdamW without weight decay; how much theirs has is not known.
      3. T is the number of steps that pictures are drawn in: 50 for Stable Diffusion, as in the paper, and 20 for the canvas.
      4. Pictures are judged by the task's judge.
    """

    needs = TextToImage
    paper: ClassVar[str] = "arXiv:2603.17828"
    access: ClassVar[Literal["white", "black"]] = "white"
    level: ClassVar[Literal["prompt", "tokens", "embedding", "latent"]] = "latent"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"iterations": 25, "lr": 0.001},
        "fast": {"iterations": 5, "lr": 0.005},
        "canvas": {"iterations": 4, "lr": 0.01, "batch": 64},
    }

    iterations: int = 25
    """gradient steps at each noise level; 0 leaves plain DDIM inversion"""
    lr: float = 0.001
    """AdamW's step size on the latents"""
    batch: int = 16
    """pictures inverted together; changes memory and speed, not the search"""

    def run(self, target: TextToImage, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        if self.iterations < 0 or self.lr <= 0:
            raise UsageError(f"iterations = {self.iterations} and lr = {self.lr:g} invert nothing; give 0 or more and a lr above 0")
        x = target.latents(pictures(self, items))
        z, null = x.to(torch.promote_types(x.dtype, torch.float32)), target.null(len(items)).detach()  # (B, 4, h, w)
        times = target.process.times(target.sampler["steps"], z.device).flip(0)
        for to, t in pairwise(times):

            def f(z_t: Tensor, z_prev: Tensor = z, t: Tensor = t, to: Tensor = to) -> Tensor:
                return target.process.invert(z_prev, target.eps(z_t.to(x.dtype), t, null).to(z_prev.dtype), t, to)

            with torch.no_grad():
                z = f(z)
            first = last = torch.zeros(())
            z.requires_grad_()
            adam = torch.optim.AdamW([z], lr=self.lr, weight_decay=0.0)
            for i in range(self.iterations):
                loss = (f(z) - z).square()
                (z.grad,) = torch.autograd.grad(loss.sum(), z)
                adam.step()
                last = loss.detach().mean()
                first = last if i == 0 else first
            z = z.detach()
            yield {"t": float(t), "before": first.item(), "loss": last.item()}
        hit({i: Adversarial(latent=z_T.cpu()) for i, z_T in enumerate(z)})
