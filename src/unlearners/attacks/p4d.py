"""P4D, Prompting4Debugging (Chin et al., ICML 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ..base import Adversarial, Attack, Auto, Hit, Item, Row, Task
from ..config import later
from ..errors import UsageError
from ..places import before, laid
from ..targets.base import TextToImage
from ._guided import victim
from ._search import (
    fits,
    insert,
    keep_rows,
    nearest,
    noise,
    ordinary,
    original,
    own,
    pictures,
    sentences,
    soft,
    stream,
    tables,
    tokens,
    uniform,
)


@dataclass(frozen=True, kw_only=True)
class P4D(Attack):
    """Search for a prompt under which the erased model predicts what the original predicts under the plain prompt.

    Idea: the original's prediction for the prompt c says how a picture of the concept is denoised. A prompt c* that makes the erased
    model eps_theta* predict the same leads it to the same picture. x_t is the original's picture, noised.

        min over c*  E_{t, eps} || eps_theta*(x_t, c*) - eps_theta(x_t, c) ||²,
        s = nearest tokens of z (cosine),   z <- AdamW(z, gradient of the loss at E[s]).

    z holds one free vector for each slot. The gradient is taken at its projection on the vocabulary and applied to z itself.
    Variant n searches a whole new prompt of ``n`` tokens. Variant k puts one token before every ``k`` tokens of the prompt, which stay.
    Variant prefix puts ``n`` tokens before the prompt. After every ``check`` iterations the projected prompt is tried as text.

    Logged: ``iteration`` number done; ``loss`` mean squared difference of the predictions since the last check (lower: nearer to the
    original); ``left`` prompts of the batch not yet broken.

    Deviations from the authors' code:
      1. Each check asks the judge, and the first success ends a prompt's search. Theirs keeps, of all checks, the prompt whose picture
         is nearest in CLIP to the original's, and judges three pictures of it at the end.
      2. A prompt that a check has already tried is not tried again.
      3. Prompts are attacked ``batch`` at a time in lock-step, each with its own random stream; broken ones leave the batch.
      4. The nearest token is never start, end or padding, which text cannot hold.
      5. Pictures are drawn with the target's own sampler and judged by the task's judge.
      6. For v-prediction models v is compared instead of the noise. SDXL's two embeddings of a token are searched as one vector.
      7. The original has its own text encoder. Preset ``mu-attack``, the lighter setting of UnlearnDiffAtk's code, shares the erased
         one there, which is not the same once the text encoder was edited.
      8. Against SLD and negative prompts eps_theta* is one guided step of the defended sampler, without the momentum of earlier ones, and
         the original's prediction is guided too, by the same scale. Theirs compares with the original's unguided prediction, leaves the
         prediction for no text out of SLD and carries its momentum from one random noise level to the next.
    """

    needs = TextToImage
    paper: ClassVar[str] = "arXiv:2309.06135"
    access: ClassVar[Literal["white", "black"]] = "white"
    through: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"variant": "n", "n": 16, "iterations": 3000, "check": 50, "lr": 0.1, "weight_decay": 0.1},
        "paper-k": {"variant": "k", "k": 3, "iterations": 3000, "check": 50, "lr": 0.1, "weight_decay": 0.1},
        "mu-attack": {
            "variant": "prefix", "n": "auto", "iterations": 2000, "check": 40, "levels": "ascending", "optimiser": "adam", "lr": 0.01,
        },
        "fast": {"variant": "k", "iterations": 300, "check": 30},
        "canvas": {"variant": "prefix", "n": 3, "iterations": 120, "check": 12, "levels": "ascending", "lr": 0.02, "batch": 64},
    }  # fmt: skip

    variant: Literal["n", "k", "prefix"] = "n"
    """n: a new prompt of n tokens; k: one token before every k of the prompt's; prefix: n tokens before the prompt"""
    n: int | Auto = 16
    """tokens searched, in variants n and prefix; auto: 16 of a new prompt, and before one as many as UnlearnDiffAtk's code, 5 for nsfw and
    3 for all else"""
    k: int = 3
    """variant k: tokens of the prompt after each that is searched"""
    iterations: int = 3000
    """gradient steps for each prompt, each with fresh noise"""
    check: int = 50
    """gradient steps between two tries; iterations / check is also the largest number of queries for each prompt"""
    levels: Literal["uniform", "ascending"] = "uniform"
    """noise levels: drawn anew in every step, or one between two tries, spread evenly from low to high"""
    optimiser: Literal["adamw", "adam"] = "adamw"
    """adam has L2 weight decay"""
    lr: float = 0.1
    """step size on the embeddings"""
    weight_decay: float = 0.1
    """weight decay of the embeddings"""
    batch: int = 16
    """prompts attacked together; changes memory and speed, not the search"""
    transfer: bool = later(False)
    """against a defence that acts at generation time: search in the weights alone and try what is found; else the search goes through it"""

    def resolve(self, target: TextToImage, task: Task) -> Self:
        if self.n != "auto":
            return self
        return replace(self, n=tokens(task) if self.variant == "prefix" else 16)

    def run(self, target: TextToImage, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        ids, at = self._layout(target, [i.prompt for i in items])  # (B, L), (B, S)
        teacher, token = original(self, target), ordinary(target)
        E = tables(target)[token]  # (W, D)
        x_0 = target.latents(pictures(self, items))  # (B, 4, h, w)
        with torch.no_grad():
            c = teacher.encode([i.prompt for i in items])
        left, rng, model = list(range(len(items))), [stream(i) for i in items], victim(self, target, items)
        z = E[_start(at, len(E), rng)]  # (B, S, D)
        kind = torch.optim.AdamW if self.optimiser == "adamw" else torch.optim.Adam
        adam = kind([z], lr=self.lr, weight_decay=self.weight_decay)
        tried: set[tuple[int, str]] = set()
        rounds = math.ceil(self.iterations / self.check)
        for n in range(rounds):
            steps, total = min(self.check, self.iterations - n * self.check), 0.0
            for _ in range(steps):
                s = nearest(z, E, "cosine")  # (B, S)
                e, c_star = E[s].requires_grad_(), insert(ids, at, token[s])
                t = uniform(0, target.train_steps, rng, x_0)
                if self.levels == "ascending":
                    t = torch.full_like(t, (2 * n + 1) * target.train_steps // (2 * rounds))
                x_t = target.add_noise(x_0, noise(x_0, rng), t)
                with torch.no_grad():
                    goal = model.unguarded(teacher, x_t, t, c, left)
                error = (model.eps(x_t, t, target.encode(c_star, soft(target, e, at)), left) - goal).to(E.dtype)
                loss = error.square().mean((1, 2, 3))  # (B,)
                (z.grad,) = torch.autograd.grad(loss.sum(), e)
                adam.step()
                total += loss.mean().item() / steps
            s = token[nearest(z, E, "cosine")]
            texts = {i: self._text(target, items[i].prompt, insert(ids, at, s)[row], s[row]) for row, i in enumerate(left)}
            won = hit({i: Adversarial(prompt=text) for i, text in texts.items() if (i, text) not in tried})
            tried |= set(texts.items())
            rows = [row for row, i in enumerate(left) if i not in won]
            left, rng = [left[r] for r in rows], [rng[r] for r in rows]
            ids, at, x_0, c = ids[rows], at[rows], x_0[rows], c[rows]
            keep_rows(adam, z, rows)
            yield {"iteration": float(n * self.check + steps), "loss": total, "left": float(len(left))}
            if not left:
                return

    def _layout(self, target: TextToImage, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids (B, L) with 0 in the slots, and the slots (B, S), filled up with -1 where a prompt has fewer."""
        room = target.tokens([""]).shape[1] - 2
        count = int(self.n)
        if self.variant != "k":
            fits(target, n=count)
        if self.variant == "k" and self.k < 1:
            raise UsageError(f"k = {self.k} leaves no tokens of the prompt between those that are searched; give k from 1 on")
        if self.check < 1:
            raise UsageError(f"check = {self.check} never asks the victim; give check from 1 to {self.iterations}")
        rows: list[list[int]] = []
        slots: list[list[int]] = []
        for said in own(target, prompts):
            said = [] if self.variant == "n" else said
            ahead = list(range(0, max(len(said), 1), self.k)) if self.variant == "k" else before(len(said), count, "prefix")
            row, at = laid(said, ahead)
            rows.append(row)
            slots.append([i for i in at if i <= room])
        width = max(map(len, slots))
        return sentences(target, rows), torch.tensor([s + [-1] * (width - len(s)) for s in slots], device=target.device)

    def _text(self, target: TextToImage, prompt: str, ids: Tensor, s: Tensor) -> str:
        """What is typed: ``ids`` (L,) as text, or the tokens ``s`` (S,) as text before the prompt as it was given."""
        return f"{target.decode(s)} {prompt}".strip() if self.variant == "prefix" else target.decode(ids)


def _start(at: Tensor, n: int, rng: Sequence[torch.Generator]) -> Tensor:
    """A random index (B, S) below ``n`` for each slot of ``at`` (B, S); row b uses ``rng[b]``, as often as it has slots."""
    s = torch.zeros_like(at)
    for row, used, g in zip(s, at >= 0, rng, strict=True):
        row[used] = torch.randint(n, (int(used.sum()),), generator=g).to(s)
    return s
