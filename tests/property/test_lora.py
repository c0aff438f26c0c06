"""LECO and SPM: what their adapters leave behind, what they teach, and that nothing of an adapter outlives a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from unlearners import diffusion, patch, session
from unlearners.base import Method, Row, Task
from unlearners.diffusion import Cond
from unlearners.errors import UsageError
from unlearners.methods import leco, spm
from unlearners.methods.leco import LECO
from unlearners.methods.spm import SPM, anchors
from unlearners.run import erase
from unlearners.targets.stable_diffusion import StableDiffusion

ONE = Task(name="t", concepts=("zq",))
QUICK: dict[str, Any] = {"steps": 3, "sampler_steps": 4, "lr": 1e-2}
METHODS: dict[str, Callable[..., Any]] = {
    "leco": lambda **fields: LECO(**(QUICK | fields)),
    "spm": lambda **fields: SPM(**(QUICK | {"lamb": 1.0} | fields)),
}
both = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def names(target: Any) -> dict[str, int]:
    """Every weight's name and identity, and every module's name with its class."""
    found = {n: id(p) for n, p in target.named().items()}
    return found | {f"{c}.{n}:{type(m).__name__}": 0 for c, top in target.modules.items() for n, m in top.named_modules()}


# --- what is left -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("make", "rank"), [(METHODS["leco"], 2), (METHODS["leco"], 4), (METHODS["spm"], 1)])
def test_the_change_of_each_weight_has_the_rank(make: Callable[..., Any], rank: int, sd: Callable[..., Any]) -> None:
    target, old = sd(), sd().named()
    before = names(target)
    make(rank=rank, params="xattn", alpha=4.0)(target, ONE)
    assert names(target) == before
    moved = {n: (p - old[n]).flatten(1) for n, p in target.named().items() if not torch.equal(p, old[n])}
    assert moved
    assert all(".attn2." in n and n.endswith(".weight") for n in moved)
    for n, change in moved.items():
        s = torch.linalg.svdvals(change.double())
        assert s[rank - 1] > 1e-4 * s[0], n
        assert (s[rank:] < 1e-4 * s[0]).all(), n


def test_convolutions_are_adapted(sd: Callable[..., Any]) -> None:
    target, old = sd(), sd().named()
    LECO(**QUICK, params=r"unet\.(conv_in|.*conv1)\.")(target, ONE)
    moved = {n for n, p in target.named().items() if not torch.equal(p, old[n])}
    assert "unet.conv_in.weight" in moved
    assert all(n.endswith(("conv_in.weight", "conv1.weight")) for n in moved)


@both
@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError])
def test_an_interrupted_run_leaves_plain_merged_weights(
    make: Callable[..., Any], fault: type[BaseException], sd: Callable[..., Any]
) -> None:
    target = sd()
    before, prints = names(target), patch.fingerprint(target.modules)

    def stop(row: Row) -> None:
        if len(seen) == 2:
            raise fault
        seen.append(row)

    seen: list[Row] = []
    with pytest.raises(fault):
        make(steps=9)(target, ONE, log=stop)
    assert names(target) == before
    assert patch.diff(prints, target.modules)  # which raises when tensors were added


@both
def test_a_closed_run_leaves_plain_merged_weights(make: Callable[..., Any], sd: Callable[..., Any]) -> None:
    target = sd()
    before = names(target)
    rows: Iterator[Row] = make(steps=9).run(target, ONE)
    next(rows)
    assert names(target) != before
    rows.close()  # type: ignore[attr-defined]
    assert names(target) == before


@both
def test_killed_and_resumed_equals_uninterrupted(make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", 0.0)
    method: Method = make(steps=5, pool=2, refresh=3)

    def interrupt(what: str, done: int, total: int, row: Row) -> None:
        if done == 3:
            raise KeyboardInterrupt

    whole = erase(method, "tiny", ONE, runs=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        erase(method, "tiny", ONE, runs=tmp_path / "cut", progress=interrupt)
    cut = erase(method, "tiny", ONE, runs=tmp_path / "cut")
    one, two = (load_file(f / "weights.safetensors") for f in (whole, cut))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (whole / "log.jsonl").read_bytes() == (cut / "log.jsonl").read_bytes()


@both
def test_half_precision_models_train_float32_adapters(make: Callable[..., Any]) -> None:
    target = StableDiffusion.load("tiny", dtype=torch.bfloat16)
    seen: set[torch.dtype] = set()
    make(lr=1e-1)(target, ONE, log=lambda _: seen.update(p.dtype for p in target.named().values() if p.requires_grad))
    assert seen == {torch.float32}
    assert {p.dtype for p in target.named().values()} == {torch.bfloat16}
    assert torch.isfinite(target.sample(["zq"], [1], steps=2)).all()


# --- what is taught -----------------------------------------------------------------------------------------------
class Spy:
    """What a run compared: (student, goal) pairs, in order."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.x: list[tuple[Tensor, Tensor]] = []


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found, mse, states = Spy(), F.mse_loss, diffusion.states

    def compare(e: Tensor, goal: Tensor) -> Tensor:
        found.pairs.append((e.detach().clone(), goal.clone()))
        return mse(e, goal)

    def see(*parts: Any, **fields: Any) -> Any:
        x, t, k = states(*parts, **fields)
        found.x.append((x, t))
        return x, t, k

    monkeypatch.setattr(F, "mse_loss", compare)
    for method in (leco, spm):
        monkeypatch.setattr(method, "states", see)
    return found


@torch.no_grad()
def predict(old: Any, at: tuple[Tensor, Tensor], prompt: str) -> Tensor:
    out: Tensor = old.eps(*at, old.encode([prompt]) if prompt else old.null())  # zeros on SDXL
    return out


