"""Forget-Me-Not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import attention
from ..base import Method, Row, Task
from ..errors import UsageError
from ..inversion import Inversion, find
from ..latents import drawn
from ..targets.base import TextToImage


@dataclass(frozen=True, kw_only=True)
class FMN(Method):
    """Forget-Me-Not (Zhang et al., CVPR Workshops 2024): starve the concept's tokens of attention.

    Stage 1, textual inversion: learn k pseudo-tokens that say what pictures x_0 of the concept show; the weights stay as they are.
    Stage 2, attention re-steering (|| · || is the norm as such, not its square):
        min over theta of || A ||,   A = [A_l(x_t, c)[head, pixel, i]]  for all cross-attention layers l, heads, pixels and i in P,
    where x_t are the same pictures, noised, c is "a photo of …" with the pseudo-tokens, A_l a layer's soft-max probabilities and P the
    positions of the concept's tokens and of the end token ("pooler"). Nothing in the loss says what is to stay; ``keep`` does.

    Pictures are the task's (``forget``), or are drawn by the original model from the concept's prompts.
    Logged: ``stage`` is 1 or 2; ``loss`` the denoising error, then the norm above; ``length`` in stage 1 the embeddings' mean length
    and ``attention`` in stage 2 the mean probability of a position in P, 1 / L over all; ``kept`` the mean squared change of what stays.

    Deviations from the authors' code:
    1. Positions are chosen row by row; theirs are wrong once the rows of a batch differ in them.
    2. ``pooler="end"`` is the end token alone, as it comes about on the authors' SD 2.1. SD 1.x pads with end tokens, and their code
       then takes all the padding: ``pooler="padding"``, in preset ``release``.
    3. The warm-up of the inversion takes place; the schedule that theirs names ignores it (preset ``release``: 0).
    4. The pseudo-tokens start as the name's tokens, as many as there are, then as noise; theirs must be listed by hand.
    5. Pictures are drawn with replacement; mirrored ones (stage 1) are mirrored latents; those of the task enter by the VAE's mean.
    6. Concepts are inverted side by side, each as it would be alone. Weights are float32. ``keep`` is ours; 0 is the paper.
    """

    paper: ClassVar[str] = "arXiv:2303.17591"
    needs: ClassVar[type] = TextToImage
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "release": {"pooler": "padding", "warmup": 0},
        "unlearncanvas-style": {"params": "xattn", "steps": 100, "lr": 2e-5, "inversion_lr": 1e-4, "pooler": "padding", "warmup": 0},
        "unlearncanvas-object": {"steps": 100, "lr": 2e-5, "inversion_lr": 1e-4, "pooler": "padding", "warmup": 0},
        "canvas": {"params": "xattn", "steps": 60, "lr": 5e-4, "batch": 8, "iterations": 100, "warmup": 10, "inversion_lr": 1e-2},
    }

    params: str = "full"
    """weights to train: full (the whole UNet), xattn, another group or a regular expression"""
    steps: int = 35
    """optimiser steps on the attention"""
    lr: float = 2e-6
    """learning rate of AdamW on the attention; too high a rate ruins the model"""
    weight_decay: float = 0.01
    """weight decay of AdamW on the attention"""
    clip: float = 1.0
    """largest norm of the gradient; 0 does not clip"""
    batch: int = 1
    """pictures in each update, for each concept in stage 1; fewer take less memory"""
    pooler: Literal["end", "padding", "off"] = "end"
    """also starve the first end token, every one (SD 1.x pads with them), or none"""
    pictures: int = 8
    """pictures drawn for each concept where the task names none; 0 trains on pure noise levels of a zero latent, without inversion"""
    template: str = ""
    """the prompt, with {} for the concept; empty: "a photo of {}", and "a photo in the style of {}" for styles"""
    inversion: bool = True
    """learn pseudo-tokens first; without, the task's prompts are used and the concept's own tokens starved"""
    k: int = 4
    """pseudo-tokens for each concept"""
    iterations: int = 500
    """optimiser steps of the inversion"""
    inversion_lr: float = 1e-3
    """learning rate of AdamW on the embeddings"""
    inversion_decay: float = 0.1
    """weight decay of AdamW on the embeddings"""
    warmup: int = 100
    """steps until the inversion's full learning rate"""
    norm: float = 0.4
    """length toward which the embeddings go; 0 leaves it free"""
    keep: float = 0.0
    """weight of ||eps_theta(x_t, p) - eps_0(x_t, p)||², averaged, on drawn pictures of the task's preserved prompts p"""
    keep_pictures: int = 16
    """pictures drawn for ``keep``"""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.k, self.iterations, self.keep_pictures) < 1 or min(self.pictures, self.clip, self.keep) < 0:
            raise UsageError("steps, batch, k, iterations and keep_pictures must be at least 1, and pictures, clip and keep at least 0")
        if self.inversion and not self.pictures:
            raise UsageError("the inversion learns from pictures; set pictures to 8, or inversion to false")
        if self.template and self.template.count("{}") != 1:
            raise UsageError("the template needs one {} where the concept goes, for example 'a photo of {}'")

    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        target.differentiable()
        template = self.template or ("a photo in the style of {}" if task.kind == "style" else "a photo of {}")
        said = task.prompts or tuple(template.format(c) for c in task.concepts)
        x, of = self.shown(target, task, said)  # (N, 4, h, w), (N,) the concept that each picture shows
        pull: dict[str, Any] = {"warmup": self.warmup, "norm": self.norm, "weight_decay": self.inversion_decay}
        ti = Inversion(target, task.concepts, template=template, k=self.k, lr=self.inversion_lr, **pull)
        prompts = [(ti.prompt, c) for c in range(len(task.concepts))] if self.inversion else [(p, names(task, p)) for p in said]
        P = torch.stack([self.positions(target, task, p, ti.slots if self.inversion else []) for p, _ in prompts])  # (prompts, L)
        w = target.trainable(self.params)  # theta
        stays = self.stays(target, task, template, w) if self.keep else None
        opt = torch.optim.AdamW(w.values(), lr=self.lr, weight_decay=self.weight_decay)
        first = self.iterations if self.inversion else 0

        for i in target.steps(first + self.steps, ti, opt):
            if i < first:
                rows = torch.cat([some(of == c, self.batch) for c in range(len(task.concepts))])
                mirrored = (torch.rand(len(rows)) < 0.5).view(-1, 1, 1, 1).to(x.device)
                error = ti.step(torch.where(mirrored, x[rows].flip(-1), x[rows]), of[rows].to(x.device))
                yield {"stage": 1.0, "loss": error, "length": ti.length()}
                continue
            s = torch.randint(len(prompts), (self.batch,))
            who = torch.tensor([prompts[j][1] for j in s])  # (B,) the concept that each prompt names
            x_0 = x[torch.cat([some(of == c, 1) for c in who])]
            c = target.encode([prompts[j][0] for j in s], ti.soft(who.to(x.device)) if self.inversion else None)
            with attention.explicit(target.modules["unet"]) as probabilities:
                target.eps(*noised(target, x_0), c)
            loss = (A := attention.at(probabilities, P[s].to(x.device))).norm()
            if not loss.requires_grad:
                raise UsageError(f"the attention does not depend on the weights of '{self.params}'; use params full or xattn")
            row = {"stage": 2.0, "loss": loss.item(), "attention": A.mean().item()}
            if stays:
                loss, row["kept"] = loss + self.keep * (change := stays()), change.item()
            opt.zero_grad()
            loss.backward()
            if self.clip:
                torch.nn.utils.clip_grad_norm_(w.values(), self.clip)
            opt.step()
            yield row

    def shown(self, target: TextToImage, task: Task, said: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Latents (N, 4, h, w) of pictures of the concepts, and which concept each shows (N,): the task's, drawn ones, or zeros."""
        n = len(task.concepts)
        if task.forget.source:
            found = target.open(task.forget)
            x, of = found.latent, torch.tensor([names(task, p) for p in found.prompts])
        elif self.pictures:
            own = [[p for p in said if names(task, p) == c] or [task.concepts[c]] for c in range(n)]
            x = torch.cat([drawn(target, prompts, self.pictures).latent for prompts in own])
            of = torch.arange(n).repeat_interleave(self.pictures)
        else:
            x, of = torch.zeros(n, *target.latent_shape), torch.arange(n)
        if missing := [name for c, name in enumerate(task.concepts) if not (of == c).any()]:
            raise UsageError(f"no picture of the task shows '{missing[0]}'; name it in 'forget', or leave it out of the concepts")
        return x.to(target.device, target.embed().dtype), of

    def positions(self, target: TextToImage, task: Task, prompt: str, slots: Sequence[int]) -> Tensor:
        """P (L,), true where attention is starved: the pseudo-tokens or the concept's own (all words if it has none), and the end."""
        ids = target.tokens([prompt])[0].cpu()
        name, chosen = task.concepts[names(task, prompt)], torch.zeros(len(ids), dtype=torch.bool)
        chosen[list(slots) or find(target, prompt, name if within(name, prompt) else prompt)] = True
        ends = (ids == target.tokens([""])[0, 1].cpu()).nonzero().flatten()
        chosen[{"end": ends[:1], "padding": ends, "off": ends[:0]}[self.pooler]] = True
        return chosen

    def stays(self, target: TextToImage, task: Task, template: str, w: Iterable[str]) -> Callable[[], Tensor]:
        """What ``keep`` weighs, on a new batch at each call."""
        old = target.frozen(w)  # theta_0
        seen = drawn(target, [template.format(p) for p in task.preserve] or [""], self.keep_pictures)

        def change() -> Tensor:
            rows = torch.randint(len(seen), (self.batch,))
            prompts = [seen.prompts[i] for i in rows]
            x_t, t = noised(target, seen.latent[rows].to(target.device))
            with torch.no_grad():
                e_0 = old.eps(x_t, t, old.encode(prompts))
            return (target.eps(x_t, t, target.encode(prompts)) - e_0).float().square().mean()

        return change


def within(name: str, prompt: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt, re.IGNORECASE) is not None


def names(task: Task, prompt: str) -> int:
    """The number of the concept that ``prompt`` names, the longest if several; 0 when it names none, as "storm" does for "lightning"."""
    found = [c for c, name in enumerate(task.concepts) if within(name, prompt)]
    return max(found, key=lambda c: len(task.concepts[c]), default=0)


def some(where: Tensor, n: int) -> Tensor:
    """``n`` row numbers drawn from those where ``where`` (N,) holds, with replacement."""
    rows = where.nonzero().flatten()
    return rows[torch.randint(len(rows), (n,))]


def noised(target: TextToImage, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """x_t for latents x_0 (B, 4, h, w) and t (B,), uniform."""
    t = target.process.draw(len(x_0), device=x_0.device)
    return target.add_noise(x_0, torch.randn(x_0.shape).to(x_0), t), t
