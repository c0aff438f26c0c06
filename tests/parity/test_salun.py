"""The gradient methods of SalUn's paper, each equation written a second time in float64 with the bare network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearners import saliency
from unlearners.base import Data, Task
from unlearners.methods.iu import IU
from unlearners.methods.salun import SalUn
from unlearners.methods.salun_soft import SalUnSoft
from unlearners.methods.ssd import SSD
from unlearners.targets.classifier import Classifier

TASK = Task(
    name="t",
    kind="samples",
    concepts=("t",),
    forget=Data(source="tiny", rows="random=11"),
    retain=Data(source="tiny", rows="not random=11"),
)


class Bare:
    """A twin of a tiny classifier in float64, and gradients of its loss on single pictures."""

    def __init__(self, target: Classifier, params: str) -> None:
        self.net = target.frozen().modules["net"].double()
        names = [n.partition(".")[2] for n in target.select(params)]
        self.w = [dict(self.net.named_parameters())[n].requires_grad_() for n in names]
        self.normal: Callable[[Tensor], Tensor] = lambda x: (x.double() - target.mean.double()) / target.std.double()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(self.normal(x)), y)

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(self.loss(x, y), self.w)])

    def each(self, examples: Any) -> Tensor:
        """(n, d): the gradient of every picture by itself."""
        rows = [examples.batch(torch.tensor([i])) for i in range(len(examples))]
        return torch.stack([self.gradient(b["x"], b["y"]) for b in rows])

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.w])


def ready(target: Classifier, params: str = "full") -> dict[str, Any]:
    for module in target.modules.values():
        module.eval()
    return dict(target.trainable(params))


def flat(weights: Any) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in weights.values()])


@pytest.mark.parametrize("statistic", ["abs_sum", "sum_abs", "sum_sq"])
def test_the_statistic_is_a_naive_loop(statistic: saliency.Statistic) -> None:
    target = Classifier.tiny(seed=2)
    bare, D_f = Bare(target, "full"), target.open(TASK.forget)
    g = bare.each(D_f)
    of = {"abs_sum": lambda: g.mean(0).abs(), "sum_abs": lambda: g.abs().mean(0), "sum_sq": lambda: g.square().mean(0)}
    batch = 4 if statistic == "abs_sum" else 1  # |sum g| does not depend on it, though the last batch is short
    got = flat(saliency.measure(ready(target), target.loss, D_f.batches(batch), statistic))
    wanted = of[statistic]()
    assert wanted.max() > 0
    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-4 * wanted.max().item())


def test_the_first_step_is_the_papers() -> None:
    """Mask by sorting |grad|, relabelled and retained cross-entropy, plain SGD on the masked weights; BatchNorm frozen."""
    target, lr, alpha, density = Classifier.tiny(seed=3), 0.1, 0.7, 0.25
    bare = Bare(target, "full")
    D_f, D_r = target.open(TASK.forget), target.open(TASK.retain)
    g = bare.each(D_f).mean(0).abs()
    mask = torch.zeros(len(g), dtype=torch.bool)
    mask[g.argsort(descending=True, stable=True)[: int(density * len(g))]] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        f, r = D_f.loader(8), D_r.loader(8)
        a = f.draw()
        y = (a["y"] + torch.randint(1, 4, a["y"].shape)) % 4
        b = r.draw()
    step = bare.gradient(a["x"], y) + alpha * bare.gradient(b["x"], b["y"]) + 5e-4 * bare.theta
    wanted = bare.theta - lr * step * mask
    rows: list[dict[str, float]] = []
    method = SalUn(steps=1, batch=8, forget_batch=8, lr=lr, alpha=alpha, density=density, norm="freeze")
    method(target, TASK, seed=6, log=rows.append)
    got = flat(target.named())
    near = (g - g[mask].min()).abs() < 1e-5 * g.max()  # float32 may rank these otherwise
    assert near.sum() < 0.01 * len(g)
    assert torch.allclose(got[~near], wanted[~near], rtol=1e-4, atol=1e-5)
    forget, retain = bare.loss(a["x"], y).item(), bare.loss(b["x"], b["y"]).item()
    assert rows[0]["forget"] == pytest.approx(forget, rel=1e-4)
    assert rows[0]["loss"] == pytest.approx(forget + alpha * retain, rel=1e-4)


def test_soft_shrinks_towards_the_original() -> None:
    target = Classifier.tiny(seed=3)
    theta_0, free = flat(target.named()), Classifier.tiny(seed=3)
    common: dict[str, Any] = {"steps": 1, "batch": 8, "lr": 0.1, "norm": "freeze"}
    SalUnSoft(rho=0.0, **common)(free, TASK, seed=6)
    SalUnSoft(rho=0.3, **common)(target, TASK, seed=6)
    delta = (flat(free.named()).float() - theta_0.float()).double()
    tau = delta.abs().sort().values[int(0.3 * len(delta)) - 1]
    wanted = theta_0 + delta.sign() * (delta.abs() - tau).clamp(min=0)
    assert torch.allclose(flat(target.named()), wanted, rtol=0, atol=1e-7)
    assert (flat(target.named()) == theta_0).double().mean() >= 0.29


@pytest.mark.parametrize("gigabytes", [1.0, 8e-6])
@pytest.mark.parametrize("lamb", [1.0, 1e-3])
def test_iu_is_the_dense_inverse_and_woodfishers_recursion(lamb: float, gigabytes: float) -> None:
    """Also when so few gradients fit that they are computed again: 8e-6 gigabytes hold 7 of the head's."""
    target = Classifier.tiny(seed=5)
    bare = Bare(target, "head")
    D_f, D_r = target.open(TASK.forget), target.open(TASK.retain)
    g_f, g_r = bare.each(D_f), bare.each(D_r)
    n_f, n_r, d = len(g_f), len(g_r), g_f.shape[1]
    assert 1e9 * gigabytes / (4 * d) > n_r or gigabytes < 1
    v = g_f.sum(0) / (n_f + n_r) - n_f / ((n_f + n_r) * n_r) * g_r.sum(0)
    method = IU(params="head", alpha=3.0, lamb=lamb, samples=20, gigabytes=gigabytes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        chosen = g_r[torch.randperm(n_r)[:20]]
    dense = torch.linalg.inv(lamb * torch.eye(d, dtype=torch.float64) + chosen.T @ chosen / 20) @ v
    inverse = torch.eye(d, dtype=torch.float64) / lamb
    for g in chosen:  # F_i^-1 = F_{i-1}^-1 - F_{i-1}^-1 g g' F_{i-1}^-1 / (m + g' F_{i-1}^-1 g)
        inverse -= torch.outer(inverse @ g, g @ inverse) / (20 + g @ inverse @ g)
    assert torch.allclose(inverse @ v, dense, rtol=1e-9)
    rows: list[dict[str, float]] = []
    method(target, TASK, seed=7, log=rows.append)
    got = flat(target.select("head")) - bare.theta
    assert (got - 3.0 * dense).norm() < 1e-3 * (3.0 * dense).norm()
    cosine = F.cosine_similarity(dense, v, dim=0).item()
    assert rows[0]["cosine"] == pytest.approx(cosine, abs=1e-4)
    assert lamb == 1.0 or cosine < 0.99, "the Fisher matrix must matter in this test"


def test_iu_release_is_ascent_along_v() -> None:
    target = Classifier.tiny(seed=5)
    bare = Bare(target, "full")
    g_f, g_r = bare.each(target.open(TASK.forget)), bare.each(target.open(TASK.retain))
    v = g_f.sum(0) / 64 - 11 / (64 * 53) * g_r.sum(0)
    gap = _gap(target)
    rows: list[dict[str, float]] = []
    IU(alpha=0.1, **IU.presets["release"])(target, TASK, seed=1, log=rows.append)
    got = flat(target.named()) - bare.theta
    assert (got - 0.1 * v).norm() < 3e-3 * 0.1 * v.norm()  # float32 against float64
    assert rows[0]["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert _gap(target) > gap


def _gap(target: Classifier) -> float:
    """How much higher the loss is on the forget set than on the rest: what v is the gradient of, up to a factor."""
    with torch.no_grad():
        f, r = (next(target.open(d).batches(99)) for d in (TASK.forget, TASK.retain))
        return (target.loss(f) - target.loss(r)).item()


@pytest.mark.parametrize("lamb", [1.0, 0.2])
def test_ssd_is_its_equation(lamb: float) -> None:
    target = Classifier.tiny(seed=5)
    bare = Bare(target, "full")
    theta = bare.theta
    i_f, i_r = bare.each(target.open(TASK.forget)).square(), bare.each(target.open(TASK.retain)).square()
    i_all, i_forget = torch.cat([i_f, i_r]).mean(0), i_f.mean(0)
    factor = (lamb * i_all / i_forget).clamp(max=1)
    where = i_forget > 1.2 * i_all
    rows: list[dict[str, float]] = []
    SSD(alpha=1.2, lamb=lamb, batch=1)(target, TASK, seed=1, log=rows.append)
    near = (i_forget / i_all - 1.2).abs() < 1e-3
    assert 0 < where.double().mean() < 1
    assert near.double().mean() < 0.05
    got, wanted = flat(target.named()), torch.where(where, factor * theta, theta)
    off = ~torch.isclose(got, wanted, rtol=1e-3, atol=1e-7)[~near]
    assert off.double().mean() < 0.03  # where float32 puts a ReLU on the other side, a gradient differs, and the processor decides that
    assert (got - wanted)[~near].norm() < 1e-2 * (wanted - theta)[~near].norm()
    assert rows[0]["chosen"] == pytest.approx(where.double().mean().item(), abs=0.05)
