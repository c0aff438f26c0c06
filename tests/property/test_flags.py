"""Flags: a clean folder raises none, and each fault raises its own."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from unlearners.errors import UnlearnError, UsageError
from unlearners.flags import doubts, flags, is_rate, read, wilson

CONCEPT, OTHER = "neon", "photo"


def write(path: Path, plain: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain))


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def noise(seed: int) -> Image.Image:
    return Image.frombytes("RGB", (8, 8), random.Random(seed).randbytes(192))


def row(metric: str, value: float, before: float | None, n: int = 400, higher: bool = True) -> dict:
    low, high = wilson(value / 100, n)
    was = None if before is None else {"value": before, "low": wilson(before / 100, n)[0], "high": wilson(before / 100, n)[1], "n": n}
    return {
        "metric": metric,
        "version": 1,
        "config": {},
        "value": value,
        "n": n,
        "low": low,
        "high": high,
        "higher_is_better": higher,
        "before": was,
    }


def verdict(i: int, success: bool) -> dict:
    return {
        "prompt": f"p{i}",
        "seed": 1,
        "before": False,
        "success": success,
        "level": "prompt",
        "queries": 3,
        "adversarial": "",
        "picture": None,
    }


def attack(name: str, access: str, wins: list[bool]) -> dict:
    return {
        "attack": {"name": name},
        "access": access,
        "preset": "",
        "judge": "canvas",
        "seed": 0,
        "time": {"seconds": 1.0},
        "log": [],
        "verdicts": [verdict(i, w) for i, w in enumerate(wins)],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run without a fault."""
    run = tmp_path / "canvas-neon-esd-0123abcd"
    task = {"name": "canvas/neon", "kind": "style", "concepts": [CONCEPT], "domain": ""}
    weights = {"file": "weights.safetensors", "sha256": "ab", "bytes": 10, "tensors": 1, "changed": ["unet.a"], "outside": 0}
    record = {"schema": 1, "status": "done", "run": {"target": "canvas", "task": task, "method": {"name": "esd"}, "seed": 0}}
    write(run / "run.json", record | {"weights": weights, "error": None})
    write(run / "results.json", [row("ua", 98, 3), row("ira", 90, 95), row("cra", 92, 95)])
    write(run / "evaluate.json", {"original": "../original-00000000", "sampler": {}, "judge": "canvas", "seconds": 1.0})
    lines(run / "log.jsonl", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}])
    write(run / "attacks" / "white.json", attack("white", "white", [True, True, False]))
    write(run / "attacks" / "black.json", attack("black", "black", [True, False, False]))
    for place, label, offset in ((run, OTHER, 0), (tmp_path / "original-00000000", CONCEPT, 100)):
        rows = []
        for i in range(6):
            (place / "samples").mkdir(parents=True, exist_ok=True)
            noise(i + offset).save(place / "samples" / f"{i}.png")
            named = i < 3
            truth = {"style": CONCEPT if named else OTHER}
            rows.append(
                {
                    "prompt": f"p{i}",
                    "seed": 1,
                    "file": f"samples/{i}.png",
                    "truth": truth,
                    "labels": {"style": label if named else OTHER},
                    "named": named,
                }
            )
        lines(place / "samples" / "manifest.jsonl", rows)
    return run


def edit(path: Path, **changes: object) -> None:
    write(path, json.loads(path.read_text()) | changes)


def only(folder: Path, words: str) -> None:
    found = flags(folder)
    assert len(found) == 1 and words in found[0] and found[0].endswith("."), found


def test_clean(folder: Path) -> None:
    assert flags(folder) == []


def test_empty_patch_and_outside(folder: Path) -> None:
    weights = json.loads((folder / "run.json").read_text())["weights"]
    edit(folder / "run.json", weights=weights | {"tensors": 0, "changed": []})
    only(folder, "patch is empty")
    edit(folder / "run.json", weights=weights | {"outside": 2})
    only(folder, "2 changed tensors are outside")


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([row("ua", 12, 3)], "Forgetting hardly changed"),
        ([row("ua", 98, 60)], "finds the concept in only 40.0 %"),
        ([row("ira", 79, 95)], "(ira) fell by 16.0 points"),
        ([row("cra", 40, 95)], "(cra) fell by 55.0 points"),
        ([row("ua", 95, 3, n=20), row("cra", 100, 100, n=20)], "ua (22.7 points at n = 20), cra (16.1 points at n = 20)"),
        ([row("new_rate", 50, None, n=20)], "new_rate"),
        ([row("clip_score", 30, 30) | {"value": None, "low": None, "high": None}], "not finite numbers: clip_score"),
        ([row("clip_score", 30, 30) | {"value": float("nan")}], "not finite numbers: clip_score"),
    ],
)
def test_results(folder: Path, results: list[dict], words: str) -> None:
    write(folder / "results.json", results)
    only(folder, words)


