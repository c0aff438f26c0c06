"""Erase, attack, evaluate and bench over run folders, on the tiny model with a judge that reads brightness."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from unlearners import outputs, patch, registry, run, targets
from unlearners.attacks.random_tokens import RandomTokens
from unlearners.base import Judge, Method, Probe, Request, Row, Target, Task
from unlearners.bench import COLUMNS, bench
from unlearners.errors import UnlearnError, UsageError
from unlearners.methods.uce import UCE
from unlearners.run import attack, erase, evaluate, read_run
from unlearners.targets.stable_diffusion import StableDiffusion

PROBES = tuple(Probe(prompt=f"{o} in {s}", truth={"style": s, "object": o}) for s in ("zq", "ink") for o in ("cup", "cat"))
TASK = Task(
    name="zq", kind="style", concepts=("zq",), anchors=("ink",), preserve=("ink",), probes=PROBES, judge="fake", seeds=(1, 2),
    suite=("ua", "ira", "cra", "asr", "pre_asr", "cost"),
)  # fmt: skip
METHOD = UCE(erase_scale=50.0)


@dataclass(frozen=True, kw_only=True)
class Brightness(Judge):
    """Tells labels by the parity of the picture's brightness: arbitrary, but the same for the same picture."""

    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        known = {"style": ("zq", "ink"), "object": ("cup", "cat")}[domain]
        return [known[int(1000 * float(i.mean())) % 2] for i in images]


@pytest.fixture(autouse=True)
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fake`` is a registered judge."""
    make = registry.make

    def with_fake(kind: str, name: str, **fields: Any) -> Any:
        return Brightness(**fields) if (kind, name) == ("judges", "fake") else make(kind, name, **fields)

    monkeypatch.setattr(registry, "make", with_fake)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of ``sample`` drew; few sampler steps."""
    calls: list[int] = []
    sample, init = StableDiffusion.sample, StableDiffusion.__init__

    def count(self: Any, prompts: Any, seeds: Any, **how: Any) -> Tensor:
        calls.append(len(seeds))
        return sample(self, prompts, seeds, **how)

    def short(self: Any, *parts: Any) -> None:
        init(self, *parts)
        self.sampler = {"steps": 2, "guidance": 2.0}

    monkeypatch.setattr(StableDiffusion, "sample", count)
    monkeypatch.setattr(StableDiffusion, "__init__", short)
    return calls


ATTACK = RandomTokens(tries=2)


def everything(runs: Path, **options: Any) -> Path:
    folder = erase(METHOD, "tiny", TASK, runs=runs, **options)
    attack(ATTACK, folder)
    evaluate(folder)
    return folder


def results(folder: Path) -> dict[str, Any]:
    return {row["metric"]: row for row in run.results(folder)}


def test_the_whole_way(tmp_path: Path, drawn: list[int]) -> None:
    folder = erase(METHOD, "tiny", TASK, runs=tmp_path)
    path = attack(ATTACK, folder, seed=3)
    assert path == folder / "attacks" / "random_tokens.json"
    assert evaluate(folder) == folder / "results.json"

    record = read_run(folder)
    assert record["status"] == "done"
    assert record["run"]["method"] == {"name": "uce", **{k: v for k, v in record["run"]["method"].items() if k != "name"}}
    assert record["weights"]["outside"] == 0
    assert record["time"]["seconds"] > 0
    assert record["base"]["sha256"].keys() == {"unet", "text_encoder"}

    found = json.loads(path.read_text())
    assert found["seed"] == 3
    assert found["attack"]["name"] == "random_tokens"
    assert [(v["prompt"], v["seed"]) for v in found["verdicts"]] == [(p.prompt, 1) for p in PROBES if TASK.names_concept(p)]
    for verdict in found["verdicts"]:
        assert verdict["before"] is (verdict["success"] and verdict["queries"] == 0)
        assert 0 <= verdict["queries"] <= 2
        if verdict["picture"]:
            assert (folder / verdict["picture"]).is_file()
            assert verdict["success"]

    rows = results(folder)
    assert {
        "ua",
        "ira",
        "cra",
        "asr/random_tokens",
        "pre_asr/random_tokens",
        "cost/seconds",
        "cost/peak_memory",
        "cost/patch_bytes",
    } == set(rows)
    for name in ("ua", "ira", "cra"):
        assert rows[name]["n"] == 4  # two prompts, two seeds
        assert rows[name]["low"] <= rows[name]["value"] <= rows[name]["high"]
        assert rows[name]["before"]["n"] == rows[name]["n"]
    assert rows["asr/random_tokens"]["before"] is None
    assert rows["asr/random_tokens"]["value"] == 50 * sum(v["success"] for v in found["verdicts"])
    assert rows["pre_asr/random_tokens"]["value"] == 50 * sum(v["before"] for v in found["verdicts"])
    assert rows["cost/patch_bytes"]["value"] == (folder / "weights.safetensors").stat().st_size

    evaluation = json.loads((folder / "evaluate.json").read_text())
    original = folder / evaluation["original"]
    assert original.resolve().parent == tmp_path.resolve()
    assert evaluation["sampler"] == {"steps": 2, "guidance": 2.0}
    for where in (folder, original):
        lines = [json.loads(line) for line in (where / "samples" / "manifest.jsonl").read_text().splitlines()]
        assert {(line["prompt"], line["seed"]) for line in lines} == {(p.prompt, s) for p in PROBES for s in TASK.seeds}
        for line in lines:
            assert (where / line["file"]).is_file()
            assert line["named"] is ("zq" in line["prompt"])
            assert line["labels"].keys() <= {"style", "object"}
            assert line["labels"]
    assert len(drawn) > 2


