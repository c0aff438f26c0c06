"""SPEED's step written a second time in numpy, in the paper's columns, with its inverses and its filter; without random copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from unlearners.base import Task
from unlearners.methods.speed import SPEED
from unlearners.targets.stable_diffusion import StableDiffusion

CONCEPTS, ANCHORS, KEEP = ("zq", "xw"), ("art", "k"), ("ink", "oil", "sky", "lo", "bee")
RHO, NULL = 0.6, 1e-2


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("xl", [False, True])
def test_speed_is_the_papers_equation(xl: bool, average: bool) -> None:
    target = StableDiffusion.tiny(seed=5, xl=xl)
    for module in target.modules.values():
        module.double()
    names = sorted(n for n in target.named() if ".attn2.to_v." in n)
    start = {n: p.detach().numpy().copy() for n, p in target.named().items()}

    def last(prompt: str) -> Any:
        with torch.no_grad():
            return target.encode([prompt]).states[0].numpy()[len(prompt)]

    C_1, C_s = np.stack([last(c) for c in CONCEPTS], 1), np.stack([last(a) for a in ANCHORS], 1)  # (d, n)
    C_0 = np.stack([last(k) for k in KEEP], 1)  # (d, m)
    with torch.no_grad():
        empty = target.encode([""]).states[0].numpy()
    centres = KMeans(3, n_init=10, random_state=0).fit(empty[1:]).cluster_centers_
    C_2 = np.concatenate([empty[:1], centres]).T  # (d, 4)
    n = len(CONCEPTS) if average else 1
    S, D, eye = C_1 @ C_1.T / n, (C_s @ C_1.T - C_1 @ C_1.T) / n, np.eye(len(C_1))
    shares = []
    SPEED(augment=0, null=NULL, rho=RHO, average=average)(target, Task(name="t", concepts=CONCEPTS, anchors=ANCHORS, preserve=KEEP))
    for name in names:
        W = start[name]
        moved = np.linalg.norm(W @ D @ np.linalg.inv(S + eye) @ C_0, axis=0)
        chosen = C_0[:, moved >= moved.mean()]
        shares.append(chosen.shape[1])
        U, values, _ = np.linalg.svd(chosen @ chosen.T / chosen.shape[1])
        P = U[:, values < NULL] @ U[:, values < NULL].T
        M = np.linalg.inv(S @ P + RHO * eye)
        Q = eye - M @ C_2 @ np.linalg.inv(C_2.T @ P @ M @ C_2) @ C_2.T @ P
        wanted = W + W @ D @ P @ Q @ M
        assert np.abs(target.named()[name].detach().numpy() - wanted).max() < 1e-7 * np.abs(wanted).max(), name
        assert np.linalg.norm(wanted - W) > 1e-3 * np.linalg.norm(W)
    assert min(shares) > 0
    assert max(shares) < len(KEEP)
    assert all(np.array_equal(p.detach().numpy(), start[n]) for n, p in target.named().items() if n not in names)
