"""How a diffusion model was taught to see noise: one process for training, inversion and attacks, whatever sampler draws its pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import UsageError

Prediction = Literal["epsilon", "v_prediction", "sample"]


class NoiseProcess(ABC):
    """The path from data to noise, x_t = a(t) x_0 + s(t) eps, and what a network predicts on it.

    Times are floats in the unit that the network is told. A larger time is noisier. ``x_0``, ``x_t``, noise and predictions have one shape
    (B, ...); ``t`` is a number, a scalar tensor or (B,). A family of processes gives ``scale``, ``goal``, ``clean``, ``noise``, ``times``
    and ``draw``; the rest follows.
    """

    end: float
    """the time of clean data, which ``times`` ends with"""
    prediction: str
    """what the network predicts: epsilon, v_prediction or sample"""
    clip: float | None = None
    """bound of x_0 in ``step``; None for latents, which have none"""

    @abstractmethod
    def scale(self, t: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """a(t) and s(t), each of a shape that broadcasts against ``like``, on its device and in its dtype."""

    @abstractmethod
    def goal(self, x_0: Tensor, noise: Tensor, t: Any) -> Tensor:
        """What the network is trained to predict of x_t."""

    @abstractmethod
    def clean(self, x_t: Tensor, out: Tensor, t: Any) -> Tensor:
        """x_0 as the prediction ``out`` has it."""

    @abstractmethod
    def noise(self, x_t: Tensor, out: Tensor, t: Any) -> Tensor:
        """The noise as the prediction ``out`` has it."""

    @abstractmethod
    def times(self, steps: int, device: Any = None) -> Tensor:
        """The times (steps + 1,) of a trajectory, from the noisiest to ``end``."""

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator | None = None, device: Any = None) -> Tensor:
        """Times (n,) as training draws them, from ``generator`` or the global one."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What the trajectories of this process hang on, as JSON, for the keys of caches."""

    def noised(self, x_0: Tensor, noise: Tensor, t: Any) -> Tensor:
        """x_t = a(t) x_0 + s(t) noise."""
        a, s = self.scale(t, x_0)
        return a * x_0 + s * noise

    def step(self, x_t: Tensor, out: Tensor, t: Any, to: Any) -> Tensor:
        """x at the time ``to``, without fresh noise: a(to) x_0 + s(to) eps, both as ``out`` has them (DDIM, or Euler on a flow)."""
        a, s = self.scale(to, x_t)
        return a * self.clean(x_t, out, t) + s * self.noise(x_t, out, t)

    def invert(self, x: Tensor, out: Tensor, t: Any, to: Any) -> Tensor:
        """The x_t that ``step`` with the same ``out`` takes to ``x`` at the time ``to``. A step is linear in x_t and in ``out``."""
        one, zero = x.new_ones([1] * x.dim()), x.new_zeros([1] * x.dim())
        (a_t, s_t), (a, s) = self.scale(t, one), self.scale(to, one)
        of_x, of_out = (a * self.linear(x_, o, a_t, s_t, 0) + s * self.linear(x_, o, a_t, s_t, 1) for x_, o in ((one, zero), (zero, one)))
        return (x - of_out * out) / of_x

    @abstractmethod
    def linear(self, x: Tensor, out: Tensor, a: Tensor, s: Tensor, which: Literal[0, 1]) -> Tensor:
        """``clean`` (0) or ``noise`` (1) without any clipping, for given a(t) and s(t)."""


