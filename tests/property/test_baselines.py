"""The baselines of SalUn: each paper's equation a second time in float64, and what must hold whatever the numbers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearners import data, registry, session
from unlearners.base import Data, Target, Task, settle
from unlearners.data import Loader
from unlearners.errors import UsageError
from unlearners.methods.boundary_expand import BoundaryExpand
from unlearners.methods.boundary_shrink import BoundaryShrink
from unlearners.methods.ft import FT
from unlearners.methods.ga import GA
from unlearners.methods.l1_sparse import L1Sparse
from unlearners.methods.neggrad_plus import NegGradPlus
from unlearners.methods.rl import RL
from unlearners.methods.salun import SalUn
from unlearners.methods.salun_soft import SalUnSoft
from unlearners.methods.scrub import SCRUB
from unlearners.targets.base import Trainable
from unlearners.targets.classifier import Classifier
from unlearners.targets.ddpm import DDPM

# 22 forgotten (batches of 20 and 2) and 42 kept (20, 20 and 2) of 64 pictures
TASK = Task(
    name="t",
    kind="samples",
    concepts=("t",),
    forget=Data(source="tiny", rows="random=22"),
    retain=Data(source="tiny", rows="not random=22"),
)
QUICK: dict[str, Any] = {"epochs": 2, "batch": 20, "lr": 0.01}
FORGET_ONLY, RETAIN_ONLY = replace(TASK, retain=Data()), replace(TASK, forget=Data())
BOTH = (RL, NegGradPlus, SCRUB)
NAMES = ("ft", "rl", "ga", "neggrad_plus", "l1_sparse", "scrub", "boundary_shrink", "boundary_expand")


@dataclass
class Spy:
    """One run: the batches it drew (as relabelled), from which set, what it logged, what it trained and checkpointed."""

    target: Any
    batches: list[dict[str, Any]] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    states: tuple[Any, ...] = ()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Spy]:
    """``run(method)``: the method on a tiny target of its own, spied upon."""
    draw, relabel, steps = Loader.draw, Trainable.relabel, Target.steps

    def go(method: Any, *, task: Task = TASK, target: Any = None) -> Spy:
        spy = Spy(target if target is not None else Classifier.tiny())

        def see(self: Loader) -> Any:
            spy.batches.append(draw(self))
            spy.sets.append("forget" if len(self.examples) == 22 else "retain")
            return spy.batches[-1]

        def change(self: Any, batch: Any, policy: Any = "other") -> Any:
            told = relabel(self, batch, policy)
            if "forget" in spy.batches[-1]:  # one batch of both sets
                spy.batches[-1] = {**spy.batches[-1], "forget": told}
                return told
            spy.batches[-1] = {**told, "was": batch["y"], "policy": policy}
            return spy.batches[-1]

        def count(self: Any, total: int, *states: Any) -> Iterator[int]:
            spy.states = states
            return steps(self, total, *states)

        monkeypatch.setattr(Loader, "draw", see)
        monkeypatch.setattr(Trainable, "relabel", change)
        monkeypatch.setattr(Target, "steps", count)
        method(spy.target, task, seed=3, log=spy.rows.append)
        return spy

    return go


def weights(target: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in target.named().items()}


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[n].double() - b[n].double()).square().sum() for n in a)) ** 0.5


# --- the equations, a second time ---------------------------------------------------------------------------------
class Naive:
    """The tiny classifier in float64 with SGD written out."""

    def __init__(self, method: Any, batches: list[dict[str, Any]], extra: nn.Module | None = None) -> None:
        tiny = Classifier.tiny()
        self.method: Any = settle(method, tiny, TASK)
        self.mean, self.std = tiny.mean.double(), tiny.std.double()
        self.net, self.old = deepcopy(tiny.modules["net"]).double().train(), deepcopy(tiny.modules["net"]).double()
        self.extra = nn.Module() if extra is None else deepcopy(extra).double()
        self.theta = [*self.net.parameters(), *self.extra.parameters()]
        for p in self.theta:
            p.requires_grad_()
        self.speed = [torch.zeros_like(p) for p in self.theta]
        self.draws = iter(batches)

    def take(self) -> tuple[Tensor, Tensor]:
        batch = next(self.draws)
        return batch["x"].double(), batch["y"]

    def f(self, x: Tensor, net: nn.Module | None = None) -> Tensor:
        out: Tensor = (net or self.net)((x - self.mean) / self.std)
        return out

    def ce(self) -> Tensor:
        """-log p_y, averaged over the next batch."""
        x, y = self.take()
        return -torch.stack([z[k] - z.exp().sum().log() for z, k in zip(self.f(x), y, strict=True)]).mean()

    def distance(self, x: Tensor, T: float) -> tuple[Tensor, Tensor]:
        z = self.f(x)
        p, q = (self.f(x, self.old) / T).softmax(1), (z / T).softmax(1)
        return T * T * (p * (p / q).log()).sum(1).mean(), z

    def step(self, loss: Tensor) -> None:
        m = self.method
        for p, v, g in zip(self.theta, self.speed, torch.autograd.grad(loss, self.theta), strict=True):
            v.mul_(m.momentum).add_(g + m.weight_decay * p.detach())
            p.data -= m.lr * v


def ft(n: Naive, i: int) -> Tensor:
    return n.ce()


def rl_mixed(n: Naive, i: int) -> Tensor:
    """One batch of both sets, the forgotten ones with wrong labels, in one pass through the network."""
    both = next(n.draws)
    x = torch.cat([both[k]["x"] for k in ("forget", "retain") if k in both]).double()
    y = torch.cat([both[k]["y"] for k in ("forget", "retain") if k in both])
    return -n.f(x).log_softmax(1)[torch.arange(len(y)), y].mean()


def rl(n: Naive, i: int) -> Tensor:
    first = n.ce()  # the forget batch is drawn first, and recorded with the labels it was given
    alpha = n.method.alpha or 42 / 22
    return first + alpha * n.ce() if n.method.order == "joint" else first


def ga(n: Naive, i: int) -> Tensor:
    return -n.ce()


def neggrad(n: Naive, i: int) -> Tensor:
    forget, a = n.ce(), n.method.alpha
    return a * n.ce() - (1 - a) * forget


def l1(n: Naive, i: int) -> Tensor:
    e, E = i // 3, n.method.epochs
    a = n.method.alpha * (1 - e / (E - n.method.free)) if e < E - n.method.free else 0.0
    size = torch.zeros((), dtype=torch.float64)
    for p in n.theta:
        size = size + p.abs().sum()
    return n.ce() + a * size


def scrub(n: Naive, i: int) -> Tensor:
    m = n.method
    x, y = n.take()
    d, z = n.distance(x, m.temperature)
    if i in (0, 1):  # the two forget batches of the only max epoch
        return -d
    return m.alpha * d + m.gamma * -z.log_softmax(1)[torch.arange(len(y)), y].mean()


def shrink(n: Naive, i: int) -> Tensor:
    x, y = n.take()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(-n.f(x, n.old).log_softmax(1)[torch.arange(len(y)), y].mean(), x)
    near = n.f((x.detach() + n.method.bound * slope.sign()).clamp(0, 1), n.old)
    names = [
        max((k for k in range(4) if k != t or not n.method.incorrect), key=lambda k, z=z: float(z[k])) for z, t in zip(near, y, strict=True)
    ]
    return -n.f(x.detach()).log_softmax(1)[torch.arange(len(y)), torch.tensor(names)].mean()


def expand(n: Naive, i: int) -> Tensor:
    x, _ = n.take()
    net: Any = n.net
    head, u = net.fc, n.extra
    assert isinstance(u, nn.Linear)
    net.fc = nn.Identity()
    h = n.f(x)
    net.fc = head
    z = h @ torch.cat([head.weight, u.weight]).T + torch.cat([head.bias, u.bias])  # (B, 5)
    return -z.log_softmax(1)[:, 4].mean()


CASES: dict[str, tuple[Any, Callable[[Naive, int], Tensor], Task]] = {
    "ft": (FT(**QUICK), ft, RETAIN_ONLY),
    "rl": (RL(**QUICK, alpha=0.7), rl, TASK),
    "rl-release": (RL(**QUICK, **RL.presets["release"]), rl, TASK),
    "rl-each-alike": (RL(**QUICK, alpha=0.0), rl, TASK),
    "rl-mixed": (RL(**QUICK, order="mixed"), rl_mixed, TASK),
    "salun-mixed": (SalUn(**QUICK, order="mixed", mask="all"), rl_mixed, TASK),
    "salun_soft-mixed": (SalUnSoft(**QUICK, order="mixed", rho=0.0), rl_mixed, TASK),
    "ga": (GA(**QUICK), ga, FORGET_ONLY),
    "neggrad_plus": (NegGradPlus(**QUICK, alpha=0.8), neggrad, TASK),
    "l1_sparse": (L1Sparse(**(QUICK | {"epochs": 3}), alpha=1e-3, free=1), l1, RETAIN_ONLY),
    "scrub": (SCRUB(**QUICK, max_epochs=1, decay=(), optimizer="sgd", weight_decay=0.01), scrub, TASK),
    "boundary_shrink": (BoundaryShrink(**QUICK), shrink, FORGET_ONLY),
    "boundary_shrink-release": (BoundaryShrink(**QUICK, incorrect=False, bound=0.02), shrink, FORGET_ONLY),
    "boundary_expand": (BoundaryExpand(**QUICK), expand, FORGET_ONLY),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_paper_s_equation(name: str, run: Callable[..., Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    """Same batches, float64, no library code in the loss or the update: the same losses and the same weights."""
    method, equation, task = CASES[name]
    made: list[nn.Linear] = []
    linear = nn.Linear.__init__

    def remember(self: nn.Linear, *args: Any, **how: Any) -> None:
        linear(self, *args, **how)
        made.append(deepcopy(self))

    start = Classifier.tiny()
    target = Classifier.tiny()
    target.modules["net"].double()
    with monkeypatch.context() as patch:  # the method in float64 too, so that no difference can be rounding
        patch.setattr(Tensor, "float", Tensor.double)
        patch.setattr(nn.Linear, "__init__", remember)
        torch.set_default_dtype(torch.float64)
        try:
            spy = run(method, task=task, target=target)
        finally:
            torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in target.named().values()} == {torch.float64}
    assert len(made) == (name == "boundary_expand")
    naive = Naive(method, spy.batches, made[0] if made else None)
    for i, row in enumerate(spy.rows):
        loss = equation(naive, i)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-9, abs=1e-12), i
        naive.step(loss)
    assert next(naive.draws, None) is None  # every batch that was drawn was used
    found = {f"net.{n}": p.detach() for n, p in naive.net.named_parameters()}
    moved = gap(found, weights(start))
    assert moved > 1e-3
    assert gap(found, weights(spy.target)) < 1e-8 * moved
    naive_norms, norms = dict(naive.net.named_buffers()), dict(spy.target.modules["net"].named_buffers())
    for n, b in norms.items():
        assert torch.allclose(b.double(), naive_norms[n].double(), rtol=1e-9, atol=1e-9), n


# --- which data, and how often ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["ft", "ga", "l1_sparse", "boundary_shrink", "boundary_expand"])
def test_one_set_is_enough(name: str, run: Callable[..., Spy]) -> None:
    wanted = "retain" if name in ("ft", "l1_sparse") else "forget"
    method = registry.make("methods", name, **QUICK)
    spy = run(method, task=RETAIN_ONLY if wanted == "retain" else FORGET_ONLY)
    assert set(spy.sets) == {wanted}
    assert len(spy.rows) == 2 * (3 if wanted == "retain" else 2)
    with pytest.raises(UsageError, match="data"):
        run(method, task=FORGET_ONLY if wanted == "retain" else RETAIN_ONLY)


@pytest.mark.parametrize("kind", BOTH)
def test_both_sets_are_needed(kind: Any, run: Callable[..., Spy]) -> None:
    for task in (FORGET_ONLY, RETAIN_ONLY):
        with pytest.raises(UsageError, match="data"):
            run(kind(**QUICK), task=task)


def test_a_joint_epoch_is_a_pass_over_what_is_kept_and_the_forget_set_begins_again(run: Callable[..., Spy]) -> None:
    for method in (RL(**QUICK, forget_batch=20), NegGradPlus(**QUICK)):
        spy = run(method)
        assert spy.sets == ["forget", "retain"] * 6
        kept = [b["rows"].tolist() for b, s in zip(spy.batches, spy.sets, strict=True) if s == "retain"]
        for epoch in (kept[:3], kept[3:]):
            assert sorted(row for rows in epoch for row in rows) == list(range(42))
        assert [len(b["rows"]) for b, s in zip(spy.batches, spy.sets, strict=True) if s == "forget"] == [20, 2] * 3


def test_a_joint_epoch_is_also_a_pass_over_the_forget_set(run: Callable[..., Spy]) -> None:
    """22 of 64 are forgotten, so 20 retained examples go with 10 forgotten ones; 16 are the fewest."""
    for batch, expected in ((20, [16, 6, 16]), (40, [21, 1])):
        spy = run(RL(**(QUICK | {"batch": batch, "epochs": 1})))
        assert [len(b["rows"]) for b, s in zip(spy.batches, spy.sets, strict=True) if s == "forget"] == expected


def test_a_sequential_epoch_is_a_pass_over_each_with_one_step_for_each_batch(run: Callable[..., Spy]) -> None:
    spy = run(RL(**QUICK, **RL.presets["release"]))
    assert spy.sets == (["forget"] * 2 + ["retain"] * 3) * 2
    assert [set(r) for r in spy.rows] == ([{"loss", "forget"}] * 2 + [{"loss", "retain"}] * 3) * 2
    for epoch in (spy.batches[:2], spy.batches[5:7]):
        assert sorted(row for b in epoch for row in b["rows"].tolist()) == list(range(22))
    assert not torch.equal(spy.batches[0]["y"], spy.batches[5]["y"])


@pytest.mark.parametrize("name", ["ft", "rl", "ga", "neggrad_plus", "l1_sparse", "boundary_shrink", "boundary_expand"])
def test_steps_replace_epochs(name: str, run: Callable[..., Spy]) -> None:
    assert len(run(registry.make("methods", name, **QUICK, steps=1)).rows) == 1
    assert len(run(registry.make("methods", name, **QUICK, steps=7)).rows) == 7


def test_a_mixed_epoch_shows_every_example_once(run: Callable[..., Spy]) -> None:
    """22 + 42 examples in batches of 20 are 4 steps; the forgotten ones are wrong, the rest right."""
    spy = run(RL(**QUICK, order="mixed"))
    assert len(spy.rows) == 2 * 4
    for epoch in (spy.batches[:4], spy.batches[4:]):
        for name, n in (("forget", 22), ("retain", 42)):
            rows = torch.cat([b[name]["rows"] for b in epoch if name in b])
            assert rows.sort().values.tolist() == list(range(n))
    true = Classifier.tiny().open(TASK.forget).labels
    told = [b["forget"] for b in spy.batches if "forget" in b]
    assert all((b["y"] != true[b["rows"]]).all() for b in told)
    assert len({len(b["y"]) for b in told}) > 1  # shuffled together, not a fixed share


# --- labels -------------------------------------------------------------------------------------------------------
def test_only_the_forget_set_is_relabelled_and_by_the_policy(run: Callable[..., Spy]) -> None:
    for labels in ("other", "any", "next"):
        spy = run(RL(**QUICK, labels=labels))
        for batch, which in zip(spy.batches, spy.sets, strict=True):
            assert ("was" in batch) == (which == "forget")
            assert batch.get("policy", labels) == labels
        was, now = (torch.cat([b[k] for b in spy.batches if "was" in b]) for k in ("was", "y"))
        true = (was == now).float().mean()
        assert 0.05 < true < 0.5 if labels == "any" else true == 0
        if labels == "next":
            assert torch.equal(now, (was + 1) % 4)


def test_the_neighbour_is_within_reach_and_never_the_own_class() -> None:
    old, y = Classifier.tiny(), torch.arange(4).repeat(8)
    x = torch.rand(32, 3, 16, 16)
    seen: list[Tensor] = []
    logits = old.logits
    old.logits = lambda x: (seen.append(x.detach()), logits(x))[1]  # type: ignore[method-assign]
    near, crossed = BoundaryShrink().neighbour(old, x, y)
    assert torch.equal(seen[0], x)
    inside = (x > 0.1) & (x < 0.9)
    assert torch.allclose((seen[1] - x).abs()[inside], torch.tensor(0.1), atol=1e-6)  # the sign of the slope, not the slope
    assert (seen[1] - x).abs().max() <= 0.1 + 1e-6
    assert seen[1].min() >= 0 and seen[1].max() <= 1
    assert (near != y).all()
    plain, same = BoundaryShrink(incorrect=False).neighbour(old, x, y)
    assert torch.equal(crossed, same) and torch.equal(plain != y, crossed)
    assert torch.equal(plain[crossed], near[crossed])
    seen.clear()
    BoundaryShrink(bound=1e-3).neighbour(old, x, y)
    with torch.no_grad():
        before, after = (F.cross_entropy(logits(z), y) for z in seen)
    assert after > before  # one step up the loss


# --- what they do -------------------------------------------------------------------------------------------------
def accuracy(target: Any, asked: Data) -> tuple[float, float]:
    """Accuracy and cross-entropy of a classifier on ``asked``."""
    z, y = target.predict(target.open(asked))
    return float((z.argmax(1) == y).float().mean()), float(F.cross_entropy(z, y))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """A tiny classifier that has learnt all 64 pictures, without augmentation: their classes are quarters, and a flip swaps those."""
    monkeypatch.setattr(data, "shifted", lambda x, *how, **named: data.tidy(x))
    target = Classifier.tiny()
    FT(epochs=15, batch=16, lr=0.05)(target, replace(TASK, retain=Data(source="tiny")), seed=0)
    assert accuracy(target, Data(source="tiny"))[0] > 0.9
    return target


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("ft", "l1_sparse")])
def test_it_forgets(name: str, trained: Classifier) -> None:
    """Forgetting a class: what forgets on purpose raises that class's loss, and what is told to keep the rest does so."""
    task = replace(TASK, forget=Data(source="tiny", rows="class=a"), retain=Data(source="tiny", rows="not class=a"))
    target = trained.frozen()
    lr = {"scrub": 5e-3}.get(name, 0.01)
    extra: dict[str, Any] = {"weight_decay": 0.0} if name == "scrub" else {}
    registry.make("methods", name, epochs=5, batch=16, lr=lr, **extra)(target, task, seed=0)
    assert accuracy(target, task.forget)[1] > 2 * accuracy(trained, task.forget)[1]
    if name in ("rl", "neggrad_plus", "scrub"):
        assert accuracy(target, task.retain)[0] >= 0.85


