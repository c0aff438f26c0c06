"""Unified Concept Editing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .. import closed_form
from ..base import Method, Row, Task
from ..errors import UsageError
from ..targets.base import TextToImage


@dataclass(frozen=True, kw_only=True)
class UCE(Method):
    """Unified Concept Editing (Gandikota et al., WACV 2024): rewrite the cross-attention keys and values in closed form.

    For every key and value projection W of the cross-attention, with concept vectors c_i, their guides g_i (v_i = W_old g_i)
    and preserved vectors p_j, minimise (paper, eq. 5-7)
        alpha sum_i ||W c_i - W_old g_i||^2 + beta sum_j ||W p_j - W_old p_j||^2 + lambda ||W - W_old||^2,
    so W = W_old A B^-1 with
        A = alpha sum g_i c_i' + beta sum p_j p_j' + lambda I,   B = alpha sum c_i c_i' + beta sum p_j p_j' + lambda I.
    A B^-1 (d × d) is the same for every W: it is solved once, in float64. No pictures, no gradient, under a second.

    Logged: ``condition`` is the 2-norm condition number of B (above 1e8 the answer loses half of its digits); over all edited
    matrices together, ``change`` is ||W - W_old|| / ||W_old||, ``erased`` ||W c - W_old g|| / ||W_old c - W_old g|| (0 = the
    concept became its guide) and ``moved`` ||W p - W_old p|| / ||W_old p|| (0 = nothing preserved moved).

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
        closed_form.check_templates(self.templates)

    @torch.no_grad()
    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        w = target.select(self.params)
        pairs, keep = closed_form.phrases(task, self.templates)
        c, g = closed_form.aligned(target, pairs, self.tokens)  # (n, d), (n, d)
        p = closed_form.kept(target, keep, self.tokens)  # (m, d)
        closed_form.check_matrices("UCE", w, c.shape[1])
        beta = self.preserve_scale or max(0.1, 1 / len(keep))
        M, B = closed_form.solve(c, g, p, alpha=self.erase_scale, beta=beta, lamb=self.lamb)  # A B^-1, B
        T = torch.lerp(torch.eye(len(M), dtype=M.dtype, device=M.device), M, self.strength)
        K = closed_form.gram(w.values())
        for _ in target.steps(1):
            if self.strength:
                for W in w.values():
                    W.copy_(W.double() @ T)
            yield {"condition": closed_form.condition(B), **closed_form.effect(K, T, c, g, p)}
