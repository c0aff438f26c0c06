"""Gradients of several losses side by side: what weighs or projects one by the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

Gradient = Sequence[Tensor]


def of(loss: Tensor, weights: Mapping[str, nn.Parameter]) -> tuple[Tensor, ...]:
    """The gradient of ``loss``, one tensor for each weight; 0 for weights that it does not depend on."""
    return torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)


def put(g: Gradient, weights: Mapping[str, nn.Parameter]) -> None:
    """Make ``g`` what the optimizer steps along."""
    for p, grad in zip(weights.values(), g, strict=True):
        p.grad = grad


def dot(a: Gradient, b: Gradient) -> float:
    """<a, b> over all tensors, summed in float64."""
    return sum(float((x.double() * y).sum()) for x, y in zip(a, b, strict=True))


def cosine(a: Gradient, b: Gradient) -> float:
    """cos(a, b); 0 where one of them is 0."""
    size = (dot(a, a) * dot(b, b)) ** 0.5
    return dot(a, b) / size if size else 0.0


def add(a: Gradient, b: Gradient, scale: float) -> tuple[Tensor, ...]:
    """a + scale b."""
    return tuple(x + scale * y for x, y in zip(a, b, strict=True))


def cone(gram: Tensor, along: Tensor, margin: float) -> Tensor:
    """v that minimizes v' (gram) v / 2 + v' along subject to v >= ``margin``, all (M,), float64: GEM's dual problem.

    Every set of bounds that may be active is tried, so the answer is exact; for M = 1 it is max(margin, -along / gram). ``gram`` must be
    positive definite. Raises ``ValueError`` above M = 12, where that is 4096 sets.
    """
    m = len(along)
    if m > 12:
        raise ValueError(f"{m} memories are too many for an exact solution")
    best, least = torch.full_like(along, margin), float("inf")
    for size in range(m + 1):
        for free in map(list, combinations(range(m), size)):
            v = torch.full_like(along, margin)
            held = [i for i in range(m) if i not in free]
            if free:
                right = -along[free] - (gram[free][:, held] @ v[held] if held else 0)
                v[free] = torch.linalg.solve(gram[free][:, free], right)
            value = float(v @ gram @ v / 2 + v @ along)
            if bool((v >= margin - 1e-12).all()) and value < least:
                best, least = v, value
    return best


def project(g: Gradient, memories: Sequence[Gradient], margin: float, ridge: float) -> tuple[tuple[Tensor, ...], Tensor]:
    """g + sum v_m g_m with ``cone``'s v, and v (M,): no step along it raises a memory's loss, up to ``ridge``."""
    gram = torch.tensor([[dot(a, b) for b in memories] for a in memories], dtype=torch.float64)
    v = cone(gram + ridge * torch.eye(len(memories), dtype=torch.float64), torch.tensor([dot(g, m) for m in memories]).double(), margin)
    found = tuple(g)
    for scale, memory in zip(v.tolist(), memories, strict=True):
        found = add(found, memory, scale)
    return found, v
