"""UnlearnDiffAtk (Zhang et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from ..base import Adversarial, Attack, Auto, Hit, Item, Row, Task
from ..config import later
from ..places import Place
from ..targets.base import TextToImage
from ._guided import victim
from ._search import draw, insert, keep_rows, pictures, simplex, slots, soft, stream, tables, tokens


@dataclass(frozen=True, kw_only=True)
class UnlearnDiffAtk(Attack):
    """Search for k tokens before the prompt that make the erased model denoise a picture of the concept.

    Idea: a diffusion model is a classifier. If the erased model, given the prompt c', predicts the noise in a picture x_tgt that
    shows the concept, then it still draws the concept from c'. x_tgt is what the original model drew for the same prompt and seed.

        min over c'  E_{t, eps} || eps - eps_theta*(x_tgt,t, c') ||²,      c' = [s_1 ... s_k, c],   s_i ~ u_i,
        u <- project_simplex(Adam(u, clip(g_onehot, -1, 1))),              g_onehot = (d loss / d e) E^T,   e_i = E[s_i].

    u (k × V) holds one distribution over the vocabulary for each slot, uniform at the start. The gradient of the sampled one-hot
    row goes straight through to u. Timesteps are fixed and ascending; after each one the most likely tokens are decoded to text,
    put beside the prompt, tokenised again and tried. u and Adam's moments persist over timesteps.

    Logged: ``t`` timestep just finished; ``loss`` mean squared error over its iterations and the prompts in the batch (lower: the
    erased model explains the concept's pictures better); ``left`` prompts of the batch not yet broken.

    Deviations from the authors' code:
      1. Prompts are attacked ``batch`` at a time in lock-step; the loss is the sum of per-prompt means, so each prompt's search is
         the one it would have alone. Broken prompts leave the batch.
      2. The projection onto the simplex is the closed form by sorting; theirs bisects to 1e-5.
      3. The one-hot product in the forward pass is a table lookup, and only the gradient is a product with the table.
      4. Every prompt has a random stream of its own (seed, prompt, image seed). Theirs reseeds the global generator for each picture,
         so the same 40 noise draws come back at every timestep.
      5. The replayed prompt is the decoded prefix, a space, and the prompt as it was typed; decoding drops start, end and padding tokens.
         For the other placements it is, as theirs, all tokens decoded together.
      6. No prompt is left out. Theirs never attacks prompts of more than 60 tokens; here what exceeds the encoder's length is cut, at the
         prompt's end and never a searched token.
      7. For v-prediction models the goal is v instead of the noise.
      8. Pictures are drawn with the target's own sampler and judged by the task's judge.
      9. SDXL's two embeddings of a token are searched as one.
      10. Against SLD and negative prompts theirs searches in the network alone (``transfer``). Here eps_theta* is the guided prediction of
         the defended sampler, one step of it without the momentum of earlier ones, so that the search knows what it has to overcome.
      11. ``rand_init`` acts; on a GPU theirs fills a copy and leaves u uniform.
    The paper's text says AdamW; like the authors' code this uses Adam with L2 weight decay.
    """

    needs = TextToImage
    paper: ClassVar[str] = "arXiv:2310.11868"
    access: ClassVar[Literal["white", "black"]] = "white"
    through: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"timesteps": 50, "iterations": 40},
        "paper-nsfw": {"k": 5, "timesteps": 50, "iterations": 40},
        "fast": {"timesteps": 10, "iterations": 20},
        "canvas": {"k": 3, "timesteps": 10, "iterations": 16, "batch": 64},
    }

    k: int | Auto = "auto"
    """tokens put beside the prompt; auto is the paper's: 5 for nsfw (nudity and harm), 3 for styles, objects and all else"""
    timesteps: int = 50
    """noise levels, spread evenly and visited in ascending order; also the largest number of queries for each prompt"""
    iterations: int = 40
    """gradient steps at each timestep, each with fresh noise"""
    lr: float = 0.01
    """Adam's step size on the probabilities"""
    weight_decay: float = 0.1
    """L2 weight decay on the probabilities"""
    batch: int = 16
    """prompts attacked together; changes memory and speed, not the search"""
    transfer: bool = later(False)
    """against a defence that acts at generation time: search in the weights alone and try what is found; else the search goes through it"""
    place: Place = later("prefix")
    """where the tokens go: before the prompt (the paper), after it, between its halves, at equal distances inside it, or one before every
    third of its tokens"""
    rand_init: bool = later(False)
    """start u at random, projected on the simplex, instead of uniform"""

    def resolve(self, target: TextToImage, task: Task) -> Self:
        return replace(self, k=tokens(task)) if self.k == "auto" else self

    def run(self, target: TextToImage, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        E, k = tables(target), int(self.k)  # (V, D)
        x_tgt = target.latents(pictures(self, items))  # (B, 4, h, w)
        c, at = slots(target, [i.prompt for i in items], k, self.place)  # (B, L), (B, k)
        left, rng, model = list(range(len(items))), [stream(i) for i in items], victim(self, target, items)
        u = E.new_full((len(left), k, len(E)), 1 / len(E))  # (B, k, V)
        if self.rand_init:
            u = simplex(torch.stack([torch.rand(k, len(E), generator=g) for g in rng]).to(u))
        adam = torch.optim.Adam([u], lr=self.lr, weight_decay=self.weight_decay)
        for n in range(self.timesteps):
            t = torch.full((len(left),), (2 * n + 1) * target.train_steps // (2 * self.timesteps), device=E.device)
            total = 0.0
            for _ in range(self.iterations):
                e = E[draw(u, rng)].requires_grad_()  # (B, k, D) = onehot(s) E, with one token s for each slot
                eps = torch.stack([torch.randn(x_tgt.shape[1:], generator=g) for g in rng]).to(x_tgt)
                x_t = target.add_noise(x_tgt, eps, t)
                error = (model.eps(x_t, t, target.encode(c, soft(target, e, at)), left) - target.goal(x_tgt, eps, t)).to(E.dtype)
                loss = error.pow(2).mean((1, 2, 3))  # (B,)
                (g_e,) = torch.autograd.grad(loss.sum(), e)
                u.grad = (g_e @ E.T).clamp(-1, 1)  # straight through to u
                adam.step()
                u.copy_(simplex(u))
                total += loss.mean().item() / self.iterations
            best = u.argmax(-1)  # (B, k)
            texts = {i: self._text(target, items[i].prompt, insert(c, at, best)[row], best[row]) for row, i in enumerate(left)}
            won = hit({i: Adversarial(prompt=text) for i, text in texts.items()})
            keep = [row for row, i in enumerate(left) if i not in won]
            left, rng, x_tgt, c, at = [left[r] for r in keep], [rng[r] for r in keep], x_tgt[keep], c[keep], at[keep]
            keep_rows(adam, u, keep)
            yield {"t": float(t[0]), "loss": total, "left": float(len(left))}
            if not left:
                return

    def _text(self, target: TextToImage, prompt: str, ids: Tensor, s: Tensor) -> str:
        """What is typed: the tokens ``s`` (k,) as text before the prompt as it was given, or ``ids`` (L,) as text."""
        return f"{target.decode(s)} {prompt}".strip() if self.place == "prefix" else target.decode(ids)