def test_no_penalty_is_fine_tuning(run: Callable[..., Spy]) -> None:
    a, b = run(L1Sparse(**QUICK, alpha=0.0)).target, run(FT(**QUICK)).target
    assert gap(weights(a), weights(b)) < 1e-6


def test_the_penalty_fades_and_shrinks_the_weights(run: Callable[..., Spy]) -> None:
    spy = run(L1Sparse(**(QUICK | {"epochs": 5}), alpha=0.05, free=1))
    told = [0.05 * a for a in (1, 0.75, 0.5, 0.25, 0)]
    assert [r["alpha"] for r in spy.rows] == pytest.approx([a for a in told for _ in range(3)])
    plain = run(L1Sparse(**(QUICK | {"epochs": 5}), alpha=0.0))
    assert spy.rows[-1]["norm"] < 0.9 * plain.rows[-1]["norm"]
    assert spy.rows[0]["norm"] == pytest.approx(float(sum(p.abs().sum() for p in Classifier.tiny().named().values())), rel=1e-5)
    by_steps = run(L1Sparse(**QUICK, alpha=0.01, steps=4))  # two epochs have begun
    assert [r["alpha"] for r in by_steps.rows] == pytest.approx([0.01] * 3 + [0.005])


def test_all_the_weight_on_one_side(run: Callable[..., Spy]) -> None:
    """NegGrad+ at alpha = 1 has no gradient of the forget set and at alpha = 0 none of the rest."""
    for alpha, part in ((1.0, "retain"), (0.0, "forget")):
        for row in run(NegGradPlus(**QUICK, alpha=alpha)).rows:
            assert row["loss"] == pytest.approx(row[part] * (1 if alpha else -1))


