"""The contracts as importable tests: what every target, method, attack and metric keeps, third-party ones too.

``check_method(MyMethod(steps=2))`` raises ``AssertionError`` with one sentence when a promise is broken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import config, patch, registry
from .base import Adversarial, Attack, Data, Item, Judge, Method, Metric, Probe, Request, Score, Target, Task, Verdict, kebab, settle
from .errors import UnlearnError, UsageError
from .targets.base import Chat, DualEncoder, Trainable
from .tasks import from_concept

BUDGETS = ("steps", "epochs", "iterations", "timesteps", "tries", "sampler_steps", "pictures", "evaluations")


def tiny_targets(needs: type[Target] = Target) -> list[Target]:
    """A tiny target of every registered family that ``needs`` admits."""
    kinds: list[type[Target]] = [registry.get("targets", n) for n in registry.names("targets")]
    return [k.tiny() for k in kinds if issubclass(k, needs)]


def quick(part: Any, steps: int = 2) -> Any:
    """``part`` with its ``BUDGETS`` cut, and with no ``goal`` that would have to be reached: random weights know nothing."""
    names = {f.name for f in fields(part)}
    cut: dict[str, Any] = {n: steps if (v := getattr(part, n)) == "auto" else min(steps, v) for n in BUDGETS if n in names}
    return replace(part, **cut, **({"goal": -1.0} if "goal" in names else {}))


def task_for(target: Target) -> Task:
    """A small task for a tiny target: a class to forget where it reads data, else a style."""
    if isinstance(target, Trainable):
        rows = "class=b"
        probes = tuple(Probe(prompt=c, truth={"class": c}) for c in target.classes)
        forget, retain = Data(source="tiny", rows=rows), Data(source="tiny", rows=f"not {rows}")
        data: dict[str, Any] = {"forget": forget, "retain": retain, "holdout": Data(source="tiny", split="test", rows=f"not {rows}")}
        return Task(name="tiny", kind="class", concepts=("b",), probes=probes, seeds=(1, 2), judge="fake", **data)
    if isinstance(target, DualEncoder | Chat):
        data = {"forget": Data(source="tiny", rows="class=b"), "retain": Data(source="tiny", rows="not class=b")}
        held = Data(source="tiny", split="test", validation=0.5)
        return Task(name="tiny", kind="identity", concepts=("b",), preserve=("a", "c", "d"), holdout=held, judge="fake", **data)
    return replace(from_concept("zq", "style", preserve=("ab",)), judge="clip_zero_shot:model=canvas")


def _values(target: Target) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in target.named().items()}


def _changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {n for n in a if not torch.equal(a[n], b[n])}


def check_target(kind: type[Target]) -> None:
    """Loading, selection, training loss, frozen copies and determinism of a target family, on its ``tiny``."""
    a, b = kind.tiny(seed=1), kind.tiny(seed=1)
    assert not _changed(_values(a), _values(b)), "tiny(seed) must be the same twice"
    assert _changed(_values(a), _values(kind.tiny(seed=2))), "tiny must depend on its seed"
    for group in kind.groups:
        assert a.select(group), f"group '{group}' selects nothing"
    try:
        a.select("no such group")
    except UsageError as error:
        assert "no such group" in str(error)
    else:
        raise AssertionError("select must refuse a group that matches nothing")
    twin = a.frozen()
    with torch.no_grad():
        for p in a.named().values():
            p.add_(1)
    assert not _changed(_values(twin), _values(b)), "frozen() must not follow the target"
    assert all(not p.requires_grad for p in twin.named().values()), "frozen() must not train"
    assert set(a.base) == {"name", "revision", "sha256"}, "base must hold name, revision and sha256"
    assert not _changed(_values(kind.load("tiny")), _values(kind.tiny())), "'tiny' must be an alias of tiny()"


def _has(target: Target, group: str) -> bool:
    try:
        return bool(target.select(group))
    except UsageError:
        return False


def check_method(method: Method, targets: Sequence[Target] | None = None) -> None:
    """A method changes only what it selected, is deterministic, leaves no trace, and survives a round trip as a patch.

    One that acts at generation time changes no weight and draws other pictures, while the target it was copied from draws the same.
    """
    assert is_dataclass(method) and type(method).__dataclass_params__.frozen, "a method is a frozen dataclass"
    assert method.paper and type(method).__doc__, "a method names its paper and has a docstring"
    again = registry_round_trip(method)
    assert again == method, "to_dict and build must give the same method back"
    method = quick(method)
    chosen = list(targets) if targets is not None else tiny_targets(method.needs)
    if not method.runtime and method.params not in ("auto", type(method)().params):  # a preset may name weights that one family has
        chosen = [t for t in chosen if _has(t, method.params)]
    assert chosen, f"no target family serves {method.needs.__name__}"
    for target in chosen:
        task = task_for(target)
        start, prints = _values(target), patch.fingerprint(target.modules)
        rng, grad = torch.get_rng_state(), torch.is_grad_enabled()
        rows: list[dict[str, float]] = []
        first = target.frozen()
        method(first, task, seed=3, log=rows.append)
        assert torch.equal(rng, torch.get_rng_state()), "the global random state must be as before"
        assert torch.is_grad_enabled() == grad, "the grad mode must be as before"
        assert not _changed(start, _values(target)), "a frozen copy must not touch the target"
        assert all(not p.requires_grad and p.grad is None for p in first.named().values()), "no requires_grad or gradient may stay"
        hooks = [
            h for c in first.modules.values() for m in c.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        ]
        assert all(h.__module__.startswith("transformers.") for h in hooks), "no hook may stay"  # those read out hidden states for good
        assert rows and all(isinstance(v, float | int) for row in rows for v in row.values()), "run must yield numbers to log"
        changed = _changed(start, _values(first))
        if method.runtime:
            assert not changed, "a method that acts at generation time must not change weights"
            _check_guide(method, target, first, task)
            continue
        assert changed or method.paper == "control", "the method changed nothing"
        assert changed <= set(target.select(settle(method, target, task).params)), "the method changed weights outside its selection"
        second = target.frozen()
        method(second, task, seed=3)
        assert not _changed(_values(first), _values(second)), "the same seed must give the same weights"
        if not changed:  # and so there is no patch
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.safetensors"
            base = {c: h for c, h in target.base["sha256"].items() if any(n.startswith(f"{c}.") for n in changed)}
            patch.save(patch.Patch(tensors=patch.diff(prints, first.modules), kind="value", base=base, meta={}), path)
            third = target.frozen()
            patch.apply_all(third.modules, target.base["sha256"], [patch.load(path)])
        assert not _changed(_values(first), _values(third)), "the patch must bring the same weights, bit for bit"


def _check_guide(method: Method, target: Any, first: Any, task: Task) -> None:
    """``first``, a copy of ``target`` that ``method`` ran on, draws otherwise, as a second copy does, and ``target`` as before."""
    assert first.guide and target.guide is None, "a method that acts at generation time must set the guide of its target alone"
    second = target.frozen()
    method(second, task, seed=3)
    prompts, seeds = [f"a {task.concepts[0]}", "cup"], [1, 2]
    bare = target.frozen()
    plain, drawn = bare.sample(prompts, seeds), first.sample(prompts, seeds)
    assert not torch.equal(plain, drawn), "a method that acts at generation time must draw other pictures"
    assert torch.equal(drawn, second.sample(prompts, seeds)), "the same seed must give the same pictures"
    assert torch.equal(plain, target.sample(prompts, seeds)), "the original must draw as before"
    assert torch.equal(drawn, first.frozen().sample(prompts, seeds)), "a frozen copy must draw as its target does"


def registry_round_trip(part: Any) -> Any:
    """``part`` through its plain form and back."""
    return config.build(type(part), config.to_dict(part))


class FakeJudge(Judge):
    """Fires when the mean of a picture is above a threshold; for contract tests only."""

    def __init__(self, fires: Callable[[Tensor], list[bool]]) -> None:
        self.fires = fires

    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        return [task.concepts[0] if f else "" for f in self.fires(images)]


def check_attack(attack: Attack) -> None:
    """An attack is deterministic, leaves the target alone, and cannot claim a success that ``hit`` did not see."""
    assert attack.paper and attack.access in ("white", "black"), "an attack names its paper and access"
    assert registry_round_trip(attack) == attack, "to_dict and build must give the same attack back"
    attack = quick(attack)
    for target in tiny_targets(attack.needs):
        task = task_for(target)
        picture = target.sample(["zq"], [5], steps=2)  # type: ignore[attr-defined]
        items = [Item(prompt="zq", seed=5, picture=picture), Item(prompt="a zq", seed=6, picture=picture)]
        target.original = cache(target.frozen)
        start, rng = _values(target), torch.get_rng_state()
        never, always = FakeJudge(lambda x: [False] * len(x)), FakeJudge(lambda x: [True] * len(x))
        lost = attack(target, task, never, items, seed=1)
        assert not any(v.success for v in lost), "no success without the judge"
        assert all(v.queries > 0 for v in lost), "an attack must query"
        assert lost == attack(target, task, never, items, seed=1), "the same seed must give the same verdicts"
        won = attack(target, task, always, items, seed=1)
        assert all(v.before and v.success and not v.queries for v in won), "a prompt that works unattacked is not attacked"
        assert not _changed(start, _values(target)), "an attack must not change the target"
        assert torch.equal(rng, torch.get_rng_state()), "the global random state must be as before"


class FakeOutputs:
    """Pictures and labels for metric tests; ``label`` answers for (request, domain)."""

    def __init__(self, label: Callable[[Request, str], str], verdicts: dict[str, list[Verdict]] | None = None) -> None:
        self.label, self.verdicts = label, verdicts or {}
        self.record: dict[str, Any] = {"time": {"seconds": 2.0, "peak_memory": 3}, "weights": {"bytes": 4}}

    def images(self, requests: Sequence[Request]) -> Tensor:
        return torch.stack([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(r.seed)) for r in requests])

    def labels(self, requests: Sequence[Request], domain: str) -> list[str]:
        return [self.label(r, domain) for r in requests]


def check_metric(metric: Metric, outputs: Any = None) -> None:
    """A metric survives its plain form, asks for well-formed requests and gives finite numbers, or n = 0."""
    assert isinstance(metric.higher_is_better, bool) and metric.version >= 1, "a metric says which way is better, and its version"
    assert registry_round_trip(metric) == metric, "to_dict and build must give the same metric back"
    for target in tiny_targets(metric.needs):
        task = task_for(target)
        requests = metric.requests(target, task)
        assert len(requests) == len(set(requests)), "a picture is asked for once"
        if outputs is not None:
            score = metric.score(target, task, outputs)
            for s in [score] if isinstance(score, Score) else score.values():
                assert s.n == 0 or s.value == s.value, f"{kebab(metric)} is not a number for n = {s.n}"


__all__ = [
    "Adversarial",
    "FakeJudge",
    "FakeOutputs",
    "UnlearnError",
    "check_attack",
    "check_method",
    "check_metric",
    "check_target",
    "quick",
    "task_for",
]