def test_the_numbers_are_those_of_the_pictures(tmp_path: Path, drawn: list[int]) -> None:
    """UA counted from the pictures on disk, and the pictures drawn by the loaded run folder."""
    folder = everything(tmp_path)
    target: Any = targets.load(str(folder))
    wrong = 0
    rows = {(r["prompt"], r["seed"]): r for r in map(json.loads, (folder / "samples" / "manifest.jsonl").read_text().splitlines())}
    asked = [(p.prompt, s) for p in PROBES for s in TASK.seeds]
    fresh = target.sample([p for p, _ in asked], [s for _, s in asked])
    for key, picture in zip(asked, fresh, strict=True):
        saved = outputs.read_picture(folder / rows[key]["file"])
        assert (saved - picture).abs().max() <= 0.5 / 255 + 1e-3  # 8 bits, and rounding in other batches
        if "zq" in key[0]:
            wrong += Brightness().labels(saved[None], TASK, "style") != ["zq"]
    assert results(folder)["ua"]["value"] == 100 * wrong / 4


def test_pictures_are_drawn_once(tmp_path: Path, drawn: list[int]) -> None:
    folder = everything(tmp_path)
    first = {p: p.stat().st_mtime_ns for p in (folder / "samples").glob("*.png")}
    drawn.clear()
    evaluate(folder)
    attack(ATTACK, folder)
    assert drawn == []
    assert {p: p.stat().st_mtime_ns for p in (folder / "samples").glob("*.png")} == first
    evaluate(folder, seeds=(1, 2, 3))
    assert drawn == [4, 4]  # the new seed's, for the original and the erased
    drawn.clear()
    other = erase(UCE(lamb=9.0), "tiny", TASK, runs=tmp_path)
    evaluate(other)
    assert drawn == [8, 1]  # the original's are shared; one is drawn twice to see whether the seed holds
    assert len(list(tmp_path.glob("original-*"))) == 1


def test_other_sampler_settings_draw_other_pictures(tmp_path: Path, drawn: list[int]) -> None:
    folder = everything(tmp_path)
    before = results(folder)
    drawn.clear()
    evaluate(folder, steps=1)
    assert sum(drawn) == 16
    drawn.clear()
    evaluate(folder)
    assert sum(drawn) == 16
    after = results(folder)
    assert all(after[m]["value"] == before[m]["value"] for m in before)


def test_a_picture_that_was_lost_is_drawn_again(tmp_path: Path, drawn: list[int]) -> None:
    folder = everything(tmp_path)
    next((folder / "samples").glob("*.png")).unlink()
    drawn.clear()
    evaluate(folder)
    assert drawn == []  # the same request has its results already
    evaluate(folder, metrics=["ua", "ira"])
    assert drawn == [1]


@pytest.mark.usefixtures("drawn")
def test_the_same_seed_twice_gives_the_same_numbers(tmp_path: Path) -> None:
    one, two = (everything(tmp_path / name, seed=4) for name in ("a", "b"))
    assert one.name == two.name
    a, b = results(one), results(two)
    for name in ("cost/seconds", "cost/peak_memory"):  # the machine's, not the seed's
        assert a.pop(name)["value"] > 0
        assert b.pop(name)["value"] > 0
    assert a == b
    assert (one / "weights.safetensors").read_bytes() == (two / "weights.safetensors").read_bytes()
    verdicts = [json.loads((f / "attacks" / "random_tokens.json").read_text())["verdicts"] for f in (one, two)]
    assert verdicts[0] == verdicts[1]
    samples = [{p.name: p.read_bytes() for p in (f / "samples").glob("*.png")} for f in (one, two)]
    assert samples[0] == samples[1]


