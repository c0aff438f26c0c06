"""RECE written a second time in numpy: one matrix and one vector after the other, with inverses, editing the matrices themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from unlearners.base import Task
from unlearners.methods.rece import RECE
from unlearners.targets.stable_diffusion import StableDiffusion

CONCEPTS, GUIDES, KEEP = ("zq", "xw"), ("art", ""), ("ink", "k")
FORMS = ("{}", "a {} sky")
ALPHA, BETA, LAMB, LAMB_1, LAMB_2, DERIVE, ROUNDS = 1.5, 0.7, 0.3, 0.2, 0.4, 0.05, 2
Array = Any


def uce(matrices: list[Array], pairs: list[tuple[Array, Array]], kept: list[Array], beta: float, lamb: float) -> list[Array]:
    """(sum alpha W g c' + sum beta W p p' + lambda W)(sum alpha c c' + sum beta p p' + lambda I)^-1 for each W."""
    new = []
    for W in matrices:
        left, right = lamb * W, lamb * np.eye(W.shape[1])
        for c, g in pairs:
            left, right = left + ALPHA * np.outer(W @ g, c), right + ALPHA * np.outer(c, c)
        for p in kept:
            left, right = left + beta * np.outer(W @ p, p), right + beta * np.outer(p, p)
        new.append(left @ np.linalg.inv(right))
    return new


def derived(now: list[Array], start: list[Array], c: Array) -> Array:
    """(lambda I + sum W' W)^-1 (sum W' W_0) c."""
    left, right = DERIVE * np.eye(len(c)), np.zeros((len(c), len(c)))
    for W, W_0 in zip(now, start, strict=True):
        left, right = left + W.T @ W, right + W.T @ W_0
    return np.linalg.inv(left) @ right @ c


@pytest.mark.parametrize("positions", ["concept", "prompt"])
@pytest.mark.parametrize("xl", [False, True])
def test_rece_is_the_papers_loop(positions: Any, xl: bool) -> None:
    target = StableDiffusion.tiny(seed=2, xl=xl)
    for module in target.modules.values():
        module.double()
    names = sorted(target.select("xattn-kv"))
    start = [target.named()[n].detach().numpy().copy() for n in names]

    def states(prompt: str) -> Array:
        with torch.no_grad():
            return target.encode([prompt]).states[0].numpy()

    pairs, kept = [], []
    for concept, guide in zip(CONCEPTS, GUIDES, strict=True):
        for form in FORMS:
            said, instead = form.format(concept), form.format(guide) if guide else ""
            i, j = max(1, len(said.replace(" ", ""))), max(1, len(instead.replace(" ", "")))
            pairs += list(zip(states(said)[i:], states(instead)[j:], strict=False))
    for prompt in ["", *(form.format(p) for p in KEEP for form in FORMS)]:
        kept += list(states(prompt))
    attacked = pairs
    if positions == "prompt":
        attacked = [pair for c, g in zip(CONCEPTS, GUIDES, strict=True) for pair in zip(states(c), states(g), strict=True)]
    now = uce(start, pairs, kept, BETA, LAMB)
    for _ in range(ROUNDS):
        now = uce(now, [(derived(now, start, c), g) for c, g in attacked], kept, LAMB_1, LAMB_2)

    task = Task(name="t", concepts=CONCEPTS, anchors=GUIDES, preserve=KEEP)
    method = RECE(
        rounds=ROUNDS, derive=DERIVE, positions=positions, round_preserve=LAMB_1, round_lamb=LAMB_2, erase_scale=ALPHA,
        preserve_scale=BETA, lamb=LAMB, templates=FORMS,
    )  # fmt: skip
    method(target, task)
    for name, W, W_0 in zip(names, now, start, strict=True):
        assert np.abs(target.named()[name].detach().numpy() - W).max() < 1e-8 * np.abs(W).max(), name
        assert np.linalg.norm(W - W_0) > 1e-3 * np.linalg.norm(W_0)
