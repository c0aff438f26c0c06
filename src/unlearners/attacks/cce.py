"""CCE, circumventing concept erasure (Pham et al., ICLR 2024)."""

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
from ..latents import SEED, phrase
from ..targets.base import TextToImage
from ._guided import victim
from ._search import checkpoints, original, sentences, soft, stream, tables

WORDS = {"style": "art", "identity": "person", "nsfw": "person"}
"""what the vector starts as, by kind of concept; "object" for the others"""
TEMPLATES = {
    "style": (
        "{} style", "an image in {} style", "a picture in the style of {}", "a scene in {} style", "a {} picture", "one thing in {} style",
    ),
    "object": (
        "a {}", "an image of a {}", "a picture of one {}", "the {} up close", "a {} alone", "a view of the {}", "a small {}", "a large {}",
    ),
    "identity": ("{}", "a picture of {}", "a portrait of {}", "an image with {}"),
    "nsfw": ("{}", "a picture of {}", "a scene with {}"),
}  # fmt: skip
"""how the vector is said while it is learned, by kind of concept; those of objects for the others"""


@dataclass(frozen=True, kw_only=True)
class CCE(Attack):
    """Learn one new token embedding from the concept's pictures, by textual inversion on the erased model, and write it in the prompt.

    Idea: an erasure that only unlinks a word from a concept leaves the concept where another input reaches it. Pictures x of the
    concept, drawn by the original model, say which embedding v that is:

        min over v  E_{x, t, eps} || eps - eps_theta*(x_t, template with v) ||²      (v in place of eps, where v is predicted),
        v <- AdamW(v, gradient),   t uniform.

    One vector is learned for the concept and serves all prompts: it stands in place of the concept's words, or before a prompt that
    does not hold them. Nobody can type it, so this asks what the weights still know rather than what a user can reach.

    Logged: ``iteration`` number done; ``loss`` mean squared error since the last check; ``length`` of v; ``left`` prompts not yet broken.

    Deviations from the authors' code:
      1. Theirs puts the vector before the captions of I2P; here it replaces the concept's words where they stand.
      2. The sentences to learn from are our own: 8 for objects, 6 for styles and 4 for persons, where theirs has 27, 19 and 2.
      3. Weights are in the model's own precision, v in float32 at least. ``lr`` is the effective rate, theirs 0.005 × 4 × 4.
      4. Against SLD and negative prompts the guided prediction is to equal the original's, guided by the same scale for the picture's own
         prompt, as theirs. Theirs unrolls 35 steps of SLD in each update; here it is one, without the momentum of earlier ones.
      5. With ``checks`` above 1 the vector is also tried on the way.
    """

    needs = TextToImage
    paper: ClassVar[str] = "arXiv:2308.01508"
    access: ClassVar[Literal["white", "black"]] = "white"
    through: ClassVar[bool] = True
    level: ClassVar[Literal["prompt", "tokens", "embedding", "latent"]] = "embedding"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"pictures": 25, "iterations": 5000, "rows": 4, "accumulate": 4, "lr": 0.08, "weight_decay": 0.01},
        "fast": {"iterations": 500, "checks": 2},
        "canvas": {"iterations": 500, "rows": 16, "accumulate": 1, "lr": 0.02, "checks": 10},
    }

    pictures: int = 25
    """pictures of the concept, drawn by the original model from the task's prompts in turn"""
    iterations: int = 5000
    """AdamW steps on the vector"""
    rows: int = 4
    """pictures in each forward pass"""
    accumulate: int = 4
    """forward passes in each step; their gradients are averaged"""
    lr: float = 0.08
    """AdamW's step size"""
    weight_decay: float = 0.01
    """AdamW's weight decay"""
    word: str = ""
    """a related word that the vector starts as, the mean of its tokens; empty: art for styles, person or object for others"""
    checks: int = 1
    """how often the vector is tried, the last time at the end; also the largest number of queries for each prompt"""
    batch: int = 512
    """prompts attacked together; each batch learns the same vector again, so a smaller one costs time"""
    transfer: bool = later(False)
    """against a defence that acts at generation time: learn from the weights alone and try what is found; else it is learned through it"""

    def run(self, target: TextToImage, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        asked, rng = checkpoints(self.iterations, self.checks), [stream(Item(prompt=task.name, seed=0))]
        said = task.prompts or tuple(phrase(task.kind, c) for c in task.concepts)
        many, model = range(self.pictures), victim(self, target)
        if not many:
            raise UsageError(f"pictures = {self.pictures} leaves nothing to learn from; give 1 or more")
        old = original(self, target)
        with torch.no_grad():
            shown, named = old.sample([said[i % len(said)] for i in many], [SEED + i for i in many]), old.encode(said)
        x_all = target.latents(shown)  # (pictures, 4, h, w)
        start = self._start(target, task)
        v = tables(target)[start].mean(0)  # (D,)
        placed = [_before_and_after(target, t, start[0]) for t in TEMPLATES.get(task.kind, TEMPLATES["object"])]
        ids, at = sentences(target, [row for row, _ in placed]), torch.tensor([[i] for _, i in placed], device=v.device)
        proposals = {i: _stand(target, task, item.prompt, start[0]) for i, item in enumerate(items)}
        adam = torch.optim.AdamW([v], lr=self.lr, weight_decay=self.weight_decay)
        left, total, count = set(proposals), 0.0, 0
        for n in range(self.iterations):
            v.grad = torch.zeros_like(v)
            for _ in range(self.accumulate):
                x, which, t = (torch.randint(high, (self.rows,), generator=rng[0]) for high in (len(x_all), len(ids), target.train_steps))
                x_0, t, which = x_all[x.to(x_all.device)], t.to(v.device), which.to(v.device)
                eps = torch.randn(x_0.shape, generator=rng[0]).to(x_0)
                x_t, one = target.add_noise(x_0, eps, t), [0] * self.rows  # all are guided by the sampler's own scale
                e = v.detach().requires_grad_()
                cond = target.encode(ids[which], soft(target, e.expand(self.rows, 1, -1), at[which]))
                with torch.no_grad():
                    goal = model.unguarded(old, x_t, t, named[x % len(said)], one) if model.step else target.goal(x_0, eps, t)
                error = (model.eps(x_t, t, cond, one) - goal).to(e.dtype)
                loss = error.square().mean() / self.accumulate
                v.grad += torch.autograd.grad(loss, e)[0]
                total += loss.item()
            adam.step()
            count += 1
            if n + 1 not in asked:
                continue
            learned = v.detach().clone()[None]  # (1, D)
            left -= hit({i: Adversarial(tokens=proposals[i][0], embedding=learned, at=proposals[i][1]) for i in sorted(left)})
            yield {"iteration": n + 1.0, "loss": total / count, "length": v.norm().item(), "left": float(len(left))}
            total, count = 0.0, 0
            if not left:
                return

    def _start(self, target: TextToImage, task: Task) -> list[int]:
        """The tokens of the word that v starts as."""
        word = self.word or WORDS.get(task.kind, "object")
        if not (found := words(target, word)):
            raise UsageError(f"'{word}' has no token in this text encoder; give another word to start from as word")
        return found


def _before_and_after(target: TextToImage, template: str, filler: int) -> tuple[list[int], int]:
    """The tokens of ``template`` with ``filler`` in place of {}, and its slot."""
    before, _, after = template.partition("{}")
    first = words(target, before)
    return [*first, filler, *words(target, after)], 1 + len(first)


def _stand(target: TextToImage, task: Task, prompt: str, filler: int) -> tuple[Tensor, int]:
    """Ids (L,) of ``prompt`` with ``filler`` in place of the concept's words where they first stand, else before it; and its slot."""
    own, room = words(target, prompt), target.tokens([""]).shape[1] - 2
    names = sorted((words(target, w) for w in (*task.concepts, *task.synonyms)), key=len, reverse=True)
    for name in names:
        for i in range(min(len(own) - len(name) + 1, room)) if name else ():
            if own[i : i + len(name)] == name:
                return sentences(target, [[*own[:i], filler, *own[i + len(name) :]]])[0], 1 + i
    return sentences(target, [[filler, *own]])[0], 1
