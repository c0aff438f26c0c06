"""What editors in closed form share: text states at the positions that count, least squares in float64, and what an edit did.

Vectors are rows here, so a set of n of them is (n, d), where the papers write columns. d is the width of the text states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .base import Task
from .errors import UnlearnError, UsageError

Tokens = Literal["all", "last"]
TEMPLATES: dict[str, tuple[str, ...]] = {
    "style": ("{}", "{} style", "an image in {} style", "{} image"),
    "object": ("{}", "a {}", "an image of a {}", "{} image"),
    "identity": ("{}", "a picture of {}", "a portrait of {}"),
    "nsfw": ("{}",),
}
BATCH = 16  # prompts in one call of the text encoder


class Reader(Protocol):
    """What reads text: the part of a text-to-image target that these editors need."""

    special: set[int]

    def tokens(self, prompts: Sequence[str]) -> Tensor: ...
    def encode(self, prompts: Any) -> Any: ...


# --- text ---------------------------------------------------------------------------------------------------------
def phrases(task: Task, templates: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(concept, guide) prompts, and the prompts to preserve, of which the empty one is the first.

    Empty ``templates`` are chosen by the kind of concept. An empty guide is the empty prompt in every template.
    """
    says = templates or TEMPLATES[task.kind]
    guides = [task.anchor(i) for i in range(len(task.concepts))]
    pairs = [(t.format(c), t.format(g) if g else "") for c, g in zip(task.concepts, guides, strict=True) for t in says]
    return pairs, ["", *(t.format(p) for p in task.preserve for t in says)]


def check_templates(templates: Sequence[str]) -> None:
    """Raise ``UsageError`` for a template without a place for the concept."""
    if any("{}" not in t for t in templates):
        raise UsageError("each template needs {} where the concept goes, for example 'an image of {}'")


def read(target: Reader, prompts: Iterable[str]) -> dict[str, tuple[Tensor, int]]:
    """By prompt, its text states (L, d) in float64 and the position of its last word's last token.

    That is the position of the end token for the empty prompt. Each prompt is encoded once, several in a call.
    """
    unique = list(dict.fromkeys(prompts))
    found: dict[str, tuple[Tensor, int]] = {}
    for start in range(0, len(unique), BATCH):
        part = unique[start : start + BATCH]
        for prompt, row, states in zip(part, target.tokens(part).tolist(), target.encode(part).states.double(), strict=True):
            found[prompt] = states, next((i for i in reversed(range(len(row))) if row[i] not in target.special), 1)
    return found


