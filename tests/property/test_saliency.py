"""Saliency: exactly floor(density N) weights by one rule for ties, files that keep them, and weights that never move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unlearners import optim, saliency, session
from unlearners.base import Data, Task
from unlearners.errors import NonFiniteError, RefusedError, UsageError
from unlearners.methods.rl import RL
from unlearners.methods.salun import SalUn
from unlearners.methods.salun_soft import SalUnSoft
from unlearners.saliency import About, Freeze
from unlearners.targets.classifier import Classifier
from unlearners.targets.ddpm import DDPM

TASK = Task(
    name="t",
    kind="samples",
    concepts=("t",),
    forget=Data(source="tiny", rows="random=22"),
    retain=Data(source="tiny", rows="not random=22"),
)
QUICK: dict[str, Any] = {"epochs": 1, "batch": 20, "lr": 0.05}
ABOUT = About(model="m", data="d", loss="l", statistic="abs_sum")

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=4)
densities = st.integers(0, 1000).map(lambda i: i / 1000)


def drawn(sizes: list[int], seed: int, ties: int) -> dict[str, Tensor]:
    """Saliency over many magnitudes, or with ``ties`` > 0 only that many different values, zero among them."""
    g = torch.Generator().manual_seed(seed)
    if ties:
        return {f"w{i}": torch.randint(ties, (n,), generator=g).float() / 7 for i, n in enumerate(sizes)}
    return {f"w{i}": torch.rand(n, generator=g) * 10.0 ** torch.randint(-40, 38, (n,), generator=g) for i, n in enumerate(sizes)}


def order(values: dict[str, Tensor]) -> list[int]:
    """Flat indices, the most salient first and of equals the lower one."""
    flat = torch.cat([v.flatten() for v in values.values()]).tolist()
    return sorted(range(len(flat)), key=lambda i: (-flat[i], i))


def flat(mask: dict[str, Tensor]) -> Tensor:
    return torch.cat([m.flatten() for m in mask.values()])


# --- exactly k ----------------------------------------------------------------------------------------------------
@given(sizes, densities, st.integers(0, 999), st.sampled_from([0, 1, 2, 5]))
def test_the_mask_is_the_first_k_of_a_sort(sizes: list[int], density: float, seed: int, ties: int) -> None:
    values = drawn(sizes, seed, ties)
    n = sum(sizes)
    k = Fraction(repr(density)) * n // 1
    ranked = order(values)
    top, bottom = flat(saliency.choose(values, density)), flat(saliency.choose(values, density, "inverted"))
    assert top.nonzero().flatten().tolist() == sorted(ranked[:k])
    assert bottom.nonzero().flatten().tolist() == sorted(ranked[n - k :])
    assert flat(saliency.choose(values, density, "random")).sum() == k
    assert flat(saliency.choose(values, density, "all")).all()


@given(sizes, densities, st.integers(0, 99), st.sampled_from([0, 2]))
def test_a_layer_gets_its_share(sizes: list[int], density: float, seed: int, ties: int) -> None:
    values = drawn(sizes, seed, ties)
    for control in ("saliency", "random", "inverted"):
        mask = saliency.choose(values, density, control, "layer")  # type: ignore[arg-type]
        assert [int(m.sum()) for m in mask.values()] == [int(Fraction(repr(density)) * n // 1) for n in sizes]
    assert all(flat(saliency.choose({"w": v}, density)).equal(m) for v, m in zip(values.values(), mask_of(values, density), strict=True))


def mask_of(values: dict[str, Tensor], density: float) -> list[Tensor]:
    return list(saliency.choose(values, density, scope="layer").values())


@given(sizes, st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 99), st.sampled_from([0, 1, 3]))
def test_kth_value(sizes: list[int], ranks: list[int], seed: int, ties: int) -> None:
    values = drawn(sizes, seed, ties)
    everything = flat(values)
    ranks = [min(k, len(everything)) for k in ranks]
    wanted = everything.sort(descending=True).values
    for k, (value, take) in zip(ranks, saliency.kth(list(values.values()), ranks), strict=True):
        assert value == wanted[k - 1].item()
        assert take == k - int((everything > value).sum())


def test_values_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = drawn([50, 3, 40], seed=5, ties=3)
    whole, levels = flat(saliency.choose(values, 0.4)), flat(saliency.levels(values))
    monkeypatch.setattr(saliency, "CHUNK", 7)
    assert flat(saliency.choose(values, 0.4)).equal(whole)
    assert flat(saliency.levels(values)).equal(levels)


def test_a_density_is_the_decimal_it_is_written_as() -> None:
    assert 0.29 * 100 < 29
    assert saliency.count(0.29, 100) == 29
    with pytest.raises(UsageError, match="between 0 and 1"):
        saliency.count(1.5, 100)


def test_what_is_not_finite_has_no_rank() -> None:
    with pytest.raises(NonFiniteError, match="'b'"):
        saliency.choose({"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])}, 0.5)


# --- a byte a weight ----------------------------------------------------------------------------------------------
@given(sizes, st.integers(0, 200), st.integers(0, 999), st.sampled_from([0, 1, 2, 5]), st.sampled_from(["global", "layer"]))
def test_levels_hold_the_mask_of_every_step(sizes: list[int], i: int, seed: int, ties: int, scope: saliency.Scope) -> None:
    values = drawn(sizes, seed, ties)
    levels = saliency.levels(values, scope)
    density = i / 200
    assert flat(levels).dtype == torch.uint8
    assert flat(levels).min() >= 1
    assert flat(levels).max() <= 200
    mask = flat(saliency.choose(values, density, scope=scope))
    assert (flat(levels) <= i).equal(mask)
    assert flat(saliency.choose(levels, density, scope=scope)).equal(mask)
    assert flat(saliency.choose(levels, density, "inverted", scope)).sum() == mask.sum()


def test_levels_refuse_densities_between_two_steps() -> None:
    with pytest.raises(UsageError, match=r"steps of 0\.005"):
        saliency.choose(saliency.levels(drawn([30], 1, 0)), 0.333)


# --- files --------------------------------------------------------------------------------------------------------
@given(st.integers(1, 70), st.integers(0, 999))
def test_bits_come_back(n: int, seed: int) -> None:
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = saliency.pack(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-n // 8)
    assert saliency.unpack(packed, n).equal(mask)


def test_a_file_comes_back_with_its_header(tmp_path: Path) -> None:
    values = {"a.w": torch.rand(300, 50), "a.b": torch.rand(1001)}
    levels, mask = saliency.levels(values), saliency.choose(values, 0.333)
    about = replace(ABOUT, density=0.333, seconds=1.5)
    for path, tensors, said in ((tmp_path / "levels", levels, ABOUT), (tmp_path / "mask", mask, about)):
        saliency.save(path, tensors, said)
        back, known = saliency.load(path, values)
        assert known == said
        assert known.direction == "top"
        assert all(back[n].equal(tensors[n]) for n in values)
    n = 16001
    assert (tmp_path / "levels").stat().st_size < n + 1000
    assert (tmp_path / "mask").stat().st_size < n / 8 + 1000
    assert not list(tmp_path.glob("*.tmp"))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    saliency.save(tmp_path / "s", saliency.levels({"a": torch.rand(9)}), ABOUT)
    with pytest.raises(RefusedError, match="other weights"):
        saliency.load(tmp_path / "s", {"a": torch.rand(3, 3)})
    (tmp_path / "s").write_bytes(b"\0" * 40)
    with pytest.raises(RefusedError, match="damaged"):
        saliency.load(tmp_path / "s", {"a": torch.rand(9)})


# --- freezing -----------------------------------------------------------------------------------------------------
def bits(w: Tensor) -> Tensor:
    return w.detach().clone().view(torch.int32)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_outside_the_mask_every_bit_stays(kind: optim.Optimizer) -> None:
    torch.manual_seed(3)
    w = {"a": torch.nn.Parameter(torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last)), "b": torch.nn.Parameter(torch.randn(40))}
    with torch.no_grad():
        for p in w.values():
            p[:3] = torch.tensor(-0.0)
    mask = {n: torch.rand(p.shape) < 0.4 for n, p in w.items()}
    start = {n: bits(p) for n, p in w.items()}
    freeze = Freeze(w, mask)
    opt = optim.make(kind, w.values(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for i in range(4):
        opt.zero_grad()
        sum(((p - 1) ** 3).sum() for p in w.values()).backward()  # type: ignore[union-attr]
        if i == 2:
            w["b"].grad[~mask["b"]] = float("nan")  # type: ignore[index]
        freeze.gradients()
        assert all((p.grad[~mask[n]] == 0).all() for n, p in w.items())  # type: ignore[index]
        opt.step()
        freeze.restore()
    for n, p in w.items():
        assert bits(p)[~mask[n]].equal(start[n][~mask[n]])
        assert (bits(p)[mask[n]] != start[n][mask[n]]).all()
        assert not torch.isnan(p).any()


def test_without_restoring_weight_decay_moves_frozen_weights() -> None:
    """What ``Freeze`` is for: masked gradients alone freeze nothing."""
    w = {"a": torch.nn.Parameter(torch.ones(4))}
    mask = {"a": torch.tensor([True, False, False, False])}
    freeze, opt = Freeze(w, mask), optim.make("sgd", w.values(), lr=0.1, weight_decay=0.1)
    w["a"].grad = torch.ones(4)
    freeze.gradients()
    opt.step()
    assert (w["a"] < 1).all()


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The masks that methods froze by."""
    masks: list[dict[str, Tensor]] = []
    init = Freeze.__init__

    def note(self: Freeze, weights: Any, mask: Any) -> None:
        masks.append(mask)
        init(self, weights, mask)

    monkeypatch.setattr(Freeze, "__init__", note)
    return masks