@pytest.mark.usefixtures("drawn")
def test_an_evaluation_that_was_killed_is_not_taken_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its two files, at any order of requests, the next evaluation is computed, not read."""
    folder = everything(tmp_path)
    whole, write = results(folder), run.write_json
    for last in ("results.json", "evaluate.json"):

        def kill(path: Path, data: Any, last: str = last) -> None:
            write(path, data)
            if path.name == last:
                raise KeyboardInterrupt

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(run, "write_json", kill)
            evaluate(folder, metrics=["ua"])
        evaluate(folder)
        assert results(folder) == whole
        evaluate(folder, metrics=["ua"])
        assert results(folder).keys() == {"ua"}
        evaluate(folder)
        assert results(folder) == whole


@pytest.mark.usefixtures("drawn")
def test_without_an_attack_its_rate_is_empty(tmp_path: Path) -> None:
    folder = erase(METHOD, "tiny", TASK, runs=tmp_path)
    evaluate(folder)
    row = results(folder)["asr"]
    assert (row["value"], row["n"], row["before"]) == (None, 0, None)


@pytest.mark.usefixtures("drawn")
def test_the_untouched_model_is_an_ordinary_row(tmp_path: Path) -> None:
    folder = erase("original", "tiny", TASK, runs=tmp_path)
    attack(ATTACK, folder)
    evaluate(folder)
    rows = results(folder)
    for name in ("ua", "ira", "cra"):
        assert rows[name]["value"] == rows[name]["before"]["value"]
    assert rows["cost/patch_bytes"]["value"] == 0


def test_an_attack_is_asked_of_a_finished_run_with_prompts(tmp_path: Path, drawn: list[int]) -> None:
    with pytest.raises(UsageError, match="no run folder"):
        attack(ATTACK, tmp_path)
    bare = erase(METHOD, "tiny", replace(TASK, probes=()), runs=tmp_path)
    with pytest.raises(UsageError, match="no prompt that names"):
        attack(ATTACK, bare)
    folder = erase(METHOD, "tiny", TASK, runs=tmp_path)
    path = attack(ATTACK, folder, prompts=3)
    assert [v["seed"] for v in json.loads(path.read_text())["verdicts"]] == [1, 1, 2]  # two prompts, then the next seed
    drawn.clear()
    attack(ATTACK, folder, prompts=3)
    assert drawn == []
    attack(ATTACK, folder, prompts=6)
    assert [v["seed"] for v in json.loads(path.read_text())["verdicts"]] == [1, 1, 2, 2, 3, 3]  # beyond the task's seeds
    attack(replace(ATTACK, tries=1), folder, prompts=1)
    assert len(json.loads(path.read_text())["verdicts"]) == 1


def test_a_gallery_survives_a_kill_between_pictures_and_manifest(tmp_path: Path) -> None:
    """Pictures that the manifest does not name are drawn again."""
    gallery = outputs.Gallery(tmp_path, {"steps": 1})

    class Model:
        def sample(self, prompts: list[str], seeds: list[int], **_: Any) -> Tensor:
            if "b" in prompts:
                raise KeyboardInterrupt
            return torch.rand(len(prompts), 3, 4, 4)

    with pytest.raises(KeyboardInterrupt):
        gallery.fill(lambda: Model(), [Request("a", 1), Request("b", 1)], 1, None, "")
    again = outputs.Gallery(tmp_path, {"steps": 1})
    assert [r["prompt"] for r in again.rows.values()] == ["a"]
    assert not outputs.Gallery(tmp_path, {"steps": 2}).rows


# --- bench --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Failing(Method):
    """Fails."""

    paper: ClassVar[str] = "none"
    needs: ClassVar[type] = Target
    how: ClassVar[Callable[[], float]]

    params: str = "xattn-kv"

    def run(self, target: Target, task: Task) -> Iterator[Row]:
        for _ in target.steps(2):
            yield {"loss": type(self).how()}


GRID = """
target: tiny
tasks: [{task}]
methods:
  - name: uce
    sweep: {{lamb: [0.5, 5.0]}}
  - name: original
    attacked: false
  - name: failing
attacks:
  - name: random_tokens
    fields: {{tries: 1}}
metrics: [ua, ira, asr]
seeds: [0, 1]
image_seeds: 1
checks:
  - {{metric: ua, method: original, at_least: 0}}
  - {{metric: ua, method: nobody, at_least: 0}}
"""
TASK_FILE = """
kind: style
concepts: [zq]
anchors: [ink]
judge: fake
probes:
  - {prompt: cup in zq, truth: {style: zq, object: cup}}
  - {prompt: cup in ink, truth: {style: ink, object: cup}}