def aligned(target: Reader, pairs: Sequence[tuple[str, str]], tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Concept and guide vectors c and g (n, d), side by side from the last tokens on: through the padding, or those alone."""
    texts, concepts, guides = read(target, (p for pair in pairs for p in pair)), [], []
    for concept, guide in pairs:
        (c, i), (g, j) = texts[concept], texts[guide]
        n = min(len(c) - i, len(g) - j) if tokens == "all" else 1
        concepts.append(c[i : i + n])
        guides.append(g[j : j + n])
    return torch.cat(concepts), torch.cat(guides)


def toward(
    target: Reader, task: Task, templates: Sequence[str], guide: Sequence[str], tokens: Tokens, *, batch: int = 8
) -> tuple[Tensor, Tensor]:
    """Concept and guide vectors c and g (n, d) of every concept in every template, side by side from the concept's own last token on.

    g is the mean over the words of ``guide``, said in the same template in the concept's place; without any it is the concept's anchor.
    """
    concepts, guides = [], []
    for i, concept in enumerate(task.concepts):
        for start in range(0, len(templates), batch):
            says, words = templates[start : start + batch], list(guide) or [task.anchor(i)]
            texts = read(target, (t.format(w) if w else "" for t in says for w in (concept, *words)))
            at = ends(target, [t[: t.index("{}")] + w for t in says for w in (concept, *words)])
            for t in says:
                after = [texts[t.format(w) if w else ""][0][at[t[: t.index("{}")] + w] if w else 1 :] for w in (concept, *words)]
                n = min(len(x) for x in after) if tokens == "all" else 1
                concepts.append(after[0][:n])
                guides.append(torch.stack([x[:n] for x in after[1:]]).mean(0))
    return torch.cat(concepts), torch.cat(guides)


def ends(target: Reader, heads: Sequence[str]) -> dict[str, int]:
    """By text, the position of its last word's last token."""
    unique = list(dict.fromkeys(heads))
    rows = target.tokens(unique).tolist()
    return {h: next((i for i in reversed(range(len(r))) if r[i] not in target.special), 1) for h, r in zip(unique, rows, strict=True)}


def gathered(target: Reader, prompts: Sequence[str], tokens: Tokens, *, batch: int = 64) -> tuple[Tensor, int]:
    """What ``kept`` gives, as at most d vectors p (., d) with the same sum of p p', and how many vectors there were."""
    R, n = None, 0
    for start in range(0, len(prompts), batch):
        p = kept(target, prompts[start : start + batch], tokens)
        n += len(p)
        R = torch.linalg.qr(p if R is None else torch.cat([R, p]), mode="r")[1]
    if R is None:
        raise UsageError("there is nothing to preserve; name at least one prompt")
    return R, n


def kept(target: Reader, prompts: Sequence[str], tokens: Tokens) -> Tensor:
    """Vectors to preserve p (m, d): every position, or the last token of each prompt."""
    texts = read(target, prompts)
    return torch.cat([s if tokens == "all" else s[i : i + 1] for s, i in (texts[p] for p in prompts)])


# --- matrices -----------------------------------------------------------------------------------------------------
def check_matrices(who: str, w: Mapping[str, Tensor], d: int, params: str = "xattn-kv") -> None:
    """Raise ``UsageError`` unless every one of ``w`` is a matrix that reads text states of width ``d``."""
    if bad := [n for n, m in w.items() if m.dim() != 2]:
        raise UsageError(f"{who} rewrites matrices and '{bad[0]}' is none; use params {params}")
    if other := [n for n, m in w.items() if m.shape[1] != d]:
        raise UsageError(f"'{other[0]}' does not read text states of width {d}; use params {params}")


def solve(c: Tensor, g: Tensor, p: Tensor, *, alpha: float, beta: float, lamb: float) -> tuple[Tensor, Tensor]:
    """M (d, d) and the normal matrix B (d, d), so that W = W_old M minimises

        alpha sum ||W c - W_old g||^2 + beta sum ||W p - W_old p||^2 + lamb ||W - W_old||^2

    for every W_old: with A = alpha sum g c' + beta sum p p' + lamb I and B = alpha sum c c' + beta sum p p' + lamb I, M = A B^-1.
    Raises ``UnlearnError`` when the solution is not finite.
    """
    eye = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    keep = beta * p.T @ p + lamb * eye
    A = alpha * g.T @ c + keep  # (d, d)
    B = alpha * c.T @ c + keep  # (d, d), symmetric
    M = torch.linalg.solve(B, A.T).T
    if not torch.isfinite(M).all():
        raise UnlearnError("the normal equations have no finite solution; raise lamb or lower erase_scale")
    return M, B


def condition(B: Tensor) -> float:
    """2-norm condition number of a symmetric positive matrix."""
    values = torch.linalg.eigvalsh(B)
    return float(values[-1] / values[0])


def gram(w: Iterable[Tensor]) -> Tensor:
    """K = sum W' W (d, d) over all matrices, in float64."""
    parts = (m.double() for m in w)
    first = next(parts)
    K = first.T @ first
    for m in parts:
        K.addmm_(m.T, m)
    return K


def length(K: Tensor, x: Tensor) -> float:
    """sqrt(sum ||W x||^2) over all matrices behind ``K`` and all rows of ``x`` (n, d)."""
    return float(((x @ K) * x).sum().clamp(min=0).sqrt())


def effect(K: Tensor, T: Tensor, c: Tensor, g: Tensor, p: Tensor) -> dict[str, float]:
    """What the step from W_old to W_old T did, over all matrices together.

    ``change`` ||W - W_old|| / ||W_old||; ``erased`` ||W c - W_old g|| / ||W_old c - W_old g||; ``moved`` ||W p - W_old p|| / ||W_old p||.
    """
    step = T.T - torch.eye(len(T), dtype=T.dtype, device=T.device)
    gap = length(K, c - g)
    return {
        "change": length(K, step) / float(K.trace().sqrt()),
        "erased": length(K, c @ T.T - g) / gap if gap else 0.0,
        "moved": length(K, p @ step) / length(K, p),
    }
