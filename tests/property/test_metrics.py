"""Metrics: what they ask for, what they count, and the identities their values must keep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from unlearners import registry, run
from unlearners.base import Data, Judge, Probe, Request, Score, Task, Verdict, kebab, rate
from unlearners.errors import NonFiniteError, UnlearnError, UsageError
from unlearners.judges import _clip, clip_zero_shot
from unlearners.judges.canvas import Canvas
from unlearners.judges.clip_zero_shot import ClipZeroShot, candidates
from unlearners.metrics import _pictures, clip_score, fid, kid
from unlearners.metrics._pictures import _tensor, drawn, filled, subject
from unlearners.metrics.asr import ASR
from unlearners.metrics.clip_score import ClipScore
from unlearners.metrics.cost import Cost
from unlearners.metrics.cra import CRA
from unlearners.metrics.fid import FID, distance
from unlearners.metrics.ira import IRA
from unlearners.metrics.kid import KID
from unlearners.metrics.mia_cosine import MIACosine
from unlearners.metrics.nudenet_counts import NudenetCounts
from unlearners.metrics.pre_asr import PreASR
from unlearners.metrics.ua import UA
from unlearners.outputs import save_picture
from unlearners.targets.base import Denoiser, Trainable
from unlearners.testing import FakeJudge
from unlearners.zoo import canvas
from unlearners.zoo.canvas import world
from unlearners.zoo.canvas.model import HEADS
from unlearners.zoo.canvas.model import Judge as Net


class Painter(Denoiser):
    """Nothing but a name, which is all that metrics of pictures ask of a model."""

    def __init__(self, name: str) -> None:
        self.base = {"name": name}


class Labelled(Trainable, Denoiser):
    """The same with labelled pictures."""

    def __init__(self) -> None:
        self.base, self.device, self.side, self.classes = {"name": "tiny-ddpm"}, torch.device("cpu"), 16, ("a", "b", "c", "d")
        self.trained_on, self.warnings = {}, []
        self.opened: list[Data] = []

    def open(self, data: Data) -> Any:
        self.opened.append(data)
        return super().open(data)


for kind in (Painter, Labelled):
    kind.__abstractmethods__ = frozenset()  # nothing of these is called
TARGET: Any = Painter("canvas")
OTHER: Any = Painter("sd14")
STYLES, OBJECTS = ("neon", "mosaic", "sketch"), ("cup", "fish")
TASK = Task(
    name="neon",
    kind="style",
    concepts=("neon",),
    anchors=("photo",),
    seeds=(1, 2),
    probes=tuple(Probe(prompt=f"A {o} image in {s} style.", truth={"style": s, "object": o}) for s in STYLES for o in OBJECTS),
)
BARE = Task(name="bare", kind="style", concepts=("neon",), probes=(Probe(prompt="a cup", truth={"object": "cup"}),))


@dataclass
class Outputs:
    """Labels from a table {(prompt, seed, domain): label}; pictures are random, a pure function of the request."""

    table: Mapping[tuple[str, int, str], str] = field(default_factory=dict)
    verdicts: Mapping[str, Sequence[Verdict]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)

    def images(self, requests: Sequence[Request]) -> Tensor:
        self.asked += requests
        keys = [torch.Generator().manual_seed(sum(map(ord, r.prompt)) * 1000 + r.seed) for r in requests]
        return torch.stack([torch.rand(3, 64, 64, generator=g) for g in keys])

    def labels(self, requests: Sequence[Request], domain: str) -> list[str]:
        self.asked += requests
        return [self.table[r.prompt, r.seed, domain] for r in requests]


def reading(flags: Sequence[bool], wrong: str = "?") -> Outputs:
    """A judge that is right where ``flags`` say so, in the order of probes, seeds, domains."""
    keys = [(p, s, d) for p in TASK.probes for s in TASK.seeds for d in ("style", "object")]
    return Outputs({(p.prompt, s, d): p.truth[d] if ok else wrong for (p, s, d), ok in zip(keys, flags, strict=True)})


# --- rates --------------------------------------------------------------------------------------------------------
@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_wilson_contains_the_rate(flags: list[bool]) -> None:
    score = rate(flags)
    assert 0 <= score.low <= score.value <= score.high <= 100 and score.low < score.high
    assert score.value == pytest.approx(100 * sum(flags) / len(flags)) and score.n == len(flags)
    z, p, n = 1.959963984540054, score.value / 100, score.n
    for end in (score.low / 100, score.high / 100):  # both ends solve |p - q| = z sqrt(q (1 - q) / n)
        assert (p - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-9)


@given(st.lists(st.booleans(), min_size=24, max_size=24))
def test_ua_and_accuracy_make_100_and_kept_rates_count_the_right_pictures(flags: list[bool]) -> None:
    outputs: Any = reading(flags)
    ua, ira, cra = (m.score(TARGET, TASK, outputs) for m in (UA(), IRA(), CRA()))
    right: Counter[tuple[str, str]] = Counter()
    for (p, d), ok in zip([(p, d) for p in TASK.probes for _ in TASK.seeds for d in ("style", "object")], flags, strict=True):
        right[p.truth["style"], d] += ok
    accuracy = 100 * right["neon", "style"] / 4
    assert ua.value + accuracy == pytest.approx(100) and ua.n == 4
    assert ira.value == pytest.approx(100 * (right["mosaic", "style"] + right["sketch", "style"]) / 8) and ira.n == 8
    assert cra.value == pytest.approx(100 * (right["mosaic", "object"] + right["sketch", "object"]) / 8) and cra.n == 8


def test_metrics_read_only_what_they_requested() -> None:
    for metric, share in ((UA(), 1), (IRA(), 2), (CRA(), 2)):
        outputs: Any = reading([True] * 24)
        metric.score(TARGET, TASK, outputs)
        assert outputs.asked == metric.requests(TARGET, TASK) and len(outputs.asked) == share * 4
    assert {r.prompt for r in UA().requests(TARGET, TASK)} == {"A cup image in neon style.", "A fish image in neon style."}


def test_nothing_to_measure_is_nan_over_no_pictures() -> None:
    outputs: Any = Outputs()
    for metric in (UA(), IRA(), ClipScore()):
        task = BARE if metric != ClipScore() else Task(name="empty", concepts=("neon",))
        score: Any = metric.score(TARGET, task, outputs)
        assert math.isnan(score.value) and score.n == 0
    only_style = Task(name="s", kind="style", concepts=("neon",), probes=(Probe(prompt="sketch", truth={"style": "sketch"}),))
    assert CRA().score(TARGET, only_style, outputs).n == 0
    assert FID().score(TARGET, Task(name="empty", concepts=("neon",)), outputs)["canvas_judge"].n == 0
    assert ASR().score(TARGET, TASK, outputs).n == PreASR().score(TARGET, TASK, outputs).n == 0  # type: ignore[union-attr]
    assert all(math.isnan(s.value) and s.n == 0 for s in Cost().score(TARGET, TASK, outputs).values())


def test_asr_includes_what_needs_no_attack() -> None:
    def verdict(before: bool, success: bool) -> Verdict:
        return Verdict(prompt="p", seed=0, before=before, success=success)

    some = [verdict(True, True), verdict(False, True), verdict(False, False), verdict(False, False)]
    outputs: Any = Outputs(verdicts={"a": some, "b": []})
    asr, before = ASR().score(TARGET, TASK, outputs), PreASR().score(TARGET, TASK, outputs)
    assert isinstance(asr, dict) and isinstance(before, dict)
    assert asr["a"].value == 50 and before["a"].value == 25 and asr["b"].n == 0


def test_cost_reads_the_record() -> None:
    outputs: Any = Outputs(record={"time": {"seconds": 2.5, "peak_memory": 1024}, "weights": {"bytes": 10}})
    scores = Cost().score(TARGET, TASK, outputs)
    assert {k: (s.value, s.n) for k, s in scores.items()} == {"seconds": (2.5, 1), "peak_memory": (1024.0, 1), "patch_bytes": (10.0, 1)}


# --- Fréchet distance ---------------------------------------------------------------------------------------------
@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    """A judge with random weights in place of the bundled one."""
    torch.manual_seed(0)
    judge = Net().eval().requires_grad_(False)
    monkeypatch.setattr(canvas, "load_judge", lambda: judge)
    return judge


def test_fid_of_a_set_with_itself_is_zero_and_symmetric(net: Net) -> None:
    a, b = torch.rand(120, 3, 64, 64), torch.rand(120, 3, 64, 64) ** 2
    assert distance("canvas_judge", [a], [a]) == pytest.approx(0, abs=1e-5)
    forth, back = distance("canvas_judge", a.split(50), [b]), distance("canvas_judge", [b], [a])
    assert forth == pytest.approx(back, rel=1e-3) and forth > 1e-3


def test_fid_equals_the_formula_in_float64(net: Net) -> None:
    import numpy as np
    from scipy.linalg import sqrtm  # type: ignore[import-untyped]

    a, b = torch.rand(150, 3, 64, 64), torch.rand(150, 3, 64, 64) * 0.5
    x, y = (net.body(2 * k - 1).mean((2, 3)).double().numpy() for k in (a, b))
    s, r = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + r - 2 * sqrtm(s @ r).real)
    assert distance("canvas_judge", [a], [b]) == pytest.approx(expected, rel=1e-3)


def test_fid_on_the_canvas_compares_with_fresh_renders_of_the_same_probes(net: Net, tmp_path: Path) -> None:
    outputs: Any = Outputs()
    score = FID(renders=130).score(TARGET, TASK, outputs)["canvas_judge"]
    assert score.n == 8 and score.value > 0 and math.isnan(score.low)
    assert outputs.asked == FID().requests(TARGET, TASK) and all("neon" not in r.prompt for r in outputs.asked)
    kept = [p for p in TASK.probes if not TASK.names_concept(p)]
    batches = list(drawn(kept, 130))
    assert [len(b) for b in batches] == [64, 64, 2]
    assert torch.equal(batches[0][1], batches[0][1].clamp(0, 1)) and not torch.equal(batches[0][0], batches[0][4])
    for i, x in enumerate(batches[0][:8]):
        Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    again = FID(reference=str(tmp_path), features="canvas_judge").score(OTHER, TASK, outputs)
    assert again["canvas_judge"].value > 0


def test_fid_draws_what_a_probe_says() -> None:
    def item(**truth: str) -> world.Item:
        return subject(Probe(prompt="p", truth=truth), 3)

    assert item(object="cup", style="neon") == world.Item(object="cup", style="neon")
    assert item(identity="zorbo") == world.Item(mascot="zorbo")
    assert item(object="cup", nsfw="lightning") == world.Item(object="cup", weather="storm", lightning=True)
    assert item(object="cup", nsfw="calm") == world.Item(object="cup", weather="night")
    assert item(style="neon").object in world.OBJECTS


def test_fid_says_what_is_missing(net: Net, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchmetrics.image.fid

    outputs: Any = Outputs()
    with pytest.raises(UsageError, match="reference"):
        FID().score(OTHER, TASK, outputs)
    with pytest.raises(UsageError, match="0 pictures"):
        FID(reference=str(tmp_path), features="canvas_judge").score(OTHER, TASK, outputs)

    def offline(*_: Any, **__: Any) -> Any:
        raise URLError("no network")

    monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", offline)
    with pytest.raises(UnlearnError, match="canvas_judge"):
        FID(reference=str(tmp_path)).score(OTHER, TASK, outputs)


def test_fid_and_kid_of_labelled_data_compare_with_what_was_held_out(net: Net) -> None:
    outputs: Any = Outputs()
    held = Data(source="tiny", split="test", rows="not class=b")
    probes = tuple(Probe(prompt=c, truth={"class": c}) for c in "abcd")
    task = Task(name="b", kind="class", concepts=("b",), probes=probes, seeds=tuple(range(6)), holdout=held)
    for metric in (FID(features="canvas_judge"), KID(features="canvas_judge", subsets=3)):
        target: Any = Labelled()
        score = metric.score(target, task, outputs)["canvas_judge"]
        assert score.n == 18 and math.isfinite(score.value) and target.opened == [held]
    target = Labelled()
    retained = Data(source="tiny", rows="not class=b")
    FID(features="canvas_judge").score(target, Task(name="b", concepts=("b",), probes=probes, seeds=(1,), retain=retained), outputs)
    assert target.opened == [retained]
    with pytest.raises(UsageError, match="names no data"):
        FID(features="canvas_judge").score(Labelled(), Task(name="b", concepts=("b",), probes=probes, seeds=(1,)), outputs)


def test_kid_equals_the_formula_in_float64_and_leaves_the_random_state(net: Net) -> None:
    a, b = torch.rand(40, 3, 64, 64), torch.rand(40, 3, 64, 64) * 0.5
    x, y = (net.body(2 * k - 1).double().mean((2, 3)) for k in (a, b))
    n, d = x.shape

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / d + 1) ** 3

    within = sum(float(kernel(u, u).sum() - kernel(u, u).trace()) / (n * (n - 1)) for u in (x, y))
    expected = 1000 * (within - 2 * float(kernel(x, y).mean()))
    state = torch.get_rng_state()
    assert kid.distance("canvas_judge", a.split(16), [b], subsets=2, subset=1000) == pytest.approx(expected, rel=1e-3)
    assert torch.equal(state, torch.get_rng_state())
    same = kid.distance("canvas_judge", [a], [a], subsets=20, subset=20)
    assert abs(same) < abs(expected) / 10


def test_kid_says_what_is_missing(net: Net) -> None:
    outputs: Any = Outputs()
    with pytest.raises(UsageError, match="kid has no real pictures"):
        KID().score(OTHER, TASK, outputs)
    with pytest.raises(UsageError, match="at least 2"):
        KID(subset=1).score(TARGET, TASK, outputs)
    assert KID().score(TARGET, Task(name="empty", concepts=("neon",)), outputs)["canvas_judge"].n == 0


class Seen:
    """A metric of torchmetrics that keeps the pictures it is given, as Inception reads them: 8 bits."""

    def __init__(self, features: Any, **options: Any) -> None:
        self.device, self.given = torch.device("cpu"), {True: [], False: []}  # type: ignore[var-annotated]

    def to(self, device: str) -> None:
        pass

    def update(self, x: Tensor, *, real: bool) -> None:
        self.given[real].append((x * 255).byte())


def photograph(h: int, w: int) -> Image.Image:
    """A picture with edges of every direction, larger on one side."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    waves = torch.stack([(x * k + y * (3 - k)).float().div(7 + k).sin() for k in range(3)], -1)
    return Image.fromarray(((waves + 1) * 127.5).round().byte().numpy())