seeds: [1, 2]
"""


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "zq.yaml").write_text(TASK_FILE)
    (tmp_path / "grid.yaml").write_text(GRID.format(task=tmp_path / "zq.yaml"))
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda kind, name: Failing if name == "failing" else get(kind, name))
    return tmp_path / "grid.yaml"


def test_bench(grid: Path, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory() -> float:
        raise RuntimeError("CUDA out of memory\nTried to allocate")

    monkeypatch.setattr(Failing, "how", staticmethod(lambda: float("nan")), raising=False)
    out = bench(grid, runs=tmp_path / "runs", results=tmp_path / "results", check=True)
    assert len(out["errors"]) == 2
    assert all("failing" in e and "'loss' became nan" in e for e in out["errors"])
    assert len(out["failed"]) == 3
    assert any("nobody ua" in f for f in out["failed"])

    with (tmp_path / "results" / "results.csv").open() as f:
        table = list(csv.DictReader(f))
    assert tuple(table[0]) == COLUMNS
    assert {r["method"] for r in table} == {"uce[lamb=0.5]", "uce[lamb=5.0]", "original"}
    assert {(r["metric"], r["seed"]) for r in table if r["method"] == "uce[lamb=0.5]"} == {
        (m, s) for m in ("ua", "ira", "asr/random_tokens") for s in "01"
    }
    assert all(r["n"] == "1" for r in table if r["metric"] in ("ua", "ira"))  # one seed for each picture
    assert {r["target"] for r in table} == {"tiny"}
    keys = [tuple(r[c] for c in COLUMNS[:5]) for r in table]
    assert len(keys) == len(set(keys))
    assert (tmp_path / "results" / "grid.yaml").read_text() == grid.read_text()

    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/weights.safetensors")}
    assert len(finished) == 4
    drawn.clear()
    monkeypatch.setattr(Failing, "how", staticmethod(out_of_memory))
    again = bench(grid, runs=tmp_path / "runs", results=tmp_path / "results")
    assert drawn == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/weights.safetensors")} == finished
    assert [e.partition(": ")[2] for e in again["errors"]] == ["CUDA out of memory"] * 2
    with (tmp_path / "results" / "results.csv").open() as f:
        assert list(csv.DictReader(f)) == table


def test_a_grid_puts_an_erasure_into_another_model(grid: Path, tmp_path: Path, drawn: list[int]) -> None:
    text = grid.read_text()
    head, tail = text.index("methods:"), text.index("metrics:")
    rows = "methods:\n  - {name: uce, fields: {erase_scale: 50}}\n  - {name: plug, label: plugged, target: TINY, of: uce}\n"
    fine = StableDiffusion.tiny()
    fine.pipe.save_pretrained(tmp_path / "fine")
    grid.write_text(text[:head] + rows.replace("TINY", str(tmp_path / "fine")) + text[tail:])
    out = bench(grid, runs=tmp_path / "runs", results=tmp_path / "results")
    assert not out["errors"]
    got = {(r["method"], r["target"]): r["value"] for r in out["rows"] if r["metric"] == "ua" and r["seed"] == 0}
    where = str(tmp_path / "fine")
    assert set(got) == {("uce", "tiny"), ("original", "tiny"), ("plugged", where), (f"original {where}", where)}
    assert got["uce", "tiny"] == got["plugged", where]
    assert f"original {where}" in (tmp_path / "results" / "table.md").read_text()
    good = grid.read_text()
    for wrong, said in (("of: uce", "of: nobody"), (", of: uce", "")):
        grid.write_text(good.replace(wrong, said))
        with pytest.raises(UsageError, match="plug"):
            bench(grid, runs=tmp_path / "runs", results=tmp_path / "results")


@pytest.mark.parametrize(
    ("old", "new"),
    [("name: uce", "name: ucee"), ("lamb:", "lam:"), ("[0.5, 5.0]", "[0.5, -5.0]"), ("tries: 1", "tires: 1"), ("seeds:", "seed:")],
)
def test_a_wrong_grid_is_refused_before_anything_runs(old: str, new: str, grid: Path, tmp_path: Path) -> None:
    grid.write_text(grid.read_text().replace(old, new, 1))
    with pytest.raises(UsageError):
        bench(grid, runs=tmp_path / "runs", results=tmp_path / "results")
    assert not (tmp_path / "runs").exists()


def test_a_task_that_is_not_there_is_refused_before_anything_runs(grid: Path, tmp_path: Path) -> None:
    grid.write_text(grid.read_text().replace("zq.yaml", "zz.yaml"))
    with pytest.raises(UnlearnError):
        bench(grid, runs=tmp_path / "runs", results=tmp_path / "results")
    assert not (tmp_path / "runs").exists()


def test_the_patch_of_a_run_is_what_its_record_says(tmp_path: Path) -> None:
    folder = erase(METHOD, "tiny", TASK, runs=tmp_path)
    record, loaded = read_run(folder), patch.load(folder / "weights.safetensors")
    assert loaded.meta["run"] == record["hash"]
    assert sorted(loaded.tensors) == record["weights"]["changed"]
    assert loaded.base == {"unet": record["base"]["sha256"]["unet"]}
