"""Erased Stable Diffusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from .. import closed_form
from ..base import Auto, Method, Row, Target, Task
from ..config import later
from ..diffusion import TrajectoryPool, states
from ..errors import UsageError
from ..targets.base import Denoiser
from ._alone import AROUND, alone


@dataclass(frozen=True, kw_only=True)
class ESD(Method):
    """Erased Stable Diffusion (Gandikota et al., ICCV 2023): teach eps(x_t, c) to point away from the concept.

    Equation (paper, eq. 7):
        eps_theta(x_t, c, t) <- eps_0(x_t, t) - eta [eps_0(x_t, c, t) - eps_0(x_t, t)]
    with x_t sampled by the model itself from the concept prompt c. Only text is needed, no pictures. ESD-x trains the
    cross-attention (named styles), ESD-u everything else (concepts that must go even when nobody names them), ESD-self the
    self-attention, full the whole UNet.

    Logged: ``loss`` is the mean squared error of the equation above; ``distance`` is ||eps_theta - eps_0(., c)|| /
    ||eps_0(., c)||, how far the concept's prediction has moved (0 at the start); ``stays`` the error on what is held, where it is.

    Deviations from the authors' code:
    1. One eta convention, the paper's. The 2025 release writes its target as eps_0(c) - eta' [eps_0(c) - eps_0], so its
       eta' = 2 is eta = 1 here, and its SDXL default eta' = 1 is eta = 0.
    2. The network is told a time within half a sampler step around x_t's own. The 2023 code draws it from x_t's own time on
       (``time="bucket"``, on average half a step too noisy) and, by a slip that is not repeated, some 48 steps later still.
    3. Weights and losses are float32; the 2025 release trains bfloat16 weights. Pictures are sampled at the model's own size.
    4. Norm layers belong to noxattn and full; the 2025 release leaves them out without saying so.
    5. ``pool`` and ``batch`` are ours: one sampled trajectory feeds many updates. 0 and 1 are the paper's procedure.
    6. Fields that are "auto" go by the kind of concept and by the model: the paper trains ESD-x for styles and identities and ESD-u
       for nudity and objects; for SDXL there is only the 2025 script, whose settings are taken (preset ``release-sdxl``).
    7. ``templates`` and ``preserved`` are ours: the concept is also said beside other things, and prompts of what stays are held where
       they were by ``hold`` ||eps_theta(x~_t, c~) - eps_0(x~_t, c~)||^2. Preset ``fast`` chooses both where the task names no neighbours
       (``--concept`` alone, not nudity); it then trains the cross-attention with eta 4 and a lr to scale (``_alone``). ESD has neither.
    """

    paper: ClassVar[str] = "arXiv:2303.07345"
    needs: ClassVar[type] = Denoiser
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "release": {"steps": 200, "lr": 5e-5, "x_from": "frozen", "sampler": "pipeline", "time": "grid"},
        "release-sdxl": {
            "params": "xattn", "steps": 200, "lr": 2e-4, "eta": 0.0, "guidance": 2.0, "x_from": "frozen", "sampler": "pipeline",
            "time": "grid",
        },
        "fast": {
            "steps": 200, "x_from": "frozen", "sampler_steps": 25, "batch": 8, "pool": 16, "refresh": 1000,
            **dict.fromkeys(AROUND, "auto"),
        },
    }  # fmt: skip

    params: str = "auto"
    """weights to train: xattn (ESD-x), noxattn (ESD-u), selfattn (ESD-self), full, another group or a regular expression; auto: xattn for
    styles and identities, noxattn for nudity and objects"""
    steps: int | Auto = "auto"
    """optimizer steps; auto: 1000, and 200 on SDXL"""
    lr: float | Auto = "auto"
    """learning rate of Adam; auto: 1e-5, and 2e-4 for the cross-attention of SDXL; with preset fast 2e-4,
    and in text alone 0.9 % of the weights' root mean square"""
    eta: float | Auto = "auto"
    """negative guidance; 0 teaches the unconditional prediction; auto: 1, and 0 on SDXL"""
    batch: int = 1
    """states x_t in each update"""
    guidance: float | Auto = "auto"
    """classifier-free guidance while sampling x_t; auto: 3, and 2 on SDXL"""
    sampler_steps: int = 50
    """steps of a whole trajectory"""
    x_from: Literal["current", "frozen"] = "current"
    """which model samples x_t: the one in training (2023) or the original (2025)"""
    sampler: Literal["ddim", "pipeline"] = "ddim"
    """scheduler that samples x_t"""
    time: Literal["centered", "bucket", "grid"] = "centered"
    """the time the network is told: uniform within half a sampler step around x_t's own, within the step from x_t's own on (2023), or
    x_t's own (2025)"""
    pool: int = 0
    """trajectories shared by the updates; 0 samples a new partial one for each"""
    refresh: int = 100
    """updates after which the pool is sampled anew"""
    erase_from: str = ""
    """take the concept out of this prompt only: x_t and the student see it, the target is eps_0(from) - (1 + eta) [eps_0(c) - eps_0]"""

    templates: tuple[str, ...] | Auto = later(())
    """phrases with {} for the concept, in place of the task's prompts; auto chooses them where the task names no neighbours"""
    preserved: tuple[str, ...] | Auto = later(())
    """prompts that are held; auto chooses them where the task names no neighbours"""
    hold: float = later(3.0)
    """weight of holding them"""

    def __post_init__(self) -> None:
        steps = 1 if self.steps == "auto" else self.steps
        if min(steps, self.batch, self.sampler_steps, self.refresh) < 1 or self.pool < 0:
            raise UsageError("steps, batch, sampler_steps and refresh must be at least 1, and pool at least 0")
        closed_form.check_templates(self.templates if self.templates != "auto" else ())

    def resolve(self, target: Target, task: Task) -> Self:
        if "auto" in (self.templates, self.preserved):
            return replace(self, **alone(self, target, task)).resolve(target, task)
        named = task.kind in ("style", "identity") or "noxattn" not in target.groups  # a DDPM has classes, which are always named
        params = ("xattn" if named else "noxattn") if self.params == "auto" else self.params
        own: dict[str, Any] = {"steps": 1000, "lr": 1e-5, "eta": 1.0, "guidance": 3.0}
        if "text_encoder_2" in target.modules:  # SDXL
            own = {"steps": 200, "lr": 2e-4 if params == "xattn" else 1e-5, "eta": 0.0, "guidance": 2.0}
        return replace(self, params=params, **{name: value for name, value in own.items() if getattr(self, name) == "auto"})

    def run(self, target: Denoiser, task: Task) -> Iterator[Row]:
        w = target.trainable(self.params)  # theta
        old = target.frozen(w)  # theta_0
        opt, eta = torch.optim.Adam(w.values(), lr=float(self.lr)), float(self.eta)
        concepts = [t.format(c) for c in task.concepts for t in self.templates] or list(task.said)
        said = [self.erase_from] * len(concepts) if self.erase_from else concepts
        keep = list(self.preserved)
        with torch.no_grad():
            c, null, shown = old.encode(concepts), old.null(), old.encode(said)
            held = old.encode(keep) if keep else null  # c~
        text_trains = any(n.startswith("text_encoder") for n in w)
        how: dict[str, Any] = {
            "size": max(self.pool, len(said)) if self.pool and self.templates else self.pool, "refresh": self.refresh,
            "batch": self.batch, "guidance": float(self.guidance), "steps": self.sampler_steps,
            "scheduler": target.scheduler if self.sampler == "pipeline" else None,
        }  # fmt: skip
        pool, kept = TrajectoryPool(), TrajectoryPool()

        for _ in target.steps(int(self.steps), opt, pool, *([kept] if keep else [])):
            model, seen = target if self.x_from == "current" else old, shown
            if text_trains and model is target:
                with torch.no_grad():
                    seen = target.encode(said)  # what the model in training makes of the prompts
            x_t, t, k = states(model, pool, seen, null, **how)  # (B, 4, h, w), (B,), (B,): x_t ~ p(. | c)
            t = self.told(t, target.train_steps)
            with torch.no_grad():
                e_0, e_c = old.eps(x_t, t, null.repeat(len(k))), old.eps(x_t, t, c[k])
                away = e_c - e_0
                e_from = old.eps(x_t, t, shown[k]) if self.erase_from else e_c
                goal = e_from - (1 + eta) * away  # = e_0 - eta away, without erase_from
            student = target.encode([said[i] for i in k]) if text_trains else shown[k]
            e = target.eps(x_t, t, student)
            loss = F.mse_loss(e.float(), goal.float())
            row = {"loss": loss.item(), "distance": ((e.detach() - e_from).norm() / e_from.norm()).item()}
            if keep:
                x_t, t, k = states(old, kept, held, null, **how | {"size": len(keep) if self.pool else 0})  # x~_t ~ p(. | c~)
                t = self.told(t, target.train_steps)
                with torch.no_grad():
                    goal = old.eps(x_t, t, held[k])
                student = target.encode([keep[i] for i in k]) if text_trains else held[k]
                stays = F.mse_loss(target.eps(x_t, t, student).float(), goal.float())
                loss, row["stays"] = loss + self.hold * stays, stays.item()
            opt.zero_grad()
            loss.backward()
            opt.step()
            yield row

    def told(self, t: Tensor, train_steps: int) -> Tensor:
        """The times that the network is told of states at ``t`` (B,)."""
        if self.time == "grid":
            return t
        width = max(1, train_steps // self.sampler_steps)
        shift = torch.randint(width, t.shape) - (width // 2 if self.time == "centered" else 0)
        return (t + shift.to(t.device)).clamp(0, train_steps - 1)
