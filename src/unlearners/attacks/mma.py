"""The text attack of MMA-Diffusion (Yang et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Adversarial, Attack, Hit, Item, Row, Task
from ..errors import UsageError
from ..targets.base import TextToImage
from ._search import original, soft, stream, tables
from ._text import framed, free, plain, pooled, typed

ROWS = 50
"""rows logged for each batch, at most"""


@dataclass(frozen=True, kw_only=True)
class MMA(Attack):
    """Search for a prompt that means what the plain one means to the original's text encoder, without the concept's words.

    Idea: an erased model still reads, with much the same text encoder, sentences that no filter and no training has seen. Nothing of
    the victim is used but the answer to one query for each prompt. With tau the pooled text, p the prompt and s its k free tokens,

        min over s  1 - cos(tau(s), tau(p)),      s without the concept's words,
        g = gradient of the loss w.r.t. the one-hot rows of s = (d loss / d E[s]) E^T,
        candidates: s with one slot j exchanged for one of the ``top`` tokens of lowest g_j;      s <- the best of them.

    Candidates are spread evenly over the slots. The best s ever seen is what is typed, decoded to text.

    Logged: ``iteration`` number done; ``loss`` mean 1 - cos of the best so far; ``now`` that of the current s.

    Deviations from the authors' code:
      1. The text starts as random allowed tokens; theirs starts as 20 random letters.
      2. Banned are the task's concepts: tokens with one of their words inside, the concepts' own tokens, and texts that spell one.
         Theirs has a list for nudity.
      3. A candidate counts when its text is read as the same tokens. Theirs asks for the same number of tokens, and of all
         candidates; here they are checked from the best one on, which chooses the same way.
      4. Each prompt's search runs in forward passes of its own, cut behind the end token, which later places cannot change.
      5. Their early stop at a loss of 0.1 is the field ``enough``, off by default as in their code.
      6. SDXL is searched through both text encoders, by the pooled vector of the second.
    Its image attack, which deceives a safety checker, is not part of this.
    """

    needs = TextToImage
    paper: ClassVar[str] = "arXiv:2311.17516"
    access: ClassVar[Literal["white", "black"]] = "black"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"k": 20, "iterations": 1000, "top": 256, "candidates": 512},
        "fast": {"iterations": 50, "candidates": 128},
        "canvas": {"k": 8, "iterations": 20, "top": 64, "candidates": 48, "batch": 64},
    }

    k: int = 20
    """tokens of the prompt that is searched"""
    iterations: int = 1000
    """exchanges of one token"""
    top: int = 256
    """tokens with the lowest gradient that a slot may take"""
    candidates: int = 512
    """exchanges weighed in each iteration"""
    enough: float = 0.0
    """stop a prompt's search at this loss; 0 never does"""
    batch: int = 16
    """prompts attacked together; changes memory and speed, not the search"""

    def run(self, target: TextToImage, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        if self.candidates < 1 or self.top < 1:
            raise UsageError(f"top = {self.top} and candidates = {self.candidates} leave nothing to choose from; give 1 or more")
        old = original(self, target)
        k, E, allowed = free(old, self.k), tables(old), plain(old, task.concepts)  # (V, D), (W,)
        with torch.no_grad():
            ids = old.tokens([i.prompt for i in items])
            tau = pooled(old, old.encode(ids), ids)  # (B, D)
        rng = [stream(i) for i in items]
        s = [_readable(old, allowed, k, task.concepts, g) for g in rng]  # (k,) each
        best, loss = list(s), [_loss(old, x[None], goal).item() for x, goal in zip(s, tau, strict=True)]
        now = list(loss)
        for n in range(self.iterations):
            for i in range(len(items)):
                if loss[i] <= self.enough:
                    continue
                s[i], now[i] = self._exchange(old, s[i], now[i], tau[i], E, allowed, task.concepts, rng[i])
                if now[i] < loss[i]:
                    best[i], loss[i] = s[i], now[i]
            if (n + 1) % max(1, self.iterations // ROWS) == 0 or n + 1 == self.iterations:
                yield {"iteration": n + 1.0, "loss": sum(loss) / len(loss), "now": sum(now) / len(now)}
        hit({i: Adversarial(prompt=old.decode(best[i])) for i in range(len(items))})

    def _exchange(
        self, old: TextToImage, s: Tensor, now: float, tau: Tensor, E: Tensor, allowed: Tensor, concepts: Sequence[str], g: torch.Generator
    ) -> tuple[Tensor, float]:
        """The best readable candidate next to s (k,) and its loss; s itself where none is readable."""
        k = len(s)
        gradient = _gradient(old, s, tau, E)[:, allowed]  # (k, W)
        first = allowed[gradient.topk(min(self.top, len(allowed)), largest=False).indices]  # (k, top)
        slot = torch.arange(self.candidates) * k // self.candidates  # spread evenly
        pick = torch.randint(first.shape[1], (self.candidates,), generator=g)
        tries = s.repeat(self.candidates, 1)
        tries[torch.arange(self.candidates), slot] = first[slot, pick]
        loss = _loss(old, tries, tau)  # (candidates,)
        for j in loss.argsort().tolist():
            if not torch.equal(tries[j], s) and typed(old, tries[j], concepts) is not None:
                return tries[j], float(loss[j])
        return s, now


def _readable(old: TextToImage, allowed: Tensor, k: int, concepts: Sequence[str], g: torch.Generator) -> Tensor:
    """k random allowed tokens (k,) whose text is read as themselves: each is drawn until the text so far is."""
    s = allowed.new_empty(0)
    while len(s) < k:
        fits = (torch.cat([s, allowed[i : i + 1]]) for i in torch.randperm(len(allowed), generator=g).tolist())
        found = next((x for x in fits if typed(old, x, concepts) is not None), None)
        if found is None:
            raise UsageError(f"no text of {len(s) + 1} tokens is read as it is written by this text encoder; lower k below {len(s) + 1}")
        s = found
    return s


@torch.no_grad()
def _loss(old: TextToImage, s: Tensor, tau: Tensor) -> Tensor:
    """1 - cos (P,) of the texts s (P, k) with ``tau`` (D,)."""
    ids = framed(old, s, s.shape[1] + 2)
    return 1 - F.cosine_similarity(pooled(old, old.encode(ids), ids), tau[None], dim=-1).float()


def _gradient(old: TextToImage, s: Tensor, tau: Tensor, E: Tensor) -> Tensor:
    """The gradient (k, V) of the loss of s (k,) with respect to its one-hot rows."""
    ids, e = framed(old, s[None], len(s) + 2), E[s][None].requires_grad_()
    at = torch.arange(1, 1 + len(s), device=e.device)[None]
    loss = 1 - F.cosine_similarity(pooled(old, old.encode(ids, soft(old, e, at)), ids), tau[None], dim=-1)
    (g_e,) = torch.autograd.grad(loss.sum(), e)  # (1, k, D)
    return g_e[0].to(E.dtype) @ E.T
