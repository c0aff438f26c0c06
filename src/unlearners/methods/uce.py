"""Unified Concept Editing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import Self

from .. import closed_form, neighbours
from ..base import Auto, Method, Row, Task
from ..config import later
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
    6. A task that names no neighbours (``--concept`` alone) gets ours, see ``neighbours``: preserved prompts, guide, templates and scales
       are chosen from its text and the model. Preset ``paper`` never chooses.
    """

    paper: ClassVar[str] = "arXiv:2308.14761"
    needs: ClassVar[type] = TextToImage
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": neighbours.NAMED,
        "release": {**neighbours.NAMED, "tokens": "last", "preserve_scale": 1.0},
    }

    params: str = "xattn-kv"
    r"""matrices to rewrite; unet\..*\.attn2\.to_v edits the values only"""
    tokens: Literal["all", "last"] = "all"
    """all: every position from the concept's last token through the padding; last: its last token alone"""
    erase_scale: float | Auto = "auto"
    """alpha; auto is the paper's 1 beside neighbours that the task names, else as strong as the preserved prompts allow"""
    preserve_scale: float = 0.0
    """beta; 0 chooses max(0.1, 1 / number of preserved prompts)"""
    lamb: float = 0.5
    """lambda, how much W is held to W_old"""
    strength: float = 1.0
    """share of the step from W_old to W that is taken; 0 changes nothing"""
    templates: tuple[str, ...] = ()
    """phrases with {} for the concept; empty chooses them by the kind of concept"""
    preserved: tuple[str, ...] | Auto = later("auto")
    """whole prompts to preserve; auto chooses them where the task names no neighbours; empty: the task's neighbours in the templates"""
    guide: tuple[str, ...] | Auto = later("auto")
    """words of the concept's kind whose mean is the guide; auto chooses them where the task names none; empty: the task's anchor"""
    away: float | Auto = later("auto")
    """how far the guide lies beyond that, on the side away from the concept: g - away (c - g); auto goes by the kind of concept"""

    def resolve(self, target: TextToImage, task: Task) -> Self:
        return replace(self, **neighbours.closed(self, target, task))

    def __post_init__(self) -> None:
        if self.lamb <= 0 or min(x for x in (self.erase_scale, self.preserve_scale, 0.0) if x != "auto") < 0:
            raise UsageError("lamb must be above 0 and the scales at least 0, or there is no unique solution")
        closed_form.check_templates(self.templates)

    @torch.no_grad()
    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        w = target.select(self.params)
        c, g, p, beta = neighbours.vectors(self, target, task)  # (n, d), (n, d), (m, d)
        closed_form.check_matrices("UCE", w, c.shape[1])
        M, B = closed_form.solve(c, g, p, alpha=float(self.erase_scale), beta=beta, lamb=self.lamb)  # A B^-1, B
        T = torch.lerp(torch.eye(len(M), dtype=M.dtype, device=M.device), M, self.strength)
        K = closed_form.gram(w.values())
        for _ in target.steps(1):
            if self.strength:
                for W in w.values():
                    W.copy_(W.double() @ T)
            yield {"condition": closed_form.condition(B), **closed_form.effect(K, T, c, g, p)}
