"""Probes of an erasure: what rounding the weights does to them and to the metrics, and how relearning is counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlearners import config, run, testing
from unlearners.base import Judge, Probe, Request, Target, Task
from unlearners.errors import UsageError
from unlearners.latents import Asked
from unlearners.metrics._probe import Fresh, before
from unlearners.metrics.fa import FA
from unlearners.metrics.quantised import Quantised, matrices, nearest, rounded
from unlearners.metrics.relearned import Relearned, named
from unlearners.metrics.ta import TA
from unlearners.metrics.ua import UA
from unlearners.sandbox import sandbox
from unlearners.targets.classifier import Classifier
from unlearners.targets.clip import CLIP
from unlearners.targets.llava import Llava
from unlearners.targets.stable_diffusion import StableDiffusion

NOTHING: Any = SimpleNamespace(record={}, verdicts={}, references=())  # a model that no run folder holds


def drawn(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- rounding -----------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(3, 5), (4, 2, 3, 3), (1, 1)]), st.integers(2, 8), st.integers(0, 1), st.integers(0, 999), st.floats(1e-6, 1e6))
def test_weights_are_rounded_to_the_nearest_step_of_their_channel(
    shape: tuple[int, ...], bits: int, axis: int, seed: int, size: float
) -> None:
    w = size * drawn(shape, seed)
    got = nearest(w, bits, axis)
    top = 2 ** (bits - 1) - 1
    for row, new in zip(w.transpose(0, axis).double(), got.transpose(0, axis).double(), strict=True):
        step = row.abs().max() / top
        assert (new - row).abs().max() <= step * (0.5 + 1e-4), "no weight moves by more than half a step"
        assert torch.allclose(new / step, (new / step).round(), atol=1e-3) and len(new.unique()) <= 2 * top + 1
        assert new.abs().max() == pytest.approx(row.abs().max().item(), rel=1e-5), "the largest weight stays"
    assert torch.allclose(nearest(got, bits, axis), got, rtol=1e-5)


def test_a_channel_of_zeros_stays_and_half_precision_is_rounded_as_float() -> None:
    w = drawn((4, 6), 1)
    w[2] = 0
    assert nearest(w, 4, 0)[2].tolist() == [0] * 6
    half = w.to(torch.bfloat16)
    assert torch.equal(nearest(half, 4, 0), nearest(half.float(), 4, 0))


def test_rounding_undoes_an_edit_below_the_step_and_not_one_above() -> None:
    w = nearest(drawn((8, 16), 2), 4, 0)
    step = w.abs().amax(1, keepdim=True) / 7
    inner = w.abs() < 6.5 * step  # the largest weights set the step
    assert torch.allclose(nearest(w + 0.4 * step * inner, 4, 0), w, atol=1e-6)
    assert not torch.allclose(nearest(w + 0.6 * step * inner, 4, 0), w, atol=1e-6)
    assert not torch.allclose(nearest(w + 0.4 * step * inner, 8, 0), w, atol=1e-6), "the finer grid keeps what the coarse one loses"


@pytest.mark.parametrize("kind", [StableDiffusion, Classifier, CLIP, Llava])
def test_a_copy_is_rounded_and_nothing_else(kind: type[Target]) -> None:
    target = kind.tiny()
    old = {n: p.clone() for n, p in target.named().items()}
    copy = rounded(target, 4)
    weights = {w.data_ptr() for m in copy.modules.values() for w, _ in matrices(m)}
    assert weights and all(torch.equal(p, old[n]) for n, p in target.named().items())
    for n, p in copy.named().items():
        changed = not torch.equal(p, old[n])
        assert changed == (p.data_ptr() in weights and old[n].abs().max() > 0), n


def test_every_kind_of_matrix_is_found_with_its_output_channels() -> None:
    net = nn.ModuleList([nn.Linear(3, 4), nn.Conv2d(3, 5, 1), nn.ConvTranspose2d(3, 6, 2), nn.MultiheadAttention(8, 2), nn.LayerNorm(3)])
    found = [(tuple(w.shape), w.shape[axis]) for w, axis in matrices(net)]
    assert found == [((4, 3), 4), ((5, 3, 1, 1), 5), ((3, 6, 2, 2), 6), ((24, 8), 24), ((8, 8), 8)]


# --- the metrics on the copy --------------------------------------------------------------------------------------
def test_classifiers_and_dual_encoders_get_the_values_of_their_own_metrics() -> None:
    for target, metrics in ((Classifier.tiny(), {"ua": UA(), "ta": TA()}), (CLIP.tiny(), {"fa": FA(), "ta": TA()})):
        task = testing.task_for(target)
        got = Quantised().score(target, task, NOTHING)
        assert list(got) == [f"int{b}_{m}" for b in (8, 4) for m in metrics]
        for name, score in got.items():
            bits, _, metric = name.removeprefix("int").partition("_")
            wanted: Any = metrics[metric].score(target, task, Fresh(rounded(target, int(bits)), task, NOTHING))
            wanted = wanted["top1"] if isinstance(wanted, dict) else wanted
            assert score == wanted and score.n and score.low <= score.value <= score.high
        assert Quantised(bits=(4,)).score(target, task, NOTHING) == {k: v for k, v in got.items() if k.startswith("int4")}


def test_a_coarser_grid_says_more_otherwise() -> None:
    target = Classifier.tiny()
    data = testing.task_for(target).retain
    logits = {b: Fresh(rounded(target, b), testing.task_for(target), NOTHING).logits(data)[0] for b in (2, 4, 8)}
    exact = target.predict(target.open(data))[0]
    error = {b: (found - exact).abs().mean().item() for b, found in logits.items()}
    assert 0 < error[8] < error[4] < error[2]


class Bright(Judge):
    """Reads brightness, and counts what it is shown."""

    seen = 0

    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        Bright.seen += len(images)
        return [("zq", "ink")[int(1000 * float(i.mean())) % 2] for i in images]


def test_pictures_of_the_copy_are_drawn_judged_once_and_rounded_as_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    target = StableDiffusion.tiny()
    target.sampler = {"steps": 2, "guidance": 2.0}
    probes = tuple(Probe(prompt=f"{o} {s}", truth={"style": s}, guidance=g) for s, g in (("zq", None), ("ink", 4.0)) for o in ("a", "b"))
    task = Task(name="zq", kind="style", concepts=("zq",), probes=probes, judge="bright", seeds=(1, 2, 3))
    monkeypatch.setattr("unlearners.judges.load", lambda spec: Bright())
    Bright.seen = 0
    got = Quantised(bits=(4,), seeds=2).score(target, task, NOTHING)
    assert Bright.seen == 2 * len(probes) and {k: s.n for k, s in got.items()} == {"int4_ua": 4, "int4_ira": 4}
    seen = Fresh(target, task, NOTHING)
    asked = [Request("a zq", 1), Request("a ink", 2, 4.0), Request("b zq", 1), Request("a zq", 1)]
    images = seen.images(asked)
    assert torch.equal(images[0], images[3]) and torch.equal(images, (images * 255).round() / 255)
    alone = [target.sample([r.prompt], [r.seed], **({} if r.guidance is None else {"guidance": r.guidance}))[0] for r in asked]
    assert (images - torch.stack(alone)).abs().max() < 0.02, "each with its own guidance, in the order asked"
    Bright.seen = 0
    assert seen.labels(asked, "style") == seen.labels(asked, "style") and Bright.seen == 3


def test_models_that_answer_are_asked_names_and_other_things(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    rows = [{"image": "x.png", "question": "Who?", "answer": a} for a in ("b", "c", "d")]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    target = Llava.tiny()
    got = Quantised(bits=(8,), source=str(tmp_path / "q.jsonl")).score(target, testing.task_for(target), NOTHING)
    assert {k: s.n for k, s in got.items()} == {"int8_name_accuracy": 1, "int8_vqa": 2}
    with pytest.raises(UsageError, match="source"):
        Quantised().score(target, testing.task_for(target), NOTHING)


def test_which_way_is_better_is_that_of_the_metric() -> None:
    better = Quantised().better
    assert better("quantised/int8_ua") and better("quantised/int4_ta") and better("quantised/int4_vqa")
    assert not better("quantised/int8_fa") and not better("quantised/int8_name_accuracy")
    assert Relearned().better("relearned/steps_to_half") and not Relearned().better("relearned/fa_after_4")
    assert not Relearned().better("relearned/reached")


# --- relearning ---------------------------------------------------------------------------------------------------
def taught(target: Any, task: Task) -> Any:
    """A copy that names the concept: what stands for the model before the erasure."""
    copy = target.frozen()
    with sandbox(copy, 0):
        forget = target.forgotten(task, Asked(pictures=8))
        for _ in Relearned(steps=32, lr=0.003, lr_pairs=0.003).taught(copy, forget, forget):
            pass
    return copy


@pytest.mark.parametrize("kind", [Classifier, CLIP])
def test_the_curve_starts_at_the_model_and_ends_at_half_of_the_original(kind: Any) -> None:
    target = kind.tiny(seed=2)  # which does not name the concept
    task = testing.task_for(target)
    target.original = lambda: taught(target, task)
    old = {n: p.clone() for n, p in target.named().items()}
    probe = Relearned(shots=8, steps=16, lr=0.003, lr_pairs=0.003)
    got = probe.score(target, task, NOTHING)
    assert list(got) == ["steps_to_half", "reached", *(f"fa_after_{i}" for i in (0, 1, 2, 4, 8, 16))]
    table = got["steps_to_half"].table
    assert table["steps"] == [0, 1, 2, 4, 8, 16] and table["fa"] == [got[f"fa_after_{i}"].value for i in table["steps"]]
    assert table["original"] > 50 and table["reached"] and got["reached"].value == 1 and table["shots"] == 8
    half = [i for i, v in zip(table["steps"], table["fa"], strict=True) if v >= table["original"] / 2]
    assert got["steps_to_half"].value == half[0] > 0 and json.dumps(table)
    assert all(torch.equal(p, old[n]) for n, p in target.named().items()), "the model itself is not taught"
    assert all(not p.requires_grad and p.grad is None for p in target.named().values())
    with sandbox(target, 0):
        shots, held = probe.parted(target, task)
    assert got["fa_after_0"] == named(target, held)
    if kind is Classifier:
        assert not set(shots.indices.tolist()) & set(held.indices.tolist()) and len(held) == 8
    else:
        assert held.digest != shots.digest, "what is measured is of the test split"
    assert {shots.classes[y] for y in (*shots.labels.tolist(), *held.labels.tolist())} == set(task.concepts)


def test_a_model_that_learns_nothing_does_not_reach_half() -> None:
    target = Classifier.tiny(seed=2)
    task = testing.task_for(target)
    target.original = lambda: taught(target, task)
    got = Relearned(steps=3, lr=0.0).score(target, task, NOTHING)
    assert got["steps_to_half"].value == 3 and got["reached"].value == 0 and got["steps_to_half"].table["steps"] == [0, 1, 2, 3]
    assert got["steps_to_half"].table["shots"] == 8, "of sixteen pictures half is measured"


def test_the_untouched_model_is_at_its_start_and_the_seed_is_the_runs() -> None:
    target = CLIP.tiny(seed=1)
    task = testing.task_for(target)
    target.original = lambda: target
    assert Relearned(steps=0).score(target, task, NOTHING)["steps_to_half"].value == 0
    curves = []
    for seed in (5, 5, 6):
        rows: Any = SimpleNamespace(record={"run": {"seed": seed}}, verdicts={}, references=())
        rng = torch.get_rng_state()
        curves.append(Relearned(shots=4, batch=2, steps=4, lr_pairs=0.01).score(target, task, rows))
        assert torch.equal(rng, torch.get_rng_state())
    with sandbox(target, 5):
        first = Relearned(shots=4).parted(target, task)[0].indices.tolist()
    with sandbox(target, 6):
        other = Relearned(shots=4).parted(target, task)[0].indices.tolist()
    assert curves[0] == curves[1] and first != other


def test_texts_go_with_their_pictures() -> None:
    target = CLIP.tiny()
    forget = replace(target.open(testing.task_for(target).retain))
    some = forget.only(torch.tensor([5, 0]))
    assert some.texts == (forget.texts[5], forget.texts[0]) and torch.equal(some.indices, forget.indices[[5, 0]])


def test_what_cannot_be_probed_is_said() -> None:
    target: Any
    for target in (StableDiffusion.tiny(), Llava.tiny()):
        with pytest.raises(UsageError, match="leave it out with --metrics"):
            Relearned().score(target, testing.task_for(target), NOTHING)
    classifier = Classifier.tiny()
    task = testing.task_for(classifier)
    with pytest.raises(UsageError, match="evaluate a run folder"):
        Relearned().score(classifier, task, NOTHING)
    classifier.original = lambda: classifier
    with pytest.raises(UsageError, match="forget more"):
        Relearned().score(classifier, replace(task, forget=replace(task.forget, rows="random=1")), NOTHING)
    clip = CLIP.tiny()
    clip.original = lambda: clip
    with pytest.raises(UsageError, match="no test picture of tiny is called zq"):
        Relearned().score(clip, replace(testing.task_for(clip), concepts=("zq",)), NOTHING)


@pytest.mark.parametrize(
    ("metric", "fields", "words"),
    [
        (Quantised, {"bits": [1]}, "from 2 to 8"),
        (Quantised, {"bits": []}, "from 2 to 8"),
        (Quantised, {"seeds": -1}, "seeds is -1"),
        (Relearned, {"shots": 0}, "shots is 0"),
        (Relearned, {"batch": 0}, "batch is 0"),
        (Relearned, {"steps": -1}, "steps is -1"),
    ],
)
def test_bad_fields_are_refused(metric: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config.build(metric, fields)


def test_a_run_is_probed_from_its_folder(tmp_path: Path) -> None:
    target = Classifier.tiny()
    folder = run.erase("ga", "tiny-classifier", testing.task_for(target), runs=tmp_path, seed=7, epochs=1)
    run.evaluate(folder, metrics=["quantised", "relearned:steps=2"])
    rows = {r["metric"]: r for r in run.results(folder)}
    assert rows["quantised/int4_ua"]["higher_is_better"] and not rows["relearned/fa_after_0"]["higher_is_better"]
    assert rows["relearned/steps_to_half"]["table"]["original"] >= 0 and rows["quantised/int8_ta"]["n"] > 0
    erased = run.load(str(folder))
    record = run.read_run(folder)
    old = before("relearned", erased, SimpleNamespace(record=record))  # type: ignore[arg-type]
    assert all(torch.equal(p, target.named()[n]) for n, p in old.named().items()), "as it was before the erasure"