@pytest.mark.parametrize(
    ("make", "amp", "fields"),
    [
        (Classifier.tiny, torch.float32, {"optimizer": "sgd", "weight_decay": 0.1}),
        (Classifier.tiny, torch.float32, {"optimizer": "adamw", "weight_decay": 0.1, "lr": 1e-3}),
        (Classifier.tiny, torch.bfloat16, {"optimizer": "sgd", "order": "sequential", "clip": 0.1}),
        (Classifier.tiny, torch.bfloat16, {"optimizer": "adamw", "density": 0.123, "scope": "layer"}),
        (Classifier.tiny, torch.float32, {"mask": "random"}),
        (Classifier.tiny, torch.float32, {"mask": "inverted", "statistic": "sum_sq"}),
        (DDPM.tiny, torch.float32, {"optimizer": "adam", "labels": "next", "lr": 1e-3, "weight_decay": 0.1}),
    ],
)
def test_a_run_moves_the_mask_and_nothing_else(
    make: Callable[[], Any], amp: torch.dtype, fields: dict[str, Any], spied: list[dict[str, Tensor]]
) -> None:
    target, method = make(), SalUn(**{**QUICK, **fields})
    target.amp = amp
    start = {n: bits(p) for n, p in target.named().items()}
    method(target, TASK, seed=4)
    (mask,) = spied
    sizes = [m.numel() for m in mask.values()]
    wanted = [saliency.count(method.density, n) for n in (sizes if method.scope == "layer" else [sum(sizes)])]
    assert sum(int(m.sum()) for m in mask.values()) == sum(wanted)
    moved = sum(int((bits(p) != start[n])[mask[n]].sum()) for n, p in target.named().items())
    assert all(bits(p)[~mask[n]].equal(start[n][~mask[n]]) for n, p in target.named().items())
    assert moved > 0.5 * sum(wanted)


