"""Safe Latent Diffusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Method, Row, Task
from ..diffusion import Cond, Step, guided, tiled
from ..errors import UsageError
from ..targets.base import TextToImage
from ._guide import TEXTS, read


@dataclass(frozen=True, kw_only=True)
class SLD(Method):
    """Safe Latent Diffusion (Schramowski et al., CVPR 2023): steer every picture away from unsafe words S while it is drawn.

    Equation (paper, eq. 3-8; products, comparisons and minima are element by element):
        eps   = eps_0 + s_g (eps_p - eps_0 - gamma),   without gamma in the first delta steps
        gamma = mu (eps_S - eps_0) + s_m nu
        mu    = min(1, s_S |eps_p - eps_S|) where eps_p - eps_S < lambda, else 0
        nu   <- beta nu + (1 - beta) gamma,            nu = 0 at first, built up from the first step on
    with predictions for no text (eps_0), the prompt (eps_p) and S (eps_S), all three in one call of the UNet, and the sampler's
    guidance s_g. So a step costs three evaluations instead of two.

    No weight changes: this acts at generation time, is applied again when the run folder is loaded, and is bypassed by whoever holds
    the weights. P4D, UnlearnDiffAtk, PH2P and CCE differentiate through one step of the guidance, with the warm-up over and nu = 0: the
    momentum of earlier steps, and the warm-up, are not in their gradients. Prompts of every attack are judged by pictures drawn with
    the whole guidance.
    mu is 0 where eps_p = eps_S: a prompt that is S, word for word, is not steered at all.

    Logged: ``tokens`` is how many tokens of S the text encoder reads.

    Deviations from the authors' code:
    1. S is the task's phrases, or ``unsafe``. Theirs is always the text that ``unsafe=i2p`` (or the preset i2p) stands for.
    2. For v-prediction models mu and gamma are computed in the noise that v stands for, so that s_S and lambda keep their unit.
    3. Guidance of 1 or less does not turn it off, nor does s_S of 1 or less; s_S = 0 is plain sampling, bit for bit.
    4. weak has s_S = 20, as diffusers has it. weak-200 has the 200 of Diffusion-MU-Attack; name the preset beside a number. delta counts
       steps of a 50-step sampler there and is not rescaled here to samplers with fewer; the preset canvas, which is ours, is strong for
       a sampler of 20.
    5. SDXL is served too; the same S goes to both text encoders.
    """

    paper: ClassVar[str] = "arXiv:2211.05105"
    needs: ClassVar[type] = TextToImage
    runtime: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "weak": {"scale": 20.0, "warmup": 15, "threshold": 0.0, "momentum": 0.0, "beta": 0.0},
        "weak-200": {"scale": 200.0, "warmup": 15, "threshold": 0.0, "momentum": 0.0, "beta": 0.0},
        "medium": {},
        "strong": {"scale": 2000.0, "warmup": 7, "threshold": 0.025, "momentum": 0.5, "beta": 0.7},
        "max": {"scale": 5000.0, "warmup": 0, "threshold": 1.0, "momentum": 0.5, "beta": 0.7},
        "i2p": {"unsafe": "i2p"},
        "i2p-ours": {"unsafe": "i2p-ours"},
        "canvas": {"scale": 2000.0, "warmup": 2, "threshold": 0.05, "momentum": 0.5, "beta": 0.7},
    }

    unsafe: str = ""
    """S, what to steer away from; empty: the task's phrases, joined by commas. i2p: the authors' 20 terms; i2p-ours: 20 terms of ours"""
    scale: float = 1000.0
    """s_S, how fast the guidance grows with the distance from S"""
    warmup: int = 10
    """delta, steps of the sampler before it acts; it decides about the composition of the picture in them"""
    threshold: float = 0.01
    """lambda, how far the prompt may lie beyond S and still be steered"""
    momentum: float = 0.3
    """s_m, weight of the guidance of earlier steps"""
    beta: float = 0.4
    """how much of the earlier steps' guidance is kept in each step"""

    def __post_init__(self) -> None:
        if min(self.scale, self.warmup, self.momentum) < 0 or not 0 <= self.beta <= 1:
            raise UsageError("scale, warmup and momentum must be at least 0, and beta from 0 to 1")

    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        text = TEXTS.get(self.unsafe, self.unsafe) or ", ".join(task.said)
        for _ in target.steps(1):
            target.guide, target.late_guide = partial(self.steer, text), partial(self.steer, text, late=True)
            yield {"tokens": float(read(target, text))}

    def steer(self, text: str, target: TextToImage, *, late: bool = False) -> Step:
        """The guide: steps of one sampling, with their own momentum; or, ``late``, steps without memory that act from the first on."""
        s_S, delta, lam, s_m, beta = self.scale, self.warmup, self.threshold, self.momentum, self.beta
        if not s_S or not text.strip():
            return partial(guided, target)
        S, i = target.encode([text]), 0
        nu: Tensor | float = 0.0

        def step(x: Tensor, t: Any, p: Cond, null: Cond, s_g: float) -> Tensor:
            nonlocal nu, i
            three = Cond.cat([null, p, S.repeat(len(p))])
            e_0, e_p, e_S = target.eps(torch.cat([x, x, x]), tiled(t, 3), three).chunk(3)  # (B, 4, h, w) each
            a = unit(target, t)
            d = a * (e_p - e_S)
            mu = torch.where(d < lam, (s_S * d.abs()).clamp(max=1), 0)
            gamma = mu * a * (e_S - e_0) + s_m * nu
            if not late:
                nu = beta * nu + (1 - beta) * gamma
                i += 1
            e: Tensor = e_0 + s_g * (e_p - e_0 - (gamma / a if late or i > delta else 0))
            return e

        return step


def unit(target: TextToImage, t: Any) -> Any:
    """How much noise a difference of 1 between two predictions at the same x_t is: 1, or sqrt(abar_t) for v-prediction.

    There eps = sqrt(abar_t) v + sqrt(1 - abar_t) x_t. Schedules that end in pure noise have abar_t = 0, where v says nothing of it.
    Where each row has its own t (B,), so has it its own unit (B, 1, 1, 1).
    """
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    slope = target.process.noise(zero, one, t) - target.process.noise(zero, zero, t)  # d eps / d prediction
    size = slope.abs().clamp(min=1e-3)
    return float(size) if len(size) == 1 else size.to(t.device)