LAYOUTS: dict[str, dict[str, Any]] = {"sd": {}, "sdxl": {"xl": True}, "v": {"prediction": "v_prediction"}}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_leco_s_goal_comes_from_the_original_model_throughout(layout: dict[str, Any], spy: Spy, sd: Callable[..., Any]) -> None:
    target, old = sd(**layout), sd(**layout)
    LECO(**QUICK, g=1.5, positive="b")(target, ONE)
    assert len(spy.pairs) == 3
    for (_, goal), at in zip(spy.pairs, spy.x, strict=True):
        e_0, e_p = predict(old, at, ""), predict(old, at, "b")
        assert torch.allclose(goal, e_0 - 1.5 * (e_p - e_0), atol=1e-5)
    assert torch.allclose(spy.pairs[0][0], predict(old, spy.x[0], "zq"), atol=1e-5)  # B = 0: the student begins as the original
    assert not torch.allclose(spy.pairs[2][0], predict(old, spy.x[2], "zq"), atol=1e-5)


def test_leco_enhances_and_starts_from_the_anchor(spy: Spy, sd: Callable[..., Any]) -> None:
    old = sd()
    task = Task(name="t", concepts=("zq", "ab"), anchors=("c", "d"), prompts=("an AB",))
    LECO(**QUICK, action="enhance", neutral="anchor")(sd(), task)
    (_, goal), at = spy.pairs[0], spy.x[0]
    e_0, e_p, e_n = (predict(old, at, p) for p in ("", "an AB", "d"))
    assert torch.allclose(goal, e_n + (e_p - e_0), atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_spm_s_goal_and_its_anchoring(layout: dict[str, Any], spy: Spy, sd: Callable[..., Any]) -> None:
    target, old = sd(**layout), sd(**layout)
    rows: list[Row] = []
    SPM(**QUICK, eta=0.5, lamb=10.0, anchors=3)(target, ONE, log=rows.append)
    for (_, goal), at in zip(spy.pairs[::2], spy.x, strict=True):
        e_n, e_c = predict(old, at, ""), predict(old, at, "zq")
        assert torch.allclose(goal, e_n - 0.5 * (e_c - e_n), atol=1e-5)
    assert all(len(e) == len(goal) == 3 for e, goal in spy.pairs[1::2])
    assert rows[0]["anchoring"] < 1e-10 < rows[-1]["anchoring"]
    assert all(r["loss"] == pytest.approx(r["erase"] + 10 * r["anchoring"], rel=1e-4) for r in rows)


def test_anchoring_holds_other_prompts(sd: Callable[..., Any]) -> None:
    old = sd()
    at = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 500)

    def drift(lamb: float) -> float:
        target = sd()
        SPM(steps=30, sampler_steps=4, lr=1e-2, lamb=lamb, batch=4, pool=1, refresh=100)(target, ONE, seed=1)
        with torch.no_grad():
            moved: Tensor = target.eps(*at, target.encode(["ab"] * 4)) - old.eps(*at, old.encode(["ab"] * 4))
        return moved.norm().item()

    assert drift(1000.0) < 0.5 * drift(0.0)


def test_training_lowers_the_loss(sd: Callable[..., Any]) -> None:
    rows: list[Row] = []
    LECO(steps=40, lr=5e-2, alpha=4.0, sampler_steps=4, pool=1, refresh=1000, batch=8)(sd(), ONE, log=rows.append)
    assert sum(r["loss"] for r in rows[-5:]) < 0.5 * sum(r["loss"] for r in rows[:5])


@pytest.mark.parametrize("pooled", [False, True])
def test_anchors_are_as_long_as_the_concept(pooled: bool) -> None:
    torch.manual_seed(0)
    c = Cond(torch.randn(400, 3, 5), torch.randn(400, 7) if pooled else None, torch.ones(400, 6) if pooled else None)
    a = anchors(c)
    for made, like in [(a.states, c.states), *([(a.pooled, c.pooled)] if pooled else [])]:
        assert made is not None and like is not None
        ratio = made.flatten(1).norm(dim=1) / like.flatten(1).norm(dim=1)
        assert 0.8 <= ratio.min() < 0.82 and 1.18 < ratio.max() <= 1.2001
    assert a.time_ids is c.time_ids


def test_anchors_avoid_the_concept() -> None:
    """Accepted with probability 1 - cos, so the mean cosine is -E[cos^2], -1 / d; in one dimension the concept itself is never drawn."""
    torch.manual_seed(0)
    line = Cond(torch.ones(50, 1, 1))
    assert (anchors(line).states < 0).all()
    c = Cond(torch.ones(20000, 1, 3))
    cos = F.cosine_similarity(anchors(c).states.flatten(1), c.states.flatten(1))
    assert (cos > 0).float().mean() < 0.45


# --- refusals -----------------------------------------------------------------------------------------------------
@both
def test_layers_that_cannot_be_adapted_are_refused(make: Callable[..., Any], sd: Callable[..., Any]) -> None:
    target = sd()
    before = names(target)
    for params, said in (("text_encoder", "UNet"), (r"unet\..*norm", "no linear or convolution")):
        with pytest.raises(UsageError, match=said):
            make(params=params)(target, ONE)
    assert names(target) == before


@both
@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"rank": 0}, {"sampler_steps": 0}, {"refresh": 0}, {"pool": -1}])
def test_impossible_budgets_are_refused(make: Callable[..., Any], wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        make(**wrong)


@pytest.mark.parametrize("wrong", [{"warmup": 1.0}, {"warmup": -0.1}, {"anchors": 0}, {"cycles": 0}])
def test_spm_s_own_budgets(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SPM(**wrong)