@pytest.mark.parametrize("kind", [RL, SalUn, SalUnSoft])
def test_alpha_0_weighs_every_example_alike(kind: Any, run: Callable[..., Spy]) -> None:
    for row in run(kind(**QUICK, alpha=0.0)).rows:
        assert row["loss"] == pytest.approx(row["forget"] + 42 / 22 * row["retain"], rel=1e-5)


def test_the_student_starts_as_its_teacher(run: Callable[..., Spy]) -> None:
    rows = run(SCRUB(**QUICK, norm="freeze", weight_decay=0.0, decay=())).rows
    assert rows[0]["distance_forget"] == pytest.approx(0, abs=1e-6)
    assert all(r.get("distance", r.get("distance_forget")) > -1e-6 for r in rows)


def test_max_epochs_come_first_and_the_rate_falls(run: Callable[..., Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1])
    spy = run(SCRUB(epochs=4, max_epochs=2, decay=(1, 3), batch=20, lr=1e-3))
    assert spy.sets == (["forget"] * 2 + ["retain"] * 3) * 2 + ["retain"] * 6
    assert rates == pytest.approx([1e-3] * 5 + [1e-4] * 8 + [1e-5] * 3)


def test_the_extra_class_never_enters_the_model_and_is_checkpointed(run: Callable[..., Spy]) -> None:
    target = Classifier.tiny()
    shapes = {n: tuple(v.shape) for n, v in target.modules["net"].state_dict().items()}
    spy = run(BoundaryExpand(**(QUICK | {"epochs": 10, "lr": 0.05})), target=target)
    assert {n: tuple(v.shape) for n, v in target.modules["net"].state_dict().items()} == shapes
    assert target.logits(torch.rand(2, 3, 16, 16)).shape == (2, 4)
    (row,) = [s for s in spy.states if isinstance(s, nn.Linear)]
    assert row.weight.shape == (1, target.head.in_features)
    assert spy.rows[-2]["shadow"] > 0.9  # of the last whole batch
    assert spy.rows[-1]["loss"] < 0.5 * spy.rows[0]["loss"]


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_kept_between_steps_is_checkpointed(name: str, run: Callable[..., Spy]) -> None:
    spy = run(registry.make("methods", name, **QUICK))
    kinds = [type(s) for s in spy.states]
    assert sum(issubclass(k, torch.optim.Optimizer) for k in kinds) == 1
    assert sum(issubclass(k, Loader) for k in kinds) == len(set(spy.sets))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and statistics bit for bit, so nothing that counts (the teacher, the extra row, the rate) lives outside the checkpoint."""
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", 0.0)
    method = registry.make("methods", name, **QUICK)

    def stop(row: Any) -> None:
        """The third step is lost: it is logged before its checkpoint is written."""
        seen.append(row)
        if len(seen) == 3:
            raise KeyboardInterrupt

    whole, first, second = (Classifier.tiny() for _ in range(3))
    method(whole, TASK, seed=3)
    seen: list[Any] = []
    first.session = session.FolderSession(tmp_path, None)
    with pytest.raises(KeyboardInterrupt):
        method(first, TASK, seed=3, log=stop)
    second.session = session.FolderSession(tmp_path, None)
    rest: list[Any] = []
    method(second, TASK, seed=3, log=rest.append)
    assert rest[0] == seen[2]
    state, wanted = second.modules["net"].state_dict(), whole.modules["net"].state_dict()
    assert [n for n in wanted if not torch.equal(state[n], wanted[n])] == []
    assert not torch.equal(wanted["fc.weight"], first.modules["net"].state_dict()["fc.weight"])


# --- common settings ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_batch_normalisation_is_updated_or_frozen(name: str, run: Callable[..., Spy]) -> None:
    start = dict(Classifier.tiny().modules["net"].named_buffers())
    for norm in ("update", "freeze"):
        found = dict(run(registry.make("methods", name, **QUICK, norm=norm)).target.modules["net"].named_buffers())
        same = {torch.equal(found[n], start[n]) for n in start}
        assert same == {norm == "freeze"}, norm


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_selected_moves(name: str, run: Callable[..., Spy]) -> None:
    start = weights(Classifier.tiny())
    moved = {
        n for n, p in weights(run(registry.make("methods", name, **QUICK, params="head")).target).items() if not torch.equal(p, start[n])
    }
    assert moved == {"net.fc.weight", "net.fc.bias"}


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_clipped(name: str, run: Callable[..., Spy]) -> None:
    """Plain SGD cannot move further than lr times the largest norm in each step."""
    spy = run(registry.make("methods", name, **QUICK, optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=1e-3))
    moved = gap(weights(spy.target), weights(Classifier.tiny()))
    assert 0 < moved <= 1.01 * 0.01 * 1e-3 * len(spy.rows) + 1e-6  # float32 rounds each of the steps


@pytest.mark.parametrize("name", NAMES)
def test_the_presets(name: str) -> None:
    kind = registry.get("methods", name)
    assert registry.make("methods", name, preset="paper") == kind()
    assert registry.make("methods", name, preset="short").epochs <= 2
    assert ("ddpm" in kind.presets) == issubclass(DDPM, kind.needs)
    if "ddpm" in kind.presets:
        assert registry.make("methods", name, preset="ddpm").steps == 1000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch": 0}, {"clip": -1.0}])
def test_impossible_budgets_are_refused(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least"):
        registry.get("methods", name)(**wrong)


def test_impossible_weights_are_refused(run: Callable[..., Spy]) -> None:
    for make in (
        lambda: NegGradPlus(alpha=1.5),
        lambda: SCRUB(temperature=0.0),
        lambda: RL(alpha=-1.0),
        lambda: BoundaryShrink(bound=-0.1),
    ):
        with pytest.raises(UsageError):
            make()
    with pytest.raises(UsageError, match="free"):
        run(L1Sparse(**QUICK, free=2))


@pytest.mark.parametrize("name", ["scrub", "boundary_shrink", "boundary_expand"])
def test_what_needs_logits_refuses_diffusion(name: str) -> None:
    with pytest.raises(UsageError, match="needs an image classifier"):
        registry.make("methods", name)(DDPM.tiny(), TASK)


# --- diffusion ----------------------------------------------------------------------------------------------------
def test_on_diffusion_the_relabelled_prediction_is_taught(run: Callable[..., Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    """The forget batch says whose prediction to take over; the retained one is trained on the noise."""
    batches: list[Any] = []
    loss = DDPM.loss

    def listen(self: Any, batch: Any) -> Tensor:
        batches.append(batch)
        return loss(self, batch)

    monkeypatch.setattr(DDPM, "loss", listen)
    run(RL(**(QUICK | {"lr": 1e-4}), labels="next", steps=2, optimizer="adam"), target=DDPM.tiny())
    assert ["toward" in b for b in batches] == [True, False] * 2
    assert all(torch.equal(b["toward"], (b["y"] + 1) % 4) for b in batches[::2])


def test_on_diffusion_a_mixed_step_is_the_mean_over_its_examples(run: Callable[..., Spy]) -> None:
    spy = run(RL(**(QUICK | {"lr": 1e-4}), order="mixed", steps=3, optimizer="adam"), target=DDPM.tiny())
    for row, batch in zip(spy.rows, spy.batches, strict=True):
        n = {name: len(batch[name]["y"]) for name in ("forget", "retain")}
        assert row["loss"] == pytest.approx(sum(n[k] * row[k] for k in n) / sum(n.values()), rel=1e-5)


@pytest.mark.parametrize("drop", ["retain", "both"])
def test_labels_drop_in_both_passes_of_forgetting_when_asked(drop: Any, run: Callable[..., Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    """The null class (4) in the passes that forget; SalUn's release drops in each by itself."""
    monkeypatch.setattr(DDPM, "loss", loss := DDPM.loss)
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    eps, forgetting = DDPM.eps, [False]

    def listen(self: Any, batch: Any) -> Tensor:
        forgetting[0] = "toward" in batch
        return loss(self, batch)

    def note(self: Any, x_t: Tensor, t: Any, cond: Any) -> Tensor:
        if forgetting[0]:
            seen[torch.is_grad_enabled()].append(cond.states[:, 0])
        return eps(self, x_t, t, cond)

    monkeypatch.setattr(DDPM, "loss", listen)
    monkeypatch.setattr(DDPM, "eps", note)
    run(RL(**(QUICK | {"lr": 1e-5}), drop=drop, steps=12, forget_batch=22, optimizer="adam"), target=DDPM.tiny())
    taught, goal = (torch.cat(seen[grad]) == 4 for grad in (True, False))
    assert len(taught) == len(goal) == 12 * 22
    for dropped in (taught, goal):
        assert 0.04 < dropped.double().mean() < 0.18 if drop == "both" else not dropped.any()
    assert drop == "retain" or (taught != goal).any()


@pytest.mark.parametrize("name", ["ft", "ga"])
def test_on_diffusion_the_noise_error_falls_and_rises(name: str, run: Callable[..., Spy]) -> None:
    task = replace(TASK, forget=Data(source="tiny"), retain=Data(source="tiny"))
    target = DDPM.tiny()

    @torch.no_grad()
    def error() -> float:
        torch.manual_seed(5)
        return float(sum(target.loss(b) for b in target.open(task.retain).batches(32)))

    before = error()
    registry.make("methods", name, preset="ddpm", steps=20, batch=16, lr=1e-3)(target, task, seed=0)
    assert error() < before if name == "ft" else error() > before