@pytest.mark.parametrize("make", [Classifier.tiny, DDPM.tiny])
@pytest.mark.parametrize("fields", [{"mask": "all"}, {"density": 1.0}, {"mask": "all", "order": "sequential", "clip": 1.0}])
def test_density_one_is_random_labels(make: Callable[[], Any], fields: dict[str, Any]) -> None:
    common: dict[str, Any] = {**QUICK, **{k: v for k, v in fields.items() if k in ("order", "clip")}}
    logs: list[list[dict[str, float]]] = [[], []]
    first, second = make(), make()
    SalUn(**{**QUICK, **fields})(first, TASK, seed=9, log=logs[0].append)
    RL(**common)(second, TASK, seed=9, log=logs[1].append)
    assert all(a.equal(b) for a, b in zip(first.named().values(), second.named().values(), strict=True))
    assert [{k: v for k, v in row.items() if k != "mask_seconds"} for row in logs[0]] == logs[1]


def test_masks_differ_and_share_their_draws(spied: list[dict[str, Tensor]]) -> None:
    """Controls of one seed see the same batches and labels."""
    for control in ("saliency", "random", "inverted"):
        SalUn(mask=control, **QUICK)(Classifier.tiny(), TASK, seed=1)  # type: ignore[arg-type]
    top, chance, bottom = (flat(m) for m in spied)
    assert top.sum() == chance.sum() == bottom.sum() == len(top) // 2
    assert not (top & bottom).any()
    assert 0.4 < (top & chance).sum() / top.sum() < 0.6


# --- the file of a run --------------------------------------------------------------------------------------------
def weights(method: SalUn, target: Any = None, seed: int = 2) -> tuple[Tensor, list[dict[str, float]]]:
    rows: list[dict[str, float]] = []
    target = target or Classifier.tiny()
    method(target, TASK, seed=seed, log=rows.append)
    return torch.cat([p.detach().flatten() for p in target.named().values()]), rows