class VariancePreserving(NoiseProcess):
    """a = sqrt(abar_t), s = sqrt(1 - abar_t) (Ho et al. 2020, eq. 4; DDIM steps by Song et al. 2021, eq. 12), t in 0 … T - 1.

    Between two whole times the ratio s / a is interpolated linearly, as Euler samplers do; the time -1 is the clean end.
    ``clip`` bounds x_0 in ``step``: pixels lie in [-1, 1] and may be clipped, latents have no bound and never are.
    """

    end = -1.0

    def __init__(
        self,
        alphas: Tensor,
        *,
        prediction: Prediction = "epsilon",
        offset: int = 0,
        spacing: Literal["leading", "trailing"] = "leading",
        clean_end: bool = True,
        clip: float | None = None,
    ) -> None:
        """``alphas``: abar (T,). ``offset`` and ``spacing``: where ``times`` lie (Lin et al. 2023, table 2). ``clean_end``: the last step
        ends at abar = 1, else at abar_0."""
        last = alphas.new_ones(1) if clean_end else alphas[:1]
        self.alphas = torch.cat([alphas, last]).cpu()  # abar at -1 is the last entry
        self.prediction, self.offset, self.spacing, self.clip = prediction, offset, spacing, clip
        self.held: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def train_steps(self) -> int:
        """T, the whole times there are."""
        return len(self.alphas) - 1

    def scale(self, t: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self._alphas(like)
        t = torch.as_tensor(t, dtype=torch.float32, device=like.device).clamp(-1, self.train_steps - 1)
        low = t.floor()
        below, above = (alphas[i.long()] for i in (low, (low + 1).clamp(max=self.train_steps - 1)))
        ratio = torch.lerp(((1 - below) / below).sqrt(), ((1 - above) / above).sqrt(), (t - low).to(alphas.dtype))
        abar = torch.where(t > low, 1 / (1 + ratio.square()), below)
        shape = [-1, *[1] * (like.dim() - 1)] if t.dim() else [1] * like.dim()
        return (abar**0.5).view(shape).to(like.dtype), ((1 - abar) ** 0.5).view(shape).to(like.dtype)

    def _alphas(self, like: Tensor) -> Tensor:
        """abar (T + 1,) on the device of ``like``, in its dtype or wider; kept, since every step asks."""
        key = like.device, torch.promote_types(like.dtype, torch.float32)
        if key not in self.held:
            self.held[key] = self.alphas.to(*key)
        return self.held[key]

    def about(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in ("prediction", "offset", "spacing", "clip")}
        return {"kind": type(self).__name__, **settings, "alphas": [f"{x:.6e}" for x in self.alphas.tolist()]}

    def goal(self, x_0: Tensor, noise: Tensor, t: Any) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x_0
        a, s = self.scale(t, x_0)
        return a * noise - s * x_0

    def clean(self, x_t: Tensor, out: Tensor, t: Any) -> Tensor:
        x_0 = self.linear(x_t, out, *self.scale(t, x_t), 0)
        return x_0 if self.clip is None else x_0.clamp(-self.clip, self.clip)

    def noise(self, x_t: Tensor, out: Tensor, t: Any) -> Tensor:
        return self.linear(x_t, out, *self.scale(t, x_t), 1)

    def linear(self, x: Tensor, out: Tensor, a: Tensor, s: Tensor, which: Literal[0, 1]) -> Tensor:
        if self.prediction == "epsilon":
            return out if which else (x - s * out) / a
        if self.prediction == "sample":
            return (x - a * out) / s if which else out
        return a * out + s * x if which else a * x - s * out

    def times(self, steps: int, device: Any = None) -> Tensor:
        T = self.train_steps
        if not 1 <= steps <= T:
            raise UsageError(f"{steps} sampler steps are not possible on a schedule of {T} noise levels; give 1 to {T}")
        if self.spacing == "trailing":
            t = torch.arange(steps).neg().mul(T / steps).add(T).round() - 1
        else:
            t = torch.arange(steps - 1, -1, -1) * (T // steps) + self.offset
        return torch.cat([t.float().clamp(max=T - 1), torch.tensor([self.end])]).to(device)

    def draw(self, n: int, generator: torch.Generator | None = None, device: Any = None) -> Tensor:
        where = generator.device if generator else device
        return torch.randint(self.train_steps, (n,), generator=generator, device=where).float().to(device)


def of_scheduler(scheduler: Any, *, pixels: bool = False) -> VariancePreserving:
    """The process behind a diffusers scheduler's noise schedule, which its sampler has no part in.

    ``pixels``: the model works on pixels in [-1, 1], so the schedule's ``clip_sample`` counts; latents are never clipped.
    Raises ``UsageError`` for schedules that are not variance preserving (flow matching, EDM) and for unknown kinds of prediction.
    """
    config: Mapping[str, Any] = scheduler.config
    kind, name = config.get("prediction_type", "epsilon"), type(scheduler).__name__
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if "FlowMatch" in name or config.get("use_flow_sigmas") or "flow" in kind:
        raise UsageError(
            f"the scheduler {name} is of a flow-matching model, which is not supported; use a Stable Diffusion 1.x, 2.x or SDXL model"
        )
    if alphas is None or "EDM" in name:
        raise UsageError(f"the scheduler {name} holds no alphas_cumprod, so its noise cannot be told; save the model with a DDIMScheduler")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise UsageError(f"the scheduler's prediction_type '{kind}' is unknown; it must be epsilon, v_prediction or sample")
    clips = pixels and config.get("clip_sample", True)
    return VariancePreserving(
        alphas.detach().clone(),
        prediction=kind,
        offset=int(config.get("steps_offset", 0)),
        spacing="trailing" if config.get("timestep_spacing") == "trailing" else "leading",
        clean_end=bool(config.get("set_alpha_to_one", True)),
        clip=float(config.get("clip_sample_range", 1.0)) if clips else None,
    )
