"""ScissorHands' trimming and its projected step, written a second time in float64 with the bare network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearners.base import Data, Task
from unlearners.methods.scissorhands import Scissorhands
from unlearners.targets.classifier import Classifier

TASK = Task(
    name="t", kind="samples", concepts=("t",),
    forget=Data(source="tiny", rows="random=16"), retain=Data(source="tiny", rows="not random=16"),
)  # fmt: skip


def dual(G: Tensor, g: Tensor, margin: float, ridge: float) -> Tensor:
    """GEM's dual problem by projected gradient descent: slow, and of another kind than the one under test."""
    P, q = G @ G.T + ridge * torch.eye(len(G), dtype=torch.float64), G @ g
    v, step = torch.full_like(q, margin), 1 / float(torch.linalg.matrix_norm(P, 2))
    for _ in range(20_000):
        v = (v - step * (P @ v + q)).clamp(min=margin)
    return v


class Seen:
    """A tiny classifier whose losses are written down with the weights they were taken at; in float64 a second time."""

    def __init__(self) -> None:
        self.target = Classifier.tiny(seed=5)
        self.net = self.target.frozen().modules["net"].double()
        self.names = [n for n, _ in self.net.named_parameters()]
        self.calls: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        loss, net = self.target.loss, self.target.modules["net"]

        def seen(batch: Any) -> Tensor:
            self.calls.append((dict(batch), {n: p.detach().clone() for n, p in net.named_parameters()}))
            return loss(batch)

        self.target.loss = seen  # type: ignore[method-assign]

    def gradient(self, k: int) -> dict[str, Tensor]:
        """Of the k-th loss."""
        batch, at = self.calls[k]
        w = {n: t.double().requires_grad_() for n, t in at.items()}
        x = (batch["x"].double() - self.target.mean.double()) / self.target.std.double()
        loss = F.cross_entropy(torch.func.functional_call(self.net, w, (x,)), batch["y"])
        return dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))


@pytest.mark.parametrize("statistic", ["abs_sum", "sum_abs"])
@pytest.mark.parametrize("memories", [1, 3])
def test_trim_and_the_first_step(statistic: Any, memories: int) -> None:
    seen, lr, lam, margin, ridge = Seen(), 0.1, 0.02, 0.5, 1e-3
    told: list[dict[str, float]] = []
    method = Scissorhands(
        trim="", statistic=statistic, sparsity=0.9, prune_num=2, memory_num=memories, project=True, margin=margin, ridge=ridge, lamb=lam,
        epochs=1, steps=1, batch=8, lr=lr, optimizer="sgd", norm="freeze",
    )  # fmt: skip
    method(seen.target, TASK, seed=1, log=told.append)
    assert len(seen.calls) == 2 + memories + 2

    # SNIP by sorting
    norms = {n for n in seen.names if "Norm" in type(seen.net.get_submodule(n.rpartition(".")[0])).__name__}
    start, trimmed = seen.calls[0][1], seen.calls[2][1]
    free = [n for n in seen.names if n not in norms]
    one, two = seen.gradient(0), seen.gradient(1)
    s = {n: start[n].double().abs() * ((one[n] + two[n]).abs() if statistic == "abs_sum" else one[n].abs() + two[n].abs()) for n in free}
    ranked = sorted(((float(x), n, i) for n in free for i, x in enumerate(s[n].flatten())), reverse=True)
    top = {(n, i) for _, n, i in ranked[: len(ranked) // 10]}
    moved = {(n, i) for n in seen.names for i in (trimmed[n] != start[n]).flatten().nonzero().flatten().tolist()}
    near = {(n, i) for x, n, i in ranked if abs(x - ranked[len(top)][0]) < 1e-4 * ranked[0][0]}  # rounding decides there
    zeros = {(n, i) for n, i in top if not float(start[n].flatten()[i])}  # a bias of 0 starts anew at 0
    assert told[0]["trimmed"] == len(top)
    assert moved - near == top - near - zeros
    for n, i in moved:
        bound = start[n][0].numel() ** -0.5 if start[n].dim() > 1 else 0.0
        assert abs(float(trimmed[n].flatten()[i])) <= bound

    # the projected step
    def flat(g: dict[str, Tensor], names: list[str]) -> Tensor:
        return torch.cat([g[n].flatten() for n in names])

    L_r, L_f = seen.gradient(2 + memories), seen.gradient(3 + memories)
    g = {n: L_r[n] - lam * L_f[n] for n in seen.names}
    G = torch.stack([-flat(seen.gradient(2 + m), free) for m in range(memories)])
    dots = G @ flat(g, free)
    assert told[0]["projected"] == float((dots < 0).any()) == 1.0
    assert told[0]["cosine"] == pytest.approx(float((dots / G.norm(dim=1) / flat(g, free).norm()).min()), rel=1e-3)
    v = dual(G, flat(g, free), margin, ridge)
    if memories == 1:
        assert v.item() == pytest.approx(max(margin, -float(dots[0]) / (float(G[0] @ G[0]) + ridge)))
    pushed = flat(g, free) + G.T @ v
    at = flat({n: seen.calls[-1][1][n].double() for n in free}, free)
    now = flat({n: p.detach().double() for n, p in seen.target.modules["net"].named_parameters()}, free)
    expected = -lr * (pushed + 5e-4 * at)
    assert torch.allclose(now - at, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    for n in norms:  # g itself
        after = dict(seen.target.modules["net"].named_parameters())[n].detach().double()
        before = seen.calls[-1][1][n].double()
        assert torch.allclose(after - before, -lr * (g[n] + 5e-4 * before), rtol=1e-2, atol=1e-5)
