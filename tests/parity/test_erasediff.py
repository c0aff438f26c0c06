"""EraseDiff's step, written a second time in float64 with the bare network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearners.base import Data, Task
from unlearners.methods.erasediff import EraseDiff
from unlearners.targets.classifier import Classifier
from unlearners.targets.ddpm import DDPM

TASK = Task(
    name="t", kind="class", concepts=("b",),
    forget=Data(source="tiny", rows="class=b"), retain=Data(source="tiny", rows="not class=b"),
)  # fmt: skip


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten().double() for t in tensors])


def gradient(loss: Tensor, w: list[Tensor]) -> Tensor:
    return flat(torch.autograd.grad(loss, w, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("rule", ["paper", "cosine", "constant"])
@pytest.mark.parametrize("eta", [0.1, 5.0])
def test_a_step_on_class_conditional_diffusion(rule: Any, eta: float) -> None:
    """f from its definition, both gradients in full, lambda number by number, and plain gradient descent."""
    target, lr = DDPM.tiny(seed=1), 0.05
    told: list[dict[str, float]] = []
    net = target.frozen().modules["unet"].double()
    w = [p.requires_grad_() for p in net.parameters()]
    theta = flat(w)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    goals: list[Tensor] = []
    eps, goal = target.eps, target.goal

    def seen(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        calls.append((x_t, t, cond.states))
        return eps(x_t, t, cond)

    def wanted(*parts: Any) -> Tensor:
        goals.append(goal(*parts))
        return goals[-1]

    target.eps, target.goal = seen, wanted  # type: ignore[method-assign, assignment]
    method = EraseDiff(rule=rule, eta=eta, lamb=0.3, inner=0, epochs=1, steps=1, batch=6, lr=lr, optimizer="sgd", clip=0.0)
    method(target, TASK, seed=3, log=told.append)

    def predict(k: int) -> Tensor:
        x_t, t, y = calls[k]
        return net(x_t.double(), t, class_labels=y[:, 0].long(), return_dict=False)[0]  # type: ignore[no-any-return]

    assert len(calls) == 3 and len(goals) == 1
    assert torch.equal(calls[1][0], calls[2][0]) and torch.equal(calls[1][1], calls[2][1])  # the same x_t and t
    assert (calls[2][2] == target.classes.index("b")).all() and not (calls[1][2] == target.classes.index("b")).any()
    L_r, f = (predict(0) - goals[0].double()).square().mean(), (predict(2) - predict(1).detach()).square().mean()
    g_r, g_f = gradient(L_r, w), gradient(f, w)
    dot = sum(a * b for a, b in zip(g_r.tolist(), g_f.tolist(), strict=True))
    size = sum(b * b for b in g_f.tolist())
    lam = {"constant": 0.3, "paper": max(0.0, (eta - dot) / size), "cosine": max(0.0, eta - dot / (size**0.5 * float(g_r.norm())))}[rule]
    assert told[0]["lambda"] == pytest.approx(lam, rel=1e-3, abs=1e-6)
    assert told[0]["loss"] == pytest.approx((L_r + lam * f).item(), rel=1e-4)
    moved = flat(target.modules["unet"].parameters()) - theta
    expected = -lr * (g_r + lam * g_f)
    assert torch.allclose(moved, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert lam > 0 or eta < 1


@pytest.mark.parametrize("restore", [True, False])
def test_an_epoch_goes_back_to_its_start(restore: bool) -> None:
    """Adam by hand: a pass on f, theta back (with ``restore`` Adam's moments too), and a step on L_r + lambda f."""
    target, lr, lam = Classifier.tiny(seed=2), 1e-3, 0.4
    net = target.frozen().modules["net"].double()
    w = [p.requires_grad_() for p in net.parameters()]
    theta = flat(w)
    batches: list[dict[str, Any]] = []
    loss = target.loss
    told: list[dict[str, float]] = []

    def seen(batch: Any) -> Tensor:
        batches.append(dict(batch))
        return loss(batch)

    target.loss = seen  # type: ignore[method-assign]
    method = EraseDiff(
        rule="constant", lamb=lam, inner=1, restore=restore, epochs=1, steps=1, batch=64, lr=lr, norm="freeze", labels="other"
    )
    method(target, TASK, seed=4, log=told.append)
    assert len(batches) == 3 and [set(r) for r in told] == [{"loss", "inner"}, {"loss", "retain", "forget", "lambda", "q"}]
    b = target.classes.index("b")
    assert not (batches[0]["y"] == b).any() and not (batches[2]["y"] == b).any()  # wrong labels of what is forgotten

    def of(k: int) -> Tensor:
        x = (batches[k]["x"].double() - target.mean.double()) / target.std.double()
        return F.cross_entropy(net(x), batches[k]["y"])

    g = [gradient(of(0), w), gradient(of(1), w) + lam * gradient(of(2), w)]  # both at theta, where the epoch began
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for i, step in enumerate(g, 1):
        if i == 2 and restore:
            m, v = torch.zeros_like(theta), torch.zeros_like(theta)
        m, v = 0.9 * m + 0.1 * step, 0.999 * v + 0.001 * step**2
        n = 1 if i == 2 and restore else i
        update = -lr * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
    moved = flat(target.modules["net"].parameters()) - theta
    sure = g[1].abs() > 1e-4 * g[1].abs().max()  # Adam's first step is a sign, which rounding decides near 0
    assert sure.float().mean() > 0.5
    assert torch.allclose(moved[sure], update[sure], rtol=1e-2, atol=1e-3 * lr)
    assert told[1]["q"] == pytest.approx((of(2) - of(0)).item(), rel=1e-3, abs=1e-6)