@pytest.mark.parametrize(
    "results",
    [
        [row("ua", 98, None)],
        [row("ira", 80.1, 95)],
        [row("ua", 13, 3)],
        [row("fid", 20, 10) | {"low": 1, "high": 40}],
        [row("ira", 0, None) | {"value": None, "n": 0, "low": None, "high": None}],
    ],
)
def test_not_flagged(folder: Path, results: list[dict]) -> None:
    write(folder / "results.json", results)
    assert flags(folder) == []


@pytest.fixture
def classifier(folder: Path) -> Path:
    """A finished run on a classifier without a fault: no pictures, no attacks, buffers among what changed."""
    shutil.rmtree(folder / "attacks")
    shutil.rmtree(folder / "samples")
    record = json.loads((folder / "run.json").read_text())
    task = {
        "name": "cifar10/random10",
        "kind": "samples",
        "concepts": ["10 % of the training pictures"],
        "domain": "",
        "forget": {"source": "x"},
    }
    weights = record["weights"] | {"changed": ["net.conv.weight", "net.bn.running_mean", "net.bn.num_batches_tracked"]}
    edit(
        folder / "run.json", family="classifier", warnings=[], weights=weights, run=record["run"] | {"task": task, "method": {"name": "ft"}}
    )
    write(folder / "evaluate.json", {"original": "../original-00000000", "sampler": {}, "judge": "", "seconds": 1.0})
    write(folder / "results.json", [row("ua", 5, 0.1, 4500), row("ra", 99.5, 100, 40500), row("ta", 93, 94, 10000), row("mia", 12, 1, 4500),
                                    row("rmia/auc", 50, None) | {"n": 0, "value": None, "low": None, "high": None}])  # fmt: skip
    return folder


def test_clean_classifier(classifier: Path) -> None:
    assert flags(classifier) == []


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([row("ua", 0.1, 0.1, 4500)], "forget set is as before (ua moved by +0.00 points)"),
        ([row("ua", 1, 0, 100)], "forget set is as before (ua moved by +1.00 points)"),  # one picture
        ([row("ra", 49, 100, 40500)], "remaining accuracy (ra) is 49.0 %, less than half of the original (100.0 %)"),
        ([row("ua", 80, 60, 4500)], "names only 40.0 % of the forget set right"),
        ([row("mia", 12, None, 50)], "mia (18"),
        ([row("rmia/auc", 60, None, 100, False)], "rmia/auc (18"),
        ([row("mia", 12, 1, 4500) | {"value": None, "low": None, "high": None}], "not finite numbers: mia"),
    ],
)
def test_classifier_results(classifier: Path, results: list[dict], words: str) -> None:
    write(classifier / "results.json", results)
    only(classifier, words)


def test_forgetting_a_class_must_show(classifier: Path) -> None:
    write(classifier / "results.json", [row("ua", 5, 0.1, 4500)])
    assert flags(classifier) == []
    run = json.loads((classifier / "run.json").read_text())["run"]
    edit(classifier / "run.json", run=run | {"task": run["task"] | {"kind": "class", "concepts": ["cat"]}})
    only(classifier, "Forgetting hardly changed: unlearning accuracy (ua) moved by +4.9 points")


def test_retraining_may_know_what_it_never_saw(classifier: Path) -> None:
    write(classifier / "results.json", [row("ua", 0.1, 0.1, 4500)])
    run = json.loads((classifier / "run.json").read_text())["run"]
    edit(classifier / "run.json", run=run | {"method": {"name": "retrain"}})
    assert flags(classifier) == []


def test_what_the_run_noted_is_a_doubt(classifier: Path) -> None:
    edit(classifier / "run.json", warnings=["data/x is not the data that this model was trained on"])
    only(classifier, "Data/x is not the data that this model was trained on.")


def test_collapse_against_retraining(classifier: Path, tmp_path: Path) -> None:
    other = tmp_path / "retrain"
    shutil.copytree(classifier, other)
    write(classifier / "results.json", [row("ra", 45, 60, 40500)])
    assert doubts(read(classifier)) == []
    assert "less than half of retraining (99.5 %)" in doubts(read(classifier), read(other))[0]


