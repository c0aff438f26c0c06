"""Saliency unlearning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import Self

from .. import config, optim, saliency
from ..base import Auto, Method, Relabel, Row, Task
from ..errors import UsageError
from ..latents import Asked
from ..targets.base import Learner
from ._learn import least, optimizer, settled
from ._mask import Masked, first
from ._relabel import DDPM, Lessons, Order

_SD: Mapping[str, Any] = {"labels": "next", "batch": 8, "forget_batch": 8, "lr": 1e-5, "optimizer": "adam", "weight_decay": 0.0}
_NUDE, _CLOTHED = "a photo of a nude person", "a photo of a person wearing clothes"


@dataclass(frozen=True, kw_only=True)
class SalUn(Method, Masked):
    """Saliency unlearning (Fan et al., ICLR 2024): teach wrong labels, but move only the weights that matter for the forget set.

    Idea: the gradient of the forgetting loss says which weights hold what is to be forgotten; all others stay as they are.

        m = 1(|grad L(theta_0; D_f)| >= gamma),    theta = m * (theta_0 + delta) + (1 - m) * theta_0
        min over delta of E_{D_f, y' != y} L(theta; x, y') + alpha E_{D_r} L(theta; x, y)

    with L the cross-entropy; for diffusion models the first term is ||eps_theta(x_t | y) - stopgrad eps_theta(x_t | y')||^2. gamma
    keeps exactly floor(density N) of the N weights. In ``joint`` order a step draws one batch of each set, an epoch is one pass over
    D_r, and D_f begins again whenever it is used up. Outside the mask every weight keeps its bits; batch normalisation's statistics
    are no weights and move unless ``norm=freeze``. ``mask=all`` is ``rl``.

    Logged: ``loss`` is the objective of the step; ``forget`` and ``retain`` are L on its batches (sequential: one of them). The
    first row has ``mask_seconds``, and ``cached_seconds`` when they were spent by the run that wrote ``saliency_file``.

    Deviations from the authors' code:
    1. Wrong labels are wrong: y' is never y. The release draws from all K classes, so 1/K stay right (``labels=any``).
    2. One joint step with alpha, as the paper writes it. The release runs a pass over D_f and then a pass over D_r, without alpha
       (``order=sequential``). At alpha = 1 every joint step gives D_f the weight of D_r, the release's order |D_f| / |D_r| of it.
    3. The mask's pass sees the pictures as they are; the release augments them (``mask_augment=True``; preset ``release`` has all
       three). Its batches count by their size; the release overweights a short last one.
    4. Frozen means frozen: until 2026 the release masked gradients alone, and weight decay shrank the other weights to 0.89.
    5. lr 0.013 is the release's README; the paper searches 5e-4 to 5e-2 and names no choice.
    6. Preset ``ddpm`` has the release's fixed neighbour (y + 1) mod K and its retain weight, 1e-3 on an error summed over
       3 * 32 * 32 numbers, which is 3.072 on the mean that is used here. Gradients are clipped after masking, theirs before. The
       mask is of the model's own loss; theirs is of the prediction under guidance 2, each batch's gradient clipped.
    7. Stable Diffusion sees one latent of each picture, made once; the release encodes them anew in every step. y' is the task's
       anchor if it has one, else a class that stays. Preset ``sd`` counts steps: its 5 epochs are of D_f. No guidance in the mask.
    """

    paper: ClassVar[str] = "arXiv:2310.12508"
    needs: ClassVar[type] = Learner
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "classifier": {"labels": "other", "alpha": 1.0, "epochs": 10, "lr": 0.013},
        "release": {"order": "sequential", "labels": "any", "mask_augment": True, "drop": "both"},
        "mixed": {"order": "mixed", "labels": "any", "mask_augment": True},
        "short": {"order": "sequential", "epochs": 1, "batch": 128, "lr": 0.01},
        "ddpm": DDPM,
        "ddpm-release": {**DDPM, "drop": "both"},
        "sd": {**_SD, "alpha": 0.5, "steps": 600},
        "sd-nsfw": {**_SD, "alpha": 0.1, "steps": 100, "forget_prompts": (_NUDE,), "retain_prompts": (_CLOTHED,)},
        "unlearncanvas": {**_SD, "params": "xattn", "density": 0.4, "alpha": 1.0, "epochs": 2, "batch": 4, "forget_batch": 4},
        "canvas": {**_SD, "alpha": 1.0, "steps": 60, "batch": 16, "forget_batch": 16, "lr": 1e-4, "pictures": 96},
    }

    params: str = "full"
    """weights the mask is chosen from; no others move"""
    mask: saliency.Control = "saliency"
    """the most salient weights, or as controls equally many at random, the least salient (inverted), or all"""
    density: float = 0.5
    """share of the weights in the mask"""
    statistic: saliency.Statistic = "abs_sum"
    """of the batches' gradients: abs_sum |sum g| (the paper's), sum_abs |g| summed, sum_sq g^2 summed"""
    scope: saliency.Scope = "global"
    """rank all weights together, or give every tensor its share (layer)"""
    mask_augment: bool = False
    """whether the mask's pass augments the pictures (the release's)"""
    saliency_file: str = ""
    """keeps the saliency: read if there, else written, at most a byte a weight (any density in steps of 0.005) or this mask's bits"""
    labels: Relabel | Auto = "auto"
    """y': uniform over the other classes, uniform over all of them (the release's), or (y + 1) mod K"""
    drop: Literal["retain", "both"] = config.later("retain")
    """where diffusion drops one label in ten: on retained images (retain), or also in both passes of forgetting (both, the release's)"""
    order: Order = "joint"
    """joint: a batch of each set in every step; sequential: each epoch a pass over D_f, then one over D_r; mixed: both shuffled together"""
    alpha: float | Auto = "auto"
    """weight of the retained data in joint order, the only one with a weight; 0 is |D_r| / |D_f|: every example weighs the same"""
    epochs: int | Auto = "auto"
    """passes over the retained data"""
    steps: int | Auto = "auto"
    """optimiser steps; above 0 it replaces epochs"""
    batch: int | Auto = "auto"
    """retained examples in each step; in sequential order also forgotten ones"""
    forget_batch: int | Auto = "auto"
    """forgotten examples in each joint step; 0: so many that an epoch is one pass over D_f too, at least 16"""
    lr: float | Auto = "auto"
    """learning rate (the README's)"""
    optimizer: optim.Optimizer | Auto = "auto"
    """sgd, adam or adamw"""
    momentum: float = 0.9
    """momentum of sgd"""
    weight_decay: float | Auto = "auto"
    """weight decay of the weights in the mask"""
    clip: float | Auto = "auto"
    """largest gradient norm after masking; 0 does not clip"""
    norm: Literal["update", "freeze"] = "update"
    """whether batch normalisation uses and updates its batch statistics, or keeps the original's"""
    pictures: int = 800
    """pictures of each side that a text-to-image model draws itself when the task names none"""
    forget_prompts: tuple[str, ...] = ()
    """their prompts, for what is to be forgotten; y' are then ``retain_prompts``. Empty: the task's"""
    retain_prompts: tuple[str, ...] = ()
    """their prompts, for what stays; empty: the task's neighbours and anchors"""

    def __post_init__(self) -> None:
        if least(self.epochs, self.batch, self.pictures) < 1 or least(self.forget_batch, self.steps, self.clip, self.alpha) < 0:
            raise UsageError("epochs, batch and pictures must be at least 1, and forget_batch, steps, clip and alpha at least 0")
        self.masking()

    def resolve(self, target: Any, task: Task) -> Self:
        return settled(self, target, task)

    def run(self, target: Learner, task: Task) -> Iterator[Row]:
        target.differentiable()
        asked = Asked(pictures=self.pictures, forget=self.forget_prompts, retain=self.retain_prompts)
        forget, retain = target.forgotten(task, asked), target.retained(task, asked)
        lessons, clip = Lessons(self, target, forget, retain), float(self.clip)
        w = target.trainable(self.params)  # theta
        freeze, spent = self.freeze(target, lambda: forget, w, int(self.batch))
        opt = optimizer(self, w.values())
        target.train(self.norm)

        for i in target.steps(int(self.steps) or int(self.epochs) * lessons.epoch, opt, *lessons.loaders):
            loss, parts = lessons.loss(i)
            opt.zero_grad()
            loss.backward()
            freeze.gradients()
            if clip:
                torch.nn.utils.clip_grad_norm_(w.values(), clip)
            opt.step()
            freeze.restore()
            values = torch.stack([loss.detach(), *(p.detach() for p in parts.values())]).tolist()  # the device is waited for once
            yield dict(zip(["loss", *parts], values, strict=True)) | first(i, spent)