@pytest.mark.parametrize("density", [0.3, 0.3333])
def test_a_reused_saliency_gives_the_same_weights(tmp_path: Path, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "saliency.safetensors"
    plain, rows = weights(SalUn(density=density, **QUICK))
    method = SalUn(density=density, saliency_file=str(file), **QUICK)
    written, _ = weights(method)
    assert written.equal(plain)
    assert rows[0]["mask_seconds"] > 0
    assert "cached_seconds" not in rows[0]
    monkeypatch.setattr(saliency, "measure", None)  # is not called again
    reused, rows = weights(method)
    assert reused.equal(plain)
    assert rows[0]["cached_seconds"] > 0
    assert rows[0]["mask_seconds"] > rows[0]["cached_seconds"]
    assert all("mask_seconds" not in row for row in rows[1:])


def test_one_file_serves_many_densities(tmp_path: Path) -> None:
    file = str(tmp_path / "saliency.safetensors")
    for density in (0.5, 0.1, 0.905):
        assert weights(SalUn(density=density, saliency_file=file, **QUICK))[0].equal(weights(SalUn(density=density, **QUICK))[0])


def test_the_saliency_of_something_else_is_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "s")
    weights(SalUn(saliency_file=file, density=0.3333, **QUICK))
    for method, target, said in (
        (SalUn(saliency_file=file, **QUICK), None, "mask of density 0.3333"),
        (SalUn(saliency_file=file, statistic="sum_abs", **QUICK), None, "another statistic"),
        (SalUn(saliency_file=file, **QUICK), Classifier.tiny(seed=8), "another model"),
    ):
        with pytest.raises(RefusedError, match=said):
            weights(method, target)


# --- the soft variant ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("release", [False, True])
def test_soft_puts_back_the_share_that_is_to_rest(release: bool) -> None:
    target = Classifier.tiny()
    with torch.no_grad():
        for p in target.named().values():
            p[0] = -0.0
    n = sum(p.numel() for p in target.named().values())
    start = {k: bits(p) for k, p in target.named().items()}
    method = SalUnSoft(**{**(SalUnSoft.presets["release"] if release else {}), "epochs": 2, "batch": 20, "lr": 0.05, "rho": 0.6})
    rows: list[dict[str, float]] = []
    method(target, TASK, seed=2, log=rows.append)
    per_epoch = 5 if release else 3
    gone = [i // per_epoch * per_epoch if release else i for i in range(2 * per_epoch)]
    rest = [int(Fraction("0.6") * n * (len(gone) - s) / len(gone) // 1) for s in gone]
    assert len(rows) == 2 * per_epoch
    for row, k in zip(rows, rest, strict=True):
        assert n - round(row["moved"] * n) >= k
        assert n - round(row["moved"] * n) <= k + 0.02 * n + 2  # equals of the last, and steps too short to change a weight
        assert row["tau"] > 0
    still = sum(int((bits(p) == start[k]).sum()) for k, p in target.named().items())
    assert (still < rest[-1]) if release else (still >= rest[-1])


def test_soft_without_a_pull_is_random_labels() -> None:
    first, second = Classifier.tiny(), Classifier.tiny()
    SalUnSoft(rho=0.0, **QUICK)(first, TASK, seed=9)
    RL(**QUICK)(second, TASK, seed=9)
    assert all(a.equal(b) for a, b in zip(first.named().values(), second.named().values(), strict=True))


# --- resuming -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "method",
    [
        SalUn(**{**QUICK, "epochs": 3}),
        SalUn(mask="random", mask_augment=True, **{**QUICK, "epochs": 3}),
        SalUnSoft(**{**SalUnSoft.presets["release"], **QUICK, "epochs": 3}),
    ],
    ids=["salun", "random", "soft"],
)
def test_a_killed_run_resumes_with_its_mask_and_anchor(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", 0.0)
    whole, killed, resumed = Classifier.tiny(), Classifier.tiny(), Classifier.tiny()
    rows: list[dict[str, float]] = []
    method(whole, TASK, seed=5, log=rows.append)
    seen: list[dict[str, float]] = []

    def die(row: dict[str, float]) -> None:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(row)

    killed.session = session.FolderSession(tmp_path, None)
    with pytest.raises(KeyboardInterrupt):
        method(killed, TASK, seed=5, log=die)
    resumed.session = session.FolderSession(tmp_path, None)
    after: list[dict[str, float]] = []
    method(resumed, TASK, seed=5, log=after.append)
    assert 0 < len(after) < len(rows)
    assert after == rows[-len(after) :]
    assert all(a.equal(b) for a, b in zip(whole.named().values(), resumed.named().values(), strict=True))


@pytest.fixture(autouse=True)
def _leave_the_generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def test_a_file_takes_at_most_a_byte_for_each_weight_header_included(tmp_path: Path) -> None:
    w = {n: torch.rand(200, 100) for n in "abcde"}
    saliency.save(tmp_path / "levels", saliency.levels(w), ABOUT)
    saliency.save(tmp_path / "mask", saliency.choose(w, 0.5), replace(ABOUT, density=0.5))
    assert (tmp_path / "levels").stat().st_size <= 100_000
    assert (tmp_path / "mask").stat().st_size <= 100_000 / 8 + 1000