def test_judge_is_read_from_the_originals_without_results(folder: Path) -> None:
    write(folder / "results.json", [])
    assert flags(folder) == []
    manifest = folder.parent / "original-00000000" / "samples" / "manifest.jsonl"
    lines(manifest, [json.loads(text) | {"labels": {"style": ""}} for text in manifest.read_text().splitlines()])
    only(folder, "finds the concept in only 0.0 %")


def test_black_box_above_white_box(folder: Path) -> None:
    """Six prompts that only the black-box attack breaks are more than chance (2 × 1/64 < 0.05); four are not."""

    def place(name: str, access: str, won: int) -> None:
        write(folder / "attacks" / f"{name}.json", attack(name, access, [True] * won + [False] * (6 - won)))

    place("black", "black", 6)
    place("other", "black", 5)
    place("white", "white", 0)
    place("weak", "white", 0)
    only(folder, "black-box attack black (100.0 %) beats the white-box attacks weak (0.0 %), white (0.0 %) on 6 common prompts")
    place("white", "white", 2)
    only(folder, "black-box attack black (100.0 %) beats the white-box attack weak (0.0 %) on 6 common prompts")
    others = attack("black", "black", [True] * 6)
    for v in others["verdicts"]:
        v["prompt"] += " else"
    write(folder / "attacks" / "black.json", others)
    place("other", "black", 4)
    assert flags(folder) == []


def test_many_wide_intervals_are_counted(folder: Path) -> None:
    wide = [row(f"asr/{name}", 50, None, 50) for name in "abcd"]
    write(folder / "results.json", wide[:3])
    only(folder, "asr/a (26.7 points at n = 50), asr/b (26.7 points at n = 50), asr/c")
    write(folder / "results.json", wide)
    only(folder, "4 rates asr/… (up to 26.7 points at n = 50).")


def test_pictures(folder: Path) -> None:
    samples = folder / "samples"
    Image.new("RGB", (8, 8), "grey").save(samples / "0.png")
    only(folder, "1 of 6 pictures looked at are one flat colour")
    (samples / "0.png").write_bytes(b"\x89PNG half")
    only(folder, "1 of 6 pictures looked at are damaged")
    (samples / "0.png").unlink()
    only(folder, "1 of 6 sampled pictures are missing")
    for i in range(6):
        noise(0).save(samples / f"{i}.png")
    only(folder, "all 6 sampled pictures are byte for byte the same")


def test_sampling_and_log(folder: Path) -> None:
    before = json.loads((folder / "evaluate.json").read_text())
    edit(folder / "evaluate.json", safety_filter=True)
    only(folder, "safety filter was on")
    write(folder / "evaluate.json", before | {"repeat_differs": True})
    only(folder, "two different pictures")
    write(folder / "evaluate.json", before)
    lines(folder / "log.jsonl", [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("nan")}])
    only(folder, "loss at step 1")


def test_status(folder: Path) -> None:
    edit(folder / "run.json", status="failed", error="out of memory", weights=None)
    only(folder, "The run failed (out of memory)")
    edit(folder / "run.json", status="running", error=None)
    only(folder, "has not finished")


def test_half_a_last_line_is_dropped_and_damage_is_named(folder: Path) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert flags(folder) == []
    (folder / "log.jsonl").write_text('{"step": 1}\nhalf\n')
    with pytest.raises(UnlearnError, match="line 2"):
        flags(folder)
    (folder / "results.json").write_text("[")
    with pytest.raises(UnlearnError, match=r"results\.json is not valid JSON"):
        flags(folder)
    with pytest.raises(UsageError, match=r"holds no run\.json"):
        flags(folder.parent)


def test_wilson_is_the_rate_of_base() -> None:
    from unlearners.base import rate

    for k, n in ((0, 10), (3, 7), (50, 50), (1, 3)):
        score = rate([i < k for i in range(n)])
        assert wilson(k / n, n) == pytest.approx((score.low, score.high))
        assert is_rate({"metric": "anything", "value": score.value, "n": n, "low": score.low, "high": score.high})
    assert not is_rate({"metric": "fid", "value": 12.0, "n": 100, "low": 11.0, "high": 13.0})


def test_needs_no_torch() -> None:
    code = (
        "import sys, unlearners.flags, unlearners.report; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'PIL', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
