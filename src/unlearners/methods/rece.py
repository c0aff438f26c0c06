"""Reliable and Efficient Concept Erasure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from .. import closed_form, neighbours
from ..base import Auto, Method, Row, Task
from ..config import later
from ..errors import UsageError
from ..targets.base import TextToImage

RECIPES: Mapping[str, tuple[float, int]] = {"nsfw": (0.1, 3), "style": (1e-3, 1), "object": (0.1, 1), "identity": (0.1, 1)}


@dataclass(frozen=True, kw_only=True)
class RECE(Method):
    """RECE (Gong et al., ECCV 2024): edit as UCE does, find the embedding that brings the concept back, erase that too, repeat.

    After UCE made W of W_0, the vector c' that revives a concept vector c in all edited projections minimises
        sum_W ||W c' - W_0 c||^2 + lambda ||c'||^2,   so   c' = (lambda I + sum W' W)^-1 (sum W' W_0) c,
    and W is edited again, by UCE's equation, to read c' as it reads the guide, with lambda_1 on what is preserved and lambda_2
    on W - W_old. All edits multiply from the right, W = W_0 T, so with K = sum W_0' W_0 the rounds run on d × d matrices alone:
        c' = (lambda I + T' K T)^-1 T' K c,   T <- T M(c' -> g),
    and W = W_0 T is written once, at the end. No pictures, no gradient, seconds.

    Logged: one row after UCE and one for each round, in which ``revived`` is ||W c' - W_0 c|| / ||W_0 c - W_0 g||, how far the best
    embedding stays from the concept in the matrices it attacks (0: it is all there, 1: as far as the guide); ``norm`` the mean ||c'||
    over the mean ||c||; then ``condition``, ``change``, ``erased`` and ``moved`` as UCE logs them, of the original concept.

    Deviations from the authors' code:
    1. float64 and linear solves in place of float32 and inverses.
    2. The authors draw pictures after every round and keep the round a detector likes best; here the rounds are a number.
    3. c' is derived for the positions that UCE erases, in the same templates. The code (``positions="prompt"``) takes every position
       of the bare phrase, the start token too, beside the same position of the guide.
    4. The first edit is ``uce`` with its defaults; the code starts from a UCE file. What is preserved is the same in every round.
    5. ``rounds`` and ``derive`` are the paper's for the kind of concept (auto; also written -1 and 0); it has none for identities, which
       go as objects do.
    6. A task that names no neighbours gets ours, as with ``uce``, and the rounds preserve them by ``preserve_scale`` and ``lamb`` of the
       first edit. Presets never choose.
    """

    paper: ClassVar[str] = "arXiv:2407.12383"
    needs: ClassVar[type] = TextToImage
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": neighbours.NAMED,
        "nudity": {**neighbours.NAMED, "derive": 0.1, "rounds": 3},
        "unsafe": {**neighbours.NAMED, "derive": 0.1, "rounds": 2},
        "style": {**neighbours.NAMED, "derive": 1e-3, "rounds": 1},
        "object": {**neighbours.NAMED, "derive": 0.1, "rounds": 1},
        "hard_object": {**neighbours.NAMED, "derive": 1e-3, "rounds": 1},
        "release": {**neighbours.NAMED, "positions": "prompt"},
        "canvas": neighbours.NAMED,
    }

    params: str = "xattn-kv"
    r"""matrices to rewrite; unet\..*\.attn2\.to_v edits the values only"""
    rounds: int | Auto = -1
    """embeddings derived and erased one after the other; 0 is UCE; auto, or -1, the paper's number: 3 for nsfw, 1 for all else"""
    derive: float | Auto = 0.0
    """lambda, how small c' is held; auto, or 0, the paper's: 0.001 for styles, 0.1 for all else"""
    positions: Literal["concept", "prompt"] = "concept"
    """what c' is derived from: the positions that UCE erases, or every position of the bare phrase (the authors' code)"""
    round_preserve: float = 0.1
    """lambda_1, weight of what is preserved, in the rounds"""
    round_lamb: float = 0.1
    """lambda_2, how much a round holds W to what it was before"""
    tokens: Literal["all", "last"] = "all"
    """all: every position from the concept's last token through the padding; last: its last token alone"""
    erase_scale: float | Auto = "auto"
    """alpha, weight of what is erased, in every edit; auto is 1 beside neighbours that the task names, else as of ``uce``"""
    preserve_scale: float = 0.0
    """beta of the first edit; 0 chooses max(0.1, 1 / number of preserved prompts)"""
    lamb: float = 0.5
    """lambda of the first edit, how much W is held to W_0"""
    strength: float = 1.0
    """share of the step from W_0 to W that is taken; 0 changes nothing"""
    templates: tuple[str, ...] = ()
    """phrases with {} for the concept; empty chooses them by the kind of concept"""
    preserved: tuple[str, ...] | Auto = later("auto")
    """whole prompts to preserve; auto chooses them where the task names no neighbours; empty: the task's neighbours in the templates"""
    guide: tuple[str, ...] | Auto = later("auto")
    """words of the concept's kind whose mean is the guide; auto chooses them where the task names none; empty: the task's anchor"""
    away: float | Auto = later("auto")
    """how far the guide lies beyond that, on the side away from the concept: g - away (c - g); auto goes by the kind of concept"""

    def resolve(self, target: TextToImage, task: Task) -> Self:
        derive, rounds = RECIPES.get(task.kind, ("auto", "auto"))
        own: dict[str, Any] = {
            "derive": self.derive if self.derive not in ("auto", 0) else derive,
            "rounds": rounds if self.rounds in ("auto", -1) else self.rounds,
        }
        return replace(self, **neighbours.closed(self, target, task), **own)

    def __post_init__(self) -> None:
        scales = [x for x in (self.erase_scale, self.preserve_scale, self.round_preserve) if x != "auto"]
        if min(self.lamb, self.round_lamb) <= 0 or min(scales) < 0:
            raise UsageError("lamb and round_lamb must be above 0 and the scales at least 0, or there is no unique solution")
        if (self.rounds != "auto" and self.rounds < -1) or (self.derive != "auto" and self.derive < 0):
            raise UsageError("rounds must be at least 0 and derive above 0; leave them out for the paper's")
        closed_form.check_templates(self.templates)

    @torch.no_grad()
    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        w = target.select(self.params)  # W_0
        c, g, p, beta = neighbours.vectors(self, target, task)  # (n, d), (n, d), (m, d)
        closed_form.check_matrices("RECE", w, c.shape[1])
        c_0, g_0 = (c, g) if self.positions == "concept" else self.whole(target, task)
        K = closed_form.gram(w.values())  # sum W_0' W_0
        lamb, rounds = float(self.derive), int(self.rounds)

        alpha = float(self.erase_scale)
        T, B = closed_form.solve(c, g, p, alpha=alpha, beta=beta, lamb=self.lamb)  # UCE
        rows, hold = [self.row(K, T, B, c, g, p)], beta if self.preserved else self.round_preserve
        for _ in range(rounds):
            c_new = revive(K, T, c_0, lamb)  # c'
            far = closed_form.length(K, c_new @ T.T - c_0) / (closed_form.length(K, c_0 - g_0) or 1.0)
            M, B = closed_form.solve(c_new, g_0, p, alpha=alpha, beta=hold, lamb=self.round_lamb)
            T = T @ M
            norm = float(c_new.norm(dim=1).mean() / c_0.norm(dim=1).mean())
            rows.append({"revived": far, "norm": norm, **self.row(K, T, B, c, g, p)})

        T = torch.lerp(torch.eye(len(T), dtype=T.dtype, device=T.device), T, self.strength)
        for _ in target.steps(1):
            if self.strength:
                for W in w.values():
                    W.copy_(W.double() @ T)
            yield from rows

    def row(self, K: Tensor, T: Tensor, B: Tensor, c: Tensor, g: Tensor, p: Tensor) -> Row:
        """What is logged of an edit, at full strength."""
        return {"condition": closed_form.condition(B), **closed_form.effect(K, T, c, g, p)}

    def whole(self, target: TextToImage, task: Task) -> tuple[Tensor, Tensor]:
        """Every position of the bare concepts and of their guides (n L, d), side by side."""
        pairs = [(c, task.anchor(i)) for i, c in enumerate(task.concepts)]
        texts = closed_form.read(target, (p for pair in pairs for p in pair))
        return torch.cat([texts[c][0] for c, _ in pairs]), torch.cat([texts[g][0] for _, g in pairs])


def revive(K: Tensor, T: Tensor, c: Tensor, lamb: float) -> Tensor:
    """c' = (lambda I + T' K T)^-1 T' K c for each row of ``c`` (n, d); same shape. ``K`` = sum W_0' W_0, W = W_0 T."""
    eye = torch.eye(len(K), dtype=K.dtype, device=K.device)
    c_new: Tensor = torch.linalg.solve(lamb * eye + T.T @ K @ T, T.T @ K @ c.T).T
    return c_new