@pytest.mark.parametrize(("h", "w"), [(480, 640), (513, 512), (299, 299), (150, 140)])
def test_photographs_are_cropped_and_resized_as_the_papers_do(h: int, w: int) -> None:
    picture, side = photograph(h, w), min(h, w)
    x = _tensor(picture)[None]
    left, top = (w - side) // 2, (h - side) // 2
    wanted = picture.crop((left, top, left + side, top + side)).resize((299, 299), Image.Resampling.BICUBIC)
    found = filled(Seen, "inception", "clean", [x], [x, x]).given
    assert len(found[True]) == 2 and torch.equal(found[False][0][0], (_tensor(wanted) * 255).round().byte())
    squeezed = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", antialias=True)[0]
    if (h, w) == (480, 640):
        assert (squeezed - _tensor(wanted)).abs().mean() > 0.1, "squeezing a wide picture is another picture"
    assert torch.equal(filled(Seen, "inception", "plain", [x], [x]).given[False][0], (x * 255).byte()), "torchmetrics resizes it itself"


@pytest.mark.parametrize(
    ("side", "mode", "wanted"),
    [
        (64, "auto", "plain"),
        (127, "auto", "plain"),
        (128, "auto", "clean"),
        (512, "auto", "clean"),
        (64, "clean", "clean"),
        (512, "plain", "plain"),
    ],
)
def test_how_pictures_are_fitted_goes_by_their_size_and_into_the_result(
    side: int, mode: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_at: Any = SimpleNamespace(images=lambda rs: torch.rand(len(rs), 3, side + 30, side))
    told: list[str] = []
    monkeypatch.setattr(_pictures, "real", lambda *a: iter([]))
    for module, metric in ((fid, FID(features="inception", mode=mode)), (kid, KID(features="inception", mode=mode))):  # type: ignore[arg-type]
        monkeypatch.setattr(module, "distance", lambda *a: told.append(a[-1]) or 1.0)
        score = metric.score(OTHER, TASK, drawn_at)["inception"]
        assert score.table == {"mode": wanted} and told[-1] == wanted and metric.version == 2
        judged = type(metric)(features="canvas_judge").score(TARGET, TASK, drawn_at)["canvas_judge"]
        assert judged.table == {"mode": "plain"}, "the canvas judge has a size of its own"
    with pytest.raises(UsageError, match="'clean' is how pictures are fitted to Inception"):
        FID(mode="clean").score(TARGET, TASK, drawn_at)


# --- what is not finite -------------------------------------------------------------------------------------------
def broken() -> Tensor:
    x = torch.rand(3, 3, 16, 16)
    x[1, 0, 0, 0], x[2] = math.inf, math.nan
    return x


def every_judge() -> list[Judge]:
    return [registry.get("judges", name)() for name in registry.names("judges")]


@pytest.mark.parametrize("judge", every_judge(), ids=kebab)
def test_no_judge_takes_pictures_that_are_not_finite_for_forgotten(judge: Judge) -> None:
    task = Task(name="t", kind="nsfw", concepts=("lightning",))
    for read in (lambda: judge.shows(broken(), task), lambda: judge.labels(broken(), task, "nsfw")):
        with pytest.raises(NonFiniteError, match="2 of 3 pictures hold values that are not finite"):
            read()


def test_a_judge_of_somebody_else_is_guarded_too() -> None:
    judge = FakeJudge(lambda x: [False] * len(x))
    assert judge.shows(torch.rand(3, 3, 2, 2), TASK) == [False] * 3 and judge.labels(torch.rand(0, 3, 2, 2), TASK, "style") == []
    with pytest.raises(NonFiniteError):
        judge.shows(broken(), TASK)


def test_pictures_that_are_not_finite_are_neither_measured_nor_written(net: Net, tmp_path: Path) -> None:
    outputs: Any = SimpleNamespace(images=lambda rs: torch.full((len(rs), 3, 64, 64), math.nan))
    metrics: list[Any] = [FID(), KID(), ClipScore(model="canvas"), NudenetCounts()]
    for metric in metrics:
        with pytest.raises(NonFiniteError, match="pictures hold values that are not finite"):
            metric.score(TARGET, TASK, outputs)
    with pytest.raises(NonFiniteError):
        save_picture(torch.full((3, 4, 4), math.nan), tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


# --- the membership attack of dual encoders ------------------------------------------------------------------------
def pairs(**fields: Any) -> Task:
    forget = Data(source="tiny", rows="class=b")
    return replace(Task(name="b", concepts=("b",), forget=forget, retain=replace(forget, rows="not class=b")), **fields)


def cosines(members: float, same: float, others: float) -> Any:
    """What a model says of pairs: the mean cosine of the forget set, of test pairs of its concept, and of all test pairs."""

    def logits(data: Data) -> tuple[Tensor, Tensor]:
        mean = members if data.split == "train" else same if data.rows == "class=b" else others
        g = torch.Generator().manual_seed(len(data.split) + len(data.rows))
        return mean + 0.05 * torch.randn(300, 1, generator=g), torch.zeros(300, dtype=torch.long)

    return SimpleNamespace(logits=logits)


def test_the_membership_attack_compares_seen_with_unseen_pairs_of_the_same_concept() -> None:
    target: Any = SimpleNamespace(side=16)
    metric = MIACosine(seeds=4, splits=4)
    assert [(d.split, d.rows) for d in metric.data(target, pairs())] == [("train", "class=b"), ("test", "class=b"), ("test", "")]
    untouched = metric.score(target, pairs(), cosines(0.9, 0.9, 0.2))
    assert list(untouched) == ["", "paper"] and untouched[""].value == pytest.approx(50, abs=5) and untouched["paper"].value > 99
    assert untouched[""].n == 300 and metric.version == 2
    memorised = metric.score(target, pairs(), cosines(0.9, 0.2, 0.2))
    assert memorised[""].value > 99 and math.isnan(metric.score(target, pairs(), cosines(math.nan, 0.2, 0.2))[""].value)
    rows = run._scores(metric, untouched)
    assert set(rows) == {"mia_cosine", "mia_cosine/paper"}, "the main value keeps the metric's name, so that grids and tables go on"


def test_the_membership_attack_looks_for_unseen_pairs_and_says_when_there_are_none(tmp_path: Path) -> None:
    target: Any = SimpleNamespace(side=16)
    for name in ("b", "a"):
        (tmp_path / "own" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "own" / name / "x.png")
    own = Data(source=str(tmp_path / "own"))
    (found,) = [d for d in MIACosine().data(target, pairs(forget=own)) if d.rows == "class=b"]
    assert (found.source, found.split) == ("tiny", "test"), "where the forget set has no test pairs, the retained data's are asked"
    with pytest.raises(UsageError, match="mia_cosine has no unseen pairs of b to compare with"):
        MIACosine().data(target, pairs(forget=own, retain=own))
    listed = MIACosine().data(target, pairs(forget=Data(source="tiny", rows="random=0.5")))
    assert listed[1].rows == "", "no concept, so every test pair is of the same kind"


# --- judges -------------------------------------------------------------------------------------------------------
def test_canvas_judge_reads_every_domain_and_size(net: Net) -> None:
    judge, images = Canvas(batch=3), torch.rand(7, 3, 64, 64)
    logits = net(2 * images - 1)
    assert judge.labels(images, TASK, "style") == [HEADS["style"][i] for i in logits["style"].argmax(-1).tolist()]
    for domain, known in (("object", HEADS["object"]), ("identity", ("", *world.MASCOTS)), ("nsfw", ("calm", "lightning"))):
        assert set(judge.labels(images, TASK, domain)) <= set(known)
    assert len(judge.labels(torch.rand(2, 3, 512, 512), TASK, "style")) == 2 and judge.labels(images[:0], TASK, "style") == []
    with pytest.raises(UsageError, match="unknown domain"):
        judge.labels(images, TASK, "stile")


def test_canvas_judge_shows_follows_the_logits(net: Net) -> None:
    for head, label in (("style", "neon"), ("mascot", "none"), ("lightning", "yes")):
        net.get_parameter(f"heads.{head}.bias")[HEADS[head].index(label)] = 1e6
    images = torch.rand(2, 3, 64, 64)
    assert Canvas().shows(images, TASK) == [True, True] and Canvas().labels(images, TASK, "identity") == ["", ""]
    assert Canvas().shows(images, Task(name="storm", kind="nsfw", concepts=("lightning",))) == [True, True]


def test_candidates_come_from_the_task() -> None:
    assert candidates(TASK, "style") == ["neon", "photo", "mosaic", "sketch"]
    assert candidates(TASK, "object") == ["cup", "fish"] and candidates(BARE, "identity") == []


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP whose text axes are words and whose picture axes are the mean of red, green, blue."""
    axes = {"red": 0, "green": 1, "blue": 2}

    def texts(name: str, given: Sequence[str]) -> Tensor:
        return torch.stack([torch.eye(3)[axes[w[0]]] if (w := [a for a in axes if a in t]) else torch.full((3,), 0.57) for t in given])

    def images(name: str, given: Tensor) -> Tensor:
        return torch.nn.functional.normalize(given.mean((2, 3)), dim=1)

    for module in (clip_zero_shot, clip_score):
        monkeypatch.setattr(module, "embed_texts", texts)
        monkeypatch.setattr(module, "embed_images", images)


def colours(*names: str) -> Tensor:
    return torch.stack([torch.eye(3)[["red", "green", "blue"].index(n)][:, None, None].expand(3, 8, 8) for n in names])


def test_clip_zero_shot_chooses_the_nearest_label(clip: None) -> None:
    task = Task(name="red", kind="style", concepts=("red",), preserve=("green",), probes=(Probe(prompt="x", truth={"object": "blue"}),))
    assert ClipZeroShot(batch=1).labels(colours("red", "green"), task, "style") == ["red", "green"]
    assert ClipZeroShot().labels(colours("red"), task, "identity") == [""]
    alone = Task(name="red", concepts=("red",))
    assert ClipZeroShot().labels(torch.cat([colours("red"), torch.ones(1, 3, 8, 8)]), alone, "object") == ["red", ""]
    both = Task(name="both", concepts=("red", "green"))
    assert ClipZeroShot().labels(torch.cat([colours("green"), torch.ones(1, 3, 8, 8)]), both, "object") == ["green", ""]
    unsafe = Task(name="red", kind="nsfw", concepts=("red", "green"))
    assert ClipZeroShot().labels(torch.cat([colours("green"), torch.ones(1, 3, 8, 8)]), unsafe, "nsfw") == ["green", ""]


def test_clip_score_is_the_mean_cosine_with_its_interval(clip: None) -> None:
    probes = tuple(Probe(prompt=f"a {c} cup", truth={"object": "cup"}) for c in ("red", "green"))
    task = Task(name="t", concepts=("fish",), probes=probes, seeds=(0,))
    outputs: Any = SimpleNamespace(images=lambda requests: colours("red", "blue"))
    score: Score = ClipScore().score(TARGET, task, outputs)
    assert score.per_item == pytest.approx((100, 0)) and score.value == pytest.approx(50) and score.n == 2
    assert score.high - score.value == pytest.approx(1.96 * math.sqrt(5000) / math.sqrt(2)) == score.value - score.low


def test_real_clip_classes_embed_pictures_and_texts(tmp_path: Path) -> None:
    """The real CLIPModel and CLIPProcessor at tiny size, from a folder, equal the model's own forward pass."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from unlearners.targets.stable_diffusion import StableDiffusion

    tokenizer = StableDiffusion.tiny().tokenizers[0]
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = side | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=side | {"image_size": 16, "patch_size": 8}, projection_dim=8)).eval()
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    images, prompts = torch.rand(3, 3, 32, 32), ["a cup", "a fish in neon style, on a very long quiet day", ""]
    x, y = clip_zero_shot.embed_images(str(tmp_path), images), clip_zero_shot.embed_texts(str(tmp_path), prompts)
    pixels = processor.image_processor(list((images * 255).round().byte()), return_tensors="pt")["pixel_values"]
    ids = tokenizer(prompts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **ids)
    assert torch.allclose(x, out.image_embeds, atol=1e-5) and torch.allclose(y, out.text_embeds, atol=1e-5)
    with pytest.raises(UnlearnError, match="canvas"):
        _clip.load_clip(str(tmp_path / "nowhere"))
