"""Concept Ablation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from .. import neighbours, optim, saliency
from ..base import Auto, Method, Row, Task
from ..config import later
from ..errors import UsageError
from ..latents import drawn, instead
from ..targets.base import TextToImage
from ..tasks import OBJECTS, SCENES, STYLES

SAYS: dict[str, tuple[str, ...]] = {
    "style": (
        "an image in {} style",
        "a {} picture",
        *(f"a {o} in {{}} style" for o in OBJECTS),
        *(f"{{}} image of a {o}" for o in OBJECTS),
    ),
    "object": ("a {}", "an image of a {}", *(f"a photo of a {{}} {s}" for s in SCENES), *(f"a {{}} in {s} style" for s in STYLES)),
    "identity": ("{}", "a picture of {}", "a portrait of {}", *(f"a photo of {{}} {s}" for s in SCENES)),
    "nsfw": ("{}", "a photo of {}", *(f"{{}} {s}" for s in SCENES)),
}
"""phrases with {} for the concept or its anchor, by kind of concept"""
RECIPE: Mapping[str, Any] = {"params": "xattn-kv", "steps": 100, "lr": 2e-6, "prior": 0.0}
NUDITY: Mapping[str, Any] = {"params": "attn", "steps": 400, "lr": 4e-6, "prior": 1.0}


@dataclass(frozen=True, kw_only=True)
class ConceptAblation(Method):
    """Concept Ablation (Kumari et al., ICCV 2023): make a concept's prompt draw what its anchor's prompt draws.

    Idea: the model is to take "Grumpy Cat" for "cat". With pictures x that the model itself drew from the anchor's prompt c,
    and c* the same prompt with the concept in the anchor's place, minimise

        E ||stopgrad eps_theta(x_t, c, t) - eps_theta(x_t, c*, t)||^2 + lambda E ||eps - eps_theta(x_t, c, t)||^2

    (model-based; noise-based has the noise eps itself for the first target). lambda is ``prior``. The target is of the model in
    training, without gradient, so no second model is held. Pictures are drawn once and kept as latents.

    Logged: ``loss`` is the objective; ``ablate`` its first term; ``preserve`` the second, without lambda, where there is one.

    Deviations from the authors' code:
    1. Their 200 prompts come from a language model or a caption search; ours from phrases by kind of concept and the task's own.
    2. The paper's 100 steps of 4 pictures on two GPUs are 100 steps of 8 here, at the same lr, 2e-6 for each picture of a batch.
    3. A concept without an anchor gets the empty prompt's. Several concepts take turns in the list of prompts.
    4. Group ``embedding`` moves the rows of the concepts' own tokens alone, those of no anchor among them; every other row keeps its
       bits. On SDXL that is in both encoders.
    5. For memorised pictures theirs drops drawn pictures that resemble the memorised one, which nobody has here to compare with.
    6. Pictures are not mirrored, moved or scaled; a latent is the sampler's own and does not go through the VAE.
    """

    paper: ClassVar[str] = "arXiv:2303.13516"
    needs: ClassVar[type] = TextToImage
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"anchors": ()},
        "noise": {"anchors": (), "variant": "noise"},
        "memorised": {**RECIPE, "anchors": (), "params": "full", "steps": 400, "lr": 5e-7},
        "nudity": {**NUDITY, "anchors": ()},
        "unlearncanvas-style": {**RECIPE, "anchors": (), "steps": 1000, "batch": 4, "pictures": 200},
        "unlearncanvas-object": {**RECIPE, "anchors": (), "steps": 2000, "batch": 4, "pictures": 80},
        "canvas": {**RECIPE, "anchors": (), "lr": 3e-5, "pictures": 100},
    }

    params: str = "auto"
    """weights to train: xattn-kv, attn, full, embedding (of the concepts' tokens), another group or a regular expression; auto is the
    paper's: attn for nsfw (nudity), xattn-kv for all else"""
    variant: Literal["model", "noise"] = "model"
    """what eps_theta(x_t, c*) is to become: eps_theta(x_t, c), or the noise in the anchor's picture"""
    steps: int | Auto = "auto"
    """optimiser steps; auto is the paper's: 400 for nsfw, 100 for all else"""
    batch: int = 8
    """pictures in each step"""
    lr: float | Auto = "auto"
    """learning rate for each picture of a batch: the optimiser gets batch times as much; auto is the paper's: 4e-6 for nsfw, else 2e-6"""
    optimizer: optim.Optimizer = "adamw"
    """sgd, adam or adamw"""
    weight_decay: float = 0.01
    """weight decay"""
    prior: float | Auto = "auto"
    """lambda, the weight of the anchor's own pictures and prompts; auto is the authors': 1 for nsfw, 0 for all else"""
    pictures: int = 1000
    """pictures of the anchors that the model draws"""
    prompts: tuple[str, ...] = ()
    """phrases with {} for the concept and its anchor; empty chooses them by the kind of concept and adds the task's"""
    anchors: tuple[str, ...] | Auto = later("auto")
    """words that take turns as the anchor, a phrase each; auto chooses neighbours of the concept for --concept without --anchor; empty: the
    task's anchor"""

    def __post_init__(self) -> None:
        steps, prior = 1 if self.steps == "auto" else self.steps, 0 if self.prior == "auto" else self.prior
        if min(steps, self.batch, self.pictures) < 1 or prior < 0:
            raise UsageError("steps, batch and pictures must be at least 1, and prior at least 0")
        if any("{}" not in p for p in self.prompts):
            raise UsageError("each prompt needs {} where the concept goes, for example 'an image of {}'")

    def resolve(self, target: TextToImage, task: Task) -> Self:
        recipe = NUDITY if task.kind == "nsfw" else RECIPE
        own = {name: value for name, value in recipe.items() if getattr(self, name) == "auto"}
        if self.anchors == "auto":
            chosen = not neighbours.named(task, "anchors") and "anchors" in task.usual and task.kind in neighbours.KINDS
            own["anchors"] = neighbours.choose(target, task).guide if chosen else ()
        return replace(self, **own)

    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        target.differentiable()
        concepts, anchors = self.pairs(task)  # c*, c: the same prompts with the concept and with its anchor
        D = drawn(target, anchors, self.pictures).loader(self.batch)  # x ~ p(. | c); picture i has prompt i mod len(anchors)
        w = target.trainable(self.params)  # theta
        free = saliency.Freeze(w, {n: self.moves(n, p, target, task) for n, p in w.items()})
        opt = optim.make(self.optimizer, w.values(), lr=float(self.lr) * self.batch, weight_decay=self.weight_decay)
        text_trains = any(n.startswith("text_encoder") for n in w)
        with torch.no_grad():
            said = target.encode(list(concepts)), target.encode(list(anchors))

        prior = float(self.prior)
        for _ in target.steps(int(self.steps), opt, D):
            if text_trains:
                said = target.encode(list(concepts)), target.encode(list(anchors))
            k, x_t, t, noise = self.noised(target, D.draw(), len(anchors))  # (B,), (B, 4, h, w), (B,), (B, 4, h, w)
            c_star, c = said[0][k], said[1][k]
            with torch.no_grad():
                goal = target.eps(x_t, t, c) if self.variant == "model" else noise
            ablate = F.mse_loss(target.eps(x_t, t, c_star).float(), goal.float())
            parts = {"ablate": ablate}
            if prior:
                k, x_t, t, noise = self.noised(target, D.draw(), len(anchors))
                parts["preserve"] = F.mse_loss(target.eps(x_t, t, said[1][k]).float(), noise.float())
            loss = ablate + prior * parts["preserve"] if prior else ablate
            opt.zero_grad()
            loss.backward()
            free.gradients()
            opt.step()
            free.restore()
            yield {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}

    def noised(self, target: TextToImage, batch: Mapping[str, Any], prompts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which prompt each picture of ``batch`` is of, x_t, t, and what a network that knew the picture would predict (noise, or v)."""
        x_0 = batch["latent"]
        noise, t = torch.randn_like(x_0), target.process.draw(len(x_0), device=x_0.device)
        return batch["rows"] % prompts, target.add_noise(x_0, noise, t), t, target.goal(x_0, noise, t)

    def pairs(self, task: Task) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Prompts of the concepts and, one for one, of their anchors; the concepts take turns."""
        says = self.prompts or SAYS.get(task.kind, SAYS["object"])
        turns = [self.anchors[j % len(self.anchors)] if self.anchors else None for j in range(len(says))]
        anchored = [
            (s, c, task.anchor(i) if turn is None else turn)
            for s, turn in zip(says, turns, strict=True)
            for i, c in enumerate(task.concepts)
        ]
        found = [(s.format(c), s.format(a) if a else "") for s, c, a in anchored]
        if not self.prompts:
            found = [*((p, instead(task, p)) for p in task.prompts), *found]
        concepts, anchors = zip(*dict(found).items(), strict=True)
        return concepts, anchors

    def moves(self, name: str, weight: Tensor, target: TextToImage, task: Task) -> Tensor:
        """Where a weight may move: everywhere, but of token embeddings only the rows of tokens that name a concept and no anchor."""
        moves = torch.ones_like(weight, dtype=torch.bool)
        if "token_embedding" not in name:
            return moves
        mine, theirs = (set(target.tokens(list(words)).flatten().tolist()) for words in (task.concepts, (*task.anchors, *self.anchors, "")))
        if not (rows := sorted(mine - theirs)):
            raise UsageError(f"every token of '{task.concepts[0]}' is also one of its anchor; give another anchor, or params xattn-kv")
        moves.fill_(False)[rows] = True
        return moves
