"""EraseDiff."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from .. import optim
from ..base import Auto, Method, Row, Task
from ..errors import UsageError
from ..latents import Asked
from ..targets.base import Denoiser, Learner, TextToImage
from . import _gradients as gradients
from ._learn import least
from ._mask import Masked, first

POKEMON = "a photo of a pokemon"


@dataclass(frozen=True, kw_only=True)
class EraseDiff(Method, Masked):
    """EraseDiff (Wu et al., CVPR 2025): keep the retained loss low among the models for which the concept says something else.

    Idea: a constrained problem with value function q, solved by first-order steps (BOME).

        min over theta of L_r(theta)   subject to   q(theta) = f(theta) - f* <= 0
        f(theta) = E_{D_f} ||eps_theta(x_t, t, c) - stopgrad eps_theta(x_t, t, c')||^2,   f* = min f
        theta <- theta - lr (grad L_r + lambda grad f)
        rule paper:    lambda = max(0, (eta - <grad L_r, grad f>) / ||grad f||^2)
        rule cosine:   lambda = max(0, eta - cos(grad L_r, grad f))
        rule constant: lambda is a setting

    with L_r the family's own loss on D_r and c' another condition. An epoch estimates f* by K passes over D_f on f alone, puts theta back,
    and then takes its steps. f* is a number without a gradient: where the optimizer's state is put back too, the K passes change nothing
    but ``q`` in the log and the random numbers, and ``inner=0`` leaves them out.

    Logged: ``loss`` is L_r + lambda f; ``retain`` is L_r, ``forget`` is f, ``q`` is f - f*, ``lambda`` its weight. In the K passes
    ``loss`` and ``inner`` are f.

    Deviations from the authors' code:
    1. The optimizer's state is put back with theta. In the code it is not, so that the steps start with moments along grad f
       (``restore=False``; preset ``release``).
    2. lambda follows the paper's rule. The Stable Diffusion code takes a constant, the class-conditional code has a branch with the cosine.
    3. theta is put back once, after all K passes. The Stable Diffusion code alternates passes and steps K times and returns to the start
       of the epoch each time, so all but the last of those steps are lost.
    4. Batches are drawn without replacement; the code starts the loader anew for each. eta is 0.1, the code's default.
    5. An epoch has as many steps as D_f has batches, as in the Stable Diffusion code.
    6. On class-conditional models c' is another class for each image; the code draws one for the batch. L_r drops a tenth of the labels,
       as training does; the code none. No moving average is kept.
    7. c' is the task's anchor where it has one; without one it is the code's fixed prompt on Stable Diffusion.
    8. Classifiers and dual encoders, which the paper has not, have as f their loss on wrong labels. fast and canvas are ours.
    """

    paper: ClassVar[str] = "arXiv:2401.05779"
    needs: ClassVar[type] = Learner
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "release": {"rule": "auto", "restore": False},
        "imagenette": {"rule": "constant", "restore": False, "lamb": 1.0, "epochs": 2, "inner": 1, "batch": 16},
        "fast": {"epochs": 2, "inner": 0},
        "canvas": {"eta": 0.012, "epochs": 1, "inner": 0, "steps": 60, "batch": 16, "lr": 1e-4, "pictures": 96, "pseudo": ""},
    }

    params: str = "auto"
    """weights to train. auto: full, and noxattn for the kind nsfw on Stable Diffusion"""
    rule: Literal["auto", "paper", "cosine", "constant"] = "paper"
    """how lambda is chosen. auto: as the release has it, constant on text-to-image models and cosine on others"""
    lamb: float | Auto = "auto"
    """lambda of the constant rule; larger values forget more. auto: 1 for the kind nsfw on Stable Diffusion, else 0.1"""
    eta: float = 0.1
    """of the rules paper and cosine; larger values forget more"""
    inner: int = 2
    """K, passes over D_f that estimate f* in each epoch; 0 takes f* = 0"""
    restore: bool = True
    """put the optimizer's state back together with theta"""
    pseudo: str = "auto"
    """c' as a prompt; empty: the anchor, else a prompt or class that stays. auto: the code's prompt on text-to-image without an anchor"""
    labels: Literal["other", "any", "next"] = "other"
    """c' where it is a class or one of several prompts: uniform over the others, uniform over all, or the next"""
    epochs: int | Auto = "auto"
    """rounds of K passes and steps. auto: 8 on class-conditional diffusion, else 5"""
    steps: int = 0
    """steps with L_r in each epoch; 0: one pass over D_f"""
    batch: int | Auto = "auto"
    """images of each set in each step. auto: 8 on Stable Diffusion (16 for the kind nsfw), else 128"""
    lr: float | Auto = "auto"
    """learning rate. auto: 1e-5 on Stable Diffusion, else 1e-4"""
    optimizer: optim.Optimizer = "adam"
    """sgd, adam or adamw"""
    clip: float | Auto = "auto"
    """largest gradient norm; 0 does not clip. auto: 1 on class-conditional diffusion, else 0"""
    norm: Literal["update", "freeze"] = "update"
    """whether batch normalization uses and updates its batch statistics, or keeps the original's"""
    pictures: int = 800
    """images of each side that a text-to-image model generates itself when the task names none"""

    def __post_init__(self) -> None:
        self.masking()
        if least(self.epochs, self.batch, self.pictures) < 1 or least(self.steps, self.inner, self.lamb, self.clip) < 0:
            raise UsageError("epochs, batch and pictures must be at least 1, and steps, inner, lamb and clip at least 0")

    def resolve(self, target: Any, task: Task) -> Self:
        text, nsfw = isinstance(target, TextToImage), task.kind == "nsfw"
        classes = isinstance(target, Denoiser) and not text  # class-conditional diffusion
        known: dict[str, Any] = {
            "params": "noxattn" if text and nsfw else "full",
            "rule": "constant" if text else "cosine",
            "lamb": 1.0 if text and nsfw else 0.1,
            "pseudo": POKEMON if text and not task.anchors else "",
            "epochs": 8 if classes else 5,
            "batch": (16 if nsfw else 8) if text else 128,
            "lr": 1e-5 if text else 1e-4,
            "clip": 1.0 if classes else 0.0,
        }
        return replace(self, **{k: v for k, v in known.items() if getattr(self, k) == "auto"})

    def run(self, target: Learner, task: Task) -> Iterator[Row]:
        if self.pseudo and not isinstance(target, TextToImage):
            raise UsageError(f"pseudo is a prompt and a {type(target).__name__} has none; leave it empty")
        asked, batch = Asked(pictures=self.pictures), int(self.batch)
        forget = target.forgotten(task, asked)
        D_f, D_r = forget.loader(batch), target.retained(task, asked).loader(batch)
        w = target.trainable(self.params)  # theta
        freeze, spent = self.freeze(target, lambda: forget, w, batch)
        opt = optim.make(self.optimizer, w.values(), lr=float(self.lr))
        target.train(self.norm)
        moving = [*w.values(), *(b for m in target.modules.values() for b in m.buffers())]
        start, inner, outer = _Start(), self.inner * len(D_f), self.steps or len(D_f)

        for i in target.steps(int(self.epochs) * (inner + outer), opt, D_f, D_r, start):
            at = i % (inner + outer)
            if at == 0:
                start.keep(moving, opt)
            if at == inner > 0:
                start.put_back(moving, opt if self.restore else None)
            if at < inner:
                f = target.loss(self.other(target, D_f.draw()))
                g = gradients.of(f, w)
                if at >= inner - len(D_f):
                    start.f.append(f.item())
                row = {"loss": f.item(), "inner": f.item()}
            else:
                L_r, f = target.loss(D_r.draw()), target.loss(self.other(target, D_f.draw()))
                g_r, g_f = gradients.of(L_r, w), gradients.of(f, w)
                lam = self.weight(g_r, g_f)
                g = gradients.add(g_r, g_f, lam)
                q = f.item() - sum(start.f) / max(1, len(start.f))
                row = {"loss": L_r.item() + lam * f.item(), "retain": L_r.item(), "forget": f.item(), "lambda": lam, "q": q}
            gradients.put(g, w)
            freeze.gradients()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(w.values(), float(self.clip))
            opt.step()
            freeze.restore()
            yield row | first(i, spent)

    def other(self, target: Learner, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """``batch`` of D_f, whose loss is then f."""
        return {**batch, "toward": [self.pseudo] * len(batch["prompt"])} if self.pseudo else target.relabel(batch, self.labels)

    def weight(self, g_r: Sequence[Tensor], g_f: Sequence[Tensor]) -> float:
        """lambda for the gradients of L_r and f."""
        if self.rule == "constant":
            return float(self.lamb)
        if self.rule == "cosine":
            return max(0.0, self.eta - gradients.cosine(g_r, g_f))
        size = gradients.dot(g_f, g_f)
        return max(0.0, (self.eta - gradients.dot(g_r, g_f)) / size) if size else 0.0  # 0: f is at its minimum


class _Start:
    """Where an epoch began: weights, buffers and the optimizer's state; and the losses ``f`` of the last of its K passes."""

    def __init__(self) -> None:
        self.moving: list[Tensor] = []
        self.opt: dict[str, Any] = {}
        self.f: list[float] = []

    def keep(self, moving: Sequence[Tensor], opt: Any) -> None:
        self.moving, self.opt, self.f = [t.detach().clone() for t in moving], deepcopy(opt.state_dict()), []

    @torch.no_grad()
    def put_back(self, moving: Sequence[Tensor], opt: Any) -> None:
        for t, old in zip(moving, self.moving, strict=True):
            t.copy_(old)
        if opt:
            opt.load_state_dict(self.opt)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
