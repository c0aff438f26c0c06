"""PH2P, prompting hard or hardly prompting (Mahajan et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..base import Adversarial, Attack, Hit, Item, Row, Task
from ..config import later
from ..errors import UsageError
from ..inversion import words
from ..judges._clip import embed_images, embed_texts
from ..targets.base import TextToImage
from ._guided import Victim, victim
from ._search import checkpoints, clip_of, fits, nearest, noise, ordinary, pictures, sentences, soft, stream, tables, uniform


@dataclass(frozen=True, kw_only=True)
class PH2P(Attack):
    """Invert the concept's picture into a prompt with the erased model's own diffusion loss, at the noise levels that carry meaning.

    Idea: what a picture shows is decided at high noise; there the loss of a prompt says whether the model reads the picture out of it.

        min over s  E_{t in [low, high), eps} || eps - eps_theta*(x_t, s) ||²,
        s = nearest tokens of z (Euclidean),   z <- L-BFGS(z, gradient of the loss at E[s])      ("delayed projection").

    x is the original's picture. z (k × D) starts as a neutral caption, filled up with random tokens.
    At each check the best new prompt since the last one is tried, by CLIP's cosine with the picture or by the loss.

    Logged: ``iteration`` number done; ``loss`` mean squared error since the last check; ``left`` prompts of the batch not yet broken.

    Deviations from the authors' code:
      1. Theirs draws a picture from every prompt and takes the one nearest to x in CLIP. Here the text itself is compared with x, or
         the loss decides, so that every picture of the victim is a counted query.
      2. The ``accumulate`` noises and noise levels of an iteration are held through its ``inner`` steps: L-BFGS compares gradients of
         one function.
      3. ``lr`` is what L-BFGS gets. Theirs multiplies 0.8 by batch and accumulation (preset ``release``: 2.4).
      4. Prompts are attacked ``batch`` at a time in one forward pass, each with its own L-BFGS and random stream; broken ones leave.
      5. The nearest token is never start, end or padding. The projection is one product with the table.
      6. For v-prediction models the goal is v. SDXL's two embeddings of a token are searched as one vector.
      7. Against SLD and negative prompts eps_theta* is one guided step of the defended sampler; theirs knows no defences.
    """

    needs = TextToImage
    paper: ClassVar[str] = "arXiv:2312.12416"
    access: ClassVar[Literal["white", "black"]] = "white"
    through: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"k": 15, "low": 500, "high": 900, "iterations": 500, "inner": 20, "accumulate": 3, "lr": 0.8},
        "release": {"lr": 2.4},
        "fast": {"iterations": 20, "inner": 10, "accumulate": 1},
        "canvas": {"k": 8, "iterations": 20, "inner": 8, "accumulate": 1, "checks": 10, "batch": 64},
    }

    k: int = 15
    """tokens of the prompt that is searched"""
    caption: str = "a picture of something"
    """what z starts from; random tokens follow where it is shorter than k"""
    low: int = 500
    """lowest noise level, of train_steps (1000)"""
    high: int = 900
    """the level above the highest"""
    iterations: int = 500
    """calls of L-BFGS"""
    inner: int = 20
    """steps in each call"""
    accumulate: int = 3
    """noises whose gradients are averaged"""
    lr: float = 0.8
    """step length of L-BFGS"""
    rank: Literal["clip", "loss"] = "clip"
    """which of the prompts since the last check is tried: the nearest to the picture in CLIP, or that with the lowest loss"""
    checks: int = 10
    """how often a prompt is tried, the last time at the end; also the largest number of queries for each prompt"""
    clip: str = ""
    """hub id or local folder of a CLIPModel, or "canvas"; empty: the bundled one for models as small, else openai/clip-vit-large-patch14"""
    batch: int = 16
    """prompts attacked together; changes memory and speed, not the search"""
    transfer: bool = later(False)
    """against a defence that acts at generation time: search in the weights alone and try what is found; else the search goes through it"""

    def run(self, target: TextToImage, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        self._fits(target)
        asked, shown, token = checkpoints(self.iterations, self.checks), pictures(self, items), ordinary(target)
        clip = clip_of(target, self.clip) if self.rank == "clip" else ""
        image = embed_images(clip, shown) if clip else torch.empty(len(items), 0)
        E = tables(target)[token]  # (W, D)
        x_0 = target.latents(shown)  # (B, 4, h, w)
        left, rng, model = list(range(len(items))), [stream(i) for i in items], victim(self, target, items)
        z = [self._start(target, token, E, g) for g in rng]  # (k, D) each
        lbfgs = [torch.optim.LBFGS([row], lr=self.lr, max_iter=1) for row in z]  # one step is one of the paper's ``inner``
        seen: list[dict[str, float]] = [{} for _ in items]  # {prompt: loss} since the last check
        tried: set[tuple[int, str]] = set()
        total, count = 0.0, 0
        for n in range(self.iterations):
            drawn = [(uniform(self.low, self.high, rng, x_0), noise(x_0, rng)) for _ in range(self.accumulate)]
            for _ in range(self.inner):
                s = nearest(torch.stack(z), E, "l2")  # (B, k)
                loss, g_e = self._loss(model, left, x_0, token[s], E[s], drawn)  # (B,), (B, k, D)
                for row, i in enumerate(left):
                    seen[i].setdefault(target.decode(token[s[row]]), loss[row].item())
                    z[row].grad = g_e[row]
                    lbfgs[row].step(lambda value=loss[row]: value)
                total, count = total + loss.mean().item(), count + 1
            if n + 1 not in asked:
                continue
            fresh = {i: {p: v for p, v in seen[i].items() if (i, p) not in tried} for i in left}
            chosen = {i: _best(clip, image[i], found) for i, found in fresh.items() if found}
            won = hit({i: Adversarial(prompt=text) for i, text in chosen.items()})
            tried |= set(chosen.items())
            rows = [row for row, i in enumerate(left) if i not in won]
            left, rng, z, lbfgs, x_0 = (
                [left[r] for r in rows],
                [rng[r] for r in rows],
                [z[r] for r in rows],
                [lbfgs[r] for r in rows],
                x_0[rows],
            )
            seen = [{} for _ in items]
            yield {"iteration": n + 1.0, "loss": total / count, "left": float(len(left))}
            total, count = 0.0, 0
            if not left:
                return

    def _fits(self, target: TextToImage) -> None:
        fits(target, k=self.k)
        if not 0 <= self.low < self.high <= target.train_steps:
            raise UsageError(f"noise levels {self.low} to {self.high} are none; give low below high, both from 0 to {target.train_steps}")

    def _start(self, target: TextToImage, token: Tensor, E: Tensor, rng: torch.Generator) -> Tensor:
        """The caption's embeddings, then random ones (k, D)."""
        z = E[torch.randint(len(E), (self.k,), generator=rng).to(E.device)]
        known = words(target, self.caption)[: self.k]
        z[: len(known)] = E[torch.searchsorted(token, torch.tensor(known, dtype=torch.long, device=E.device))]
        return z

    def _loss(
        self, model: Victim, rows: Sequence[int], x_0: Tensor, s: Tensor, e: Tensor, drawn: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The mean squared error (B,) over ``drawn`` [(t (B,), noise)] under tokens s (B, k), and its gradient at e (B, k, D)."""
        target = model.target
        ids, at = sentences(target, s.tolist()), torch.arange(1, 1 + self.k, device=s.device).expand_as(s)
        loss, gradient = e.new_zeros(len(e)), torch.zeros_like(e)
        for t, eps in drawn:
            e = e.detach().requires_grad_()
            out = model.eps(target.add_noise(x_0, eps, t), t, target.encode(ids, soft(target, e, at)), rows)
            error = (out - target.goal(x_0, eps, t)).to(e.dtype).square().mean((1, 2, 3)) / len(drawn)  # (B,)
            gradient += torch.autograd.grad(error.sum(), e)[0]
            loss += error.detach()
        return loss, gradient


def _best(clip: str, image: Tensor, found: Mapping[str, float]) -> str:
    """Of ``found`` {prompt: loss} that with the highest cosine with ``image`` (P,) in ``clip``, or the lowest loss where it is empty."""
    prompts = list(found)
    return prompts[int((embed_texts(clip, prompts) @ image).argmax())] if clip else min(prompts, key=found.__getitem__)
