"""Unified Concept Editing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..base import Method, Row, Task
from ..errors import UnlearnError, UsageError
from ..targets.base import TextToImage

TEMPLATES: dict[str, tuple[str, ...]] = {
    "style": ("{}", "{} style", "an image in {} style", "{} image"),
    "object": ("{}", "a {}", "an image of a {}", "{} image"),
    "identity": ("{}", "a picture of {}", "a portrait of {}"),
    "nsfw": ("{}",),
}


@dataclass(frozen=True, kw_only=True)
class UCE(Method):
    """Unified Concept Editing (Gandikota et al., WACV 2024): rewrite the cross-attention keys and values in closed form.

    For every key and value projection W of the cross-attention, with concept vectors c_i, their guides g_i (v_i = W_old g_i)
    and preserved vectors p_j, minimise (paper, eq. 5-7)
        alpha sum_i ||W c_i - W_old g_i||^2 + beta sum_j ||W p_j - W_old p_j||^2 + lambda ||W - W_old||^2,
    so W = W_old A B^-1 with
        A = alpha sum g_i c_i' + beta sum p_j p_j' + lambda I,   B = alpha sum c_i c_i' + beta sum p_j p_j' + lambda I.
    A B^-1 (d × d) is the same for every W: it is solved once, in float64. No pictures, no gradient, under a second.

    Logged: ``condition`` is the 2-norm condition number of B (above 1e8 the answer loses half of its digits); ``change`` is
    ||W - W_old|| / ||W_old|| over all edited matrices; ``erased`` is the mean of ||W c - W_old g|| / ||W_old c - W_old g||
    (0 = the concept became its guide); ``moved`` the mean of ||W p - W_old p|| / ||W_old p|| (0 = nothing preserved moved).

    Deviations from the authors' code:
    1. A linear solve in float64 in place of an inverse in float32; the condition number is logged.
    2. An empty guide's vector in ``last`` mode is its end-of-text token; the 2025 release takes the start token there, which is
       the same for every prompt.
    3. ``preserve_scale=0`` means max(0.1, 1 / number of preserved prompts), as the old code has it.
    4. Preserved prompts are the task's list in the same templates, and always the empty prompt; the 2025 release has none of itself.
    5. The templates go by the kind of concept; the old code's art templates are part of the phrase given here.
    """

    paper: ClassVar[str] = "arXiv:2308.14761"
    needs: ClassVar[type] = TextToImage
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "release": {"tokens": "last", "preserve_scale": 1.0},
    }

    params: str = "xattn-kv"
    r"""matrices to rewrite; unet\..*\.attn2\.to_v edits the values only"""
    tokens: Literal["all", "last"] = "all"
    """all: every position from the concept's last token through the padding; last: its last token alone"""
    erase_scale: float = 1.0
    """alpha"""
    preserve_scale: float = 0.0
    """beta; 0 chooses max(0.1, 1 / number of preserved prompts)"""
    lamb: float = 0.5
    """lambda, how much W is held to W_old"""
    strength: float = 1.0
    """share of the step from W_old to W that is taken; 0 changes nothing"""
    templates: tuple[str, ...] = ()
    """phrases with {} for the concept; empty chooses them by the kind of concept"""

    def __post_init__(self) -> None:
        if self.lamb <= 0 or self.erase_scale < 0 or self.preserve_scale < 0:
            raise UsageError("lamb must be above 0 and the scales at least 0, or there is no unique solution")
        if any("{}" not in t for t in self.templates):
            raise UsageError("each template needs {} where the concept goes, for example 'an image of {}'")

    @torch.no_grad()
    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        w = target.select(self.params)
        if bad := [n for n, p in w.items() if p.dim() != 2]:
            raise UsageError(f"UCE rewrites matrices and '{bad[0]}' is none; use params xattn-kv")
        says = self.templates or TEMPLATES[task.kind]
        guides = [task.anchor(i) for i in range(len(task.concepts))]  # an empty one is the empty prompt in every phrase
        pairs = [(t.format(c), t.format(g) if g else "") for c, g in zip(task.concepts, guides, strict=True) for t in says]
        keep = ["", *(t.format(p) for p in task.preserve for t in says)]
        c, g = self.vectors(target, pairs)  # (n, d), (n, d)
        p = self.kept(target, keep)  # (m, d)
        d = c.shape[1]
        if other := [n for n, m in w.items() if m.shape[1] != d]:
            raise UsageError(f"'{other[0]}' does not read text states of width {d}; use params xattn-kv")
        alpha, beta = self.erase_scale, self.preserve_scale or max(0.1, 1 / len(keep))
        eye = torch.eye(d, dtype=torch.float64, device=c.device)
        A = alpha * g.T @ c + beta * p.T @ p + self.lamb * eye  # (d, d)
        B = alpha * c.T @ c + beta * p.T @ p + self.lamb * eye  # (d, d), symmetric
        M = torch.linalg.solve(B, A.T).T  # A B^-1
        if not torch.isfinite(M).all():
            raise UnlearnError("the normal equations have no finite solution; raise lamb or lower erase_scale")
        moved, size, left, gap, drift, kept = (0.0,) * 6
        for _ in target.steps(1):
            for matrix in w.values():
                W_old = matrix.double()
                W = W_old + self.strength * (W_old @ M - W_old)
                moved, size = moved + (W - W_old).square().sum().item(), size + W_old.square().sum().item()
                left, gap = left + (c @ W.T - g @ W_old.T).norm().item(), gap + (c @ W_old.T - g @ W_old.T).norm().item()
                drift, kept = drift + (p @ (W - W_old).T).norm().item(), kept + (p @ W_old.T).norm().item()
                if self.strength:
                    matrix.copy_(W)
            ratio = left / gap if gap else 0.0
            yield {"condition": torch.linalg.cond(B).item(), "change": (moved / size) ** 0.5, "erased": ratio, "moved": drift / kept}

    def vectors(self, target: TextToImage, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Concept and guide vectors, aligned at their last subject tokens: (n, d) each, float64."""
        concepts, guides = [], []
        for concept, guide in pairs:
            (c, i), (g, j) = self.states(target, concept), self.states(target, guide)
            n = min(len(c) - i, len(g) - j) if self.tokens == "all" else 1
            concepts.append(c[i : i + n])
            guides.append(g[j : j + n])
        return torch.cat(concepts), torch.cat(guides)

    def kept(self, target: TextToImage, prompts: Sequence[str]) -> Tensor:
        """Vectors to preserve (m, d): all positions, or the last token of each prompt."""
        states = [self.states(target, p) for p in prompts]
        return torch.cat([s if self.tokens == "all" else s[i : i + 1] for s, i in states])

    def states(self, target: TextToImage, prompt: str) -> tuple[Tensor, int]:
        """Text states (L, d) in float64 and the position of the last subject token (of the end token, for an empty prompt)."""
        ids = target.tokens([prompt])
        last = next((i for i in range(ids.shape[1] - 1, -1, -1) if int(ids[0, i]) not in target.special), 1)
        return target.encode([prompt]).states[0].double(), last
