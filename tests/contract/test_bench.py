"""Grids: order and choice of runs, tables beside published numbers, and the same table after any kill, on tiny classifiers."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from unlearners import config, run, tables
from unlearners.bench import bench, edges
from unlearners.board import Board, clock
from unlearners.errors import UnlearnError, UsageError
from unlearners.files import turn
from unlearners.grids import Check, cells, read
from unlearners.tables import Published, compare, doubts
from unlearners.targets import read_run
from unlearners.targets.classifier import Classifier
from unlearners.workers import Crew, Here, Job, Outcome, Processes, Ray, perform, threads

GRIDS = sorted(p for p in (Path(__file__).parents[2] / "bench").glob("*.yaml") if p.name != "published.yaml")
SPLIT = {"source": "tiny", "validation": 0.25}
TASK = {
    "kind": "class", "concepts": ["b"], "judge": "", "forget": {**SPLIT, "rows": "class=b"}, "retain": {**SPLIT, "rows": "not class=b"},
    "holdout": {**SPLIT, "split": "test", "rows": "not class=b"},
}  # fmt: skip
SHORT = {"epochs": 2, "batch": 16, "cache": False}
FT = {"name": "ft", "preset": "short", "fields": {"batch": 16}, "sweep": {"lr": [0.1, 0.01]}}
GRID: dict[str, Any] = {
    "train": {"architecture": "resnet20_cifar:width=4", "data": SPLIT, "preset": "short", "fields": SHORT, "label": "small"},
    "tasks": ["b.yaml"],
    "methods": [{"name": "original"}, FT, {"name": "retrain", "preset": "short", "fields": SHORT}],
    "metrics": ["ua", "ra", "ta", "mia", "rmia", "cost"],
    "seeds": [0, 1],
}


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``grid(**changes)`` writes the grid with top-level changes into the current folder, which is a new one."""
    monkeypatch.chdir(tmp_path)
    Path("b.yaml").write_text(yaml.safe_dump(TASK))

    def write(**changes: Any) -> Path:
        Path("grid.yaml").write_text(yaml.safe_dump({**GRID, **changes}))
        return Path("grid.yaml")

    return write


def table(path: Path | str) -> list[dict[str, str]]:
    """results.csv without what the machine decides."""
    with Path(path).open(newline="") as file:
        return [r for r in csv.DictReader(file) if not r["metric"].startswith("cost/")]


def value(rows: Sequence[dict[str, str]], method: str, seed: int, metric: str) -> float:
    (found,) = [r["value"] for r in rows if (r["method"], r["seed"], r["metric"]) == (method, str(seed), metric)]
    return float(found)


# --- the whole way ------------------------------------------------------------------------------------------------
def test_a_grid_trains_unlearns_and_compares(grid: Callable[..., Path]) -> None:
    out = bench(grid(), runs="runs", results="results")
    assert not out["errors"]
    rows = table("results/results.csv")
    assert {r["target"] for r in rows} == {"small"}
    assert {r["method"] for r in rows} == {"original", "ft[lr=0.1]", "ft[lr=0.01]", "retrain"}
    for seed in (0, 1):
        for method in ("original", "ft[lr=0.1]", "retrain"):
            apart = [abs(value(rows, method, seed, m) - value(rows, "retrain", seed, m)) for m in ("ua", "ra", "ta", "mia")]
            assert value(rows, method, seed, "avg_gap") == pytest.approx(sum(apart) / 4, abs=1e-3)
    trained = sorted(Path("runs").glob("trained-*/model.safetensors"))
    assert len(trained) == 2 and trained[0].read_bytes() != trained[1].read_bytes()
    for folder in Path("runs").glob("b-*"):
        record = read_run(folder)
        asked = json.loads((folder / "evaluate.json").read_text())["asked"]
        (used,) = asked["references"]
        (other,) = [f for f in Path("runs").glob("b-retrain-*") if read_run(f)["hash"] == used]
        assert read_run(other)["run"]["seed"] != record["run"]["seed"], "rmia takes the other seed's retrained model"

    made = {
        p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.name in ("weights.safetensors", "results.json", "model.safetensors")
    }
    assert bench("grid.yaml", runs="runs", results="again")["rows"] == out["rows"]
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert Path("again/results.csv").read_text() == Path("results/results.csv").read_text()


def test_a_failing_original_costs_its_seed_only(grid: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    train = importlib.import_module("unlearners.train")
    real = train.train

    def fails(*args: Any, **how: Any) -> Path:
        if how["seed"] == 1:
            raise IndexError("index 3 is out of bounds")
        return real(*args, **how)  # type: ignore[no-any-return]

    monkeypatch.setattr(train, "train", fails)
    out = bench(grid(methods=GRID["methods"][:1]), runs="runs", results="results", check=True)
    assert out["errors"] == ["small (original), seed 1: IndexError: index 3 is out of bounds (2 jobs wait for it)"]
    assert out["failed"] == out["errors"]
    assert {r["seed"] for r in table("results/results.csv")} == {"0"}
    assert "IndexError" in Path("runs/errors.log").read_text()
    monkeypatch.setattr(train, "train", real)
    assert not bench("grid.yaml", runs="runs", results="results")["errors"]
    assert {r["seed"] for r in table("results/results.csv")} == {"0", "1"}


# --- choosing -----------------------------------------------------------------------------------------------------
def test_selection_sees_the_validation_split_alone(grid: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, opens = run.evaluate, Classifier.open
    during: list[str] = []
    splits: dict[str, set[str]] = {"validation": set(), "test": set()}

    def watched(folder: Any, **how: Any) -> Path:
        during.append(how.get("split", "test"))
        done = evaluate(folder, **how)
        during.pop()
        return done

    def opened(self: Any, data: Any) -> Any:
        if during:
            splits[during[-1]].add(data.split)
        return opens(self, data)

    monkeypatch.setattr(run, "evaluate", watched)
    monkeypatch.setattr(Classifier, "open", opened)
    out = bench(grid(), runs="runs", results="results", select=True)
    assert not out["errors"]
    assert splits == {"validation": {"train", "validation"}, "test": {"train", "test"}}

    with Path("results/selected.csv").open(newline="") as file:
        choice = list(csv.DictReader(file))
    assert {r["seed"] for r in choice} == {"0"}
    base = next(r for r in choice if r["method"] == "retrain")
    tried = [r for r in choice if r["method"] == "ft"]
    assert [r["values"] for r in tried] == ["lr=0.1", "lr=0.01"]
    for r in tried:
        gap = sum(abs(float(r[m]) - float(base[m])) for m in ("ua", "ra", "ta", "mia")) / 4
        assert float(r["gap"]) == pytest.approx(gap, abs=1e-3)
    (best,) = [r for r in tried if r["chosen"]]
    assert float(best["gap"]) == min(float(r["gap"]) for r in tried)
    assert "tried" in best["note"]

    rows = table("results/results.csv")
    assert {r["method"] for r in rows} == {"original", "ft", "retrain"}
    lr = float(best["values"].removeprefix("lr="))
    folders = [f for f in Path("runs").glob("b-ft-*") if read_run(f)["run"]["method"]["lr"] == lr]
    assert len(folders) == 2  # both seeds
    for folder in folders:
        seed = read_run(folder)["run"]["seed"]
        ua = next(r["value"] for r in run.results(folder) if r["metric"] == "ua")
        assert value(rows, "ft", seed, "ua") == pytest.approx(ua, abs=1e-3)
    assert best["note"] in Path("results/table.html").read_text()


def test_nothing_is_chosen_where_nothing_could_be_measured(grid: Callable[..., Path]) -> None:
    bad = {**FT, "label": "bad", "sweep": {"lr": [1e30, 1e35]}}
    out = bench(grid(methods=[FT, bad, GRID["methods"][2]], seeds=[0]), runs="runs", results="results", select=True)
    assert len(out["errors"]) == 3
    assert "bad on b.yaml: none of its 2 settings could be compared, so none is chosen" in out["errors"]
    assert {r["method"] for r in table("results/results.csv")} == {"original", "ft", "retrain"}


def test_edges() -> None:
    tried = [{"lr": a, "mode": m} for a in (1, 0.1, 10) for m in ("x", "y")]
    assert edges({"lr": 1, "mode": "x"}, tried) == ""
    assert edges({"lr": 0.1, "mode": "x"}, tried) == "lr=0.1 is the lowest tried"
    assert edges({"lr": 10, "mode": "y"}, tried) == "lr=10 is the highest tried"
    assert edges({"lr": 5}, [{"lr": 5}]) == ""


# --- what a grid may say ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "how", "said"),
    [
        ({"methods": [FT]}, {"select": True}, "lacks; add it"),
        ({"methods": GRID["methods"][2:]}, {"select": True}, "nothing to choose"),
        ({"select": {"metrics": ["rmia/auc"]}}, {"select": True}, "needs other models"),
        ({"target": "tiny-classifier"}, {}, "take out 'target' or 'train'"),
        ({"methods": [{"name": "ft"}, {"name": "ft", "preset": "short"}]}, {}, "'label' of its own"),
        ({"metrics": ["uaa"]}, {}, "uaa"),
        ({"seeds": []}, {}, "at least one task, method and seed"),
        ({"train": {**GRID["train"], "data": {"source": "tiny"}}}, {}, "another split"),
        ({"train": {**GRID["train"], "preset": "shrt"}}, {}, "shrt"),
        ({"published": ["nobody"]}, {}, "there is no published.yaml"),
        ({"checks": [{"metric": "ua", "method": "ft"}]}, {}, "at_least or at_most"),
        ({"dtype": "int8"}, {}, "int8"),
        ({}, {"jobs": -1}, "--jobs 1"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(changes: Any, how: Any, said: str, grid: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        bench(grid(**changes), runs="runs", results="results", **how)
    assert not Path("runs").exists() and not Path("results").exists()


def test_selection_needs_a_validation_split(grid: Callable[..., Path]) -> None:
    whole = json.loads(json.dumps(TASK).replace('"validation": 0.25, ', "").replace(', "validation": 0.25', ""))
    Path("b.yaml").write_text(yaml.safe_dump(whole))
    changed = grid(train={**GRID["train"], "data": {"source": "tiny"}})
    with pytest.raises(UsageError, match="needs a validation split"):
        bench(changed, runs="runs", select=True)


def test_without_ray_it_says_how_to_get_it(grid: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'unlearners[ray]'")):
        bench(grid(), runs="runs", results="results", executor="ray")


def test_a_ray_that_does_not_start_is_one_sentence(grid: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = types.SimpleNamespace(is_initialized=lambda: False, shutdown=lambda: stopped.append(True))
    stopped: list[bool] = []

    def init(**how: Any) -> None:
        assert how["address"] == "local" and how["num_cpus"] == 3
        raise Exception("The current node timed out during startup.\nmore")

    ray.init = init
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(UnlearnError, match=r"Ray did not start \(The current node timed out during startup\.\); give the same"):
        bench(grid(), runs="runs", results="results", executor="ray", jobs=3)
    assert stopped


def test_checks() -> None:
    rows = [{"method": "m", "metric": "ua", "task": t, "value": v} for t, v in (("a", 90.0), ("b", 100.0), ("b", None))]
    missed = importlib.import_module("unlearners.bench")._missed
    assert missed(Check(metric="ua", method="m", at_least=95, at_most=95), rows) == ""
    assert missed(Check(metric="ua", method="m", at_least=95.1), rows) == "m ua: 95.0 < 95.1"
    assert missed(Check(metric="ua", method="m", tasks=("b",), at_most=99), rows) == "m ua on b: 100.0 > 99"
    for way in ("at_least", "at_most"):
        assert "nan" in missed(config.build(Check, {"metric": "ua", "method": "nobody", way: 0}), rows)


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.name)
def test_the_grids_of_the_repository(path: Path) -> None:
    spec = read(path)
    found = tables.published(path.parent / "published.yaml", spec.published)
    assert all(p.task in ("", *spec.tasks) for p in found)
    labels = {p.label.partition("[")[0] for p in cells(spec)}
    for p in found:
        assert set(p.rows) <= labels, f"{path.name} leaves out a row of '{p.title}'"


# --- published numbers --------------------------------------------------------------------------------------------
def test_published_gaps_are_those_of_their_rows() -> None:
    """Every table with a retrained row: the mean of four differences, as far as rounding allows."""
    found = config.build(dict[str, Published], config.load_yaml(GRIDS[0].parent / "published.yaml"))
    checked = 0
    for name, one in found.items():
        mean = {m: {k: v[0] if isinstance(v, tuple) else v for k, v in row.items()} for m, row in one.rows.items()}
        for method, row in mean.items():
            if "avg_gap" in row:
                gap = sum(abs(row[k] - mean["retrain"][k]) for k in ("ua", "ra", "ta", "mia")) / 4
                assert row["avg_gap"] == pytest.approx(gap, abs=0.12 if one.status == "third party" else 0.02), (name, method)
                checked += 1
    assert checked > 40


def test_compare() -> None:
    assert compare([5.0], None, 10) == ("–", "–", False)
    assert compare([], (5.0, 1.0), 10) == ("5.00 ± 1.00", "–", False)
    assert compare([9.0], (5.0, None), 0) == ("5.00", "+4.00", False)  # one run, no scatter known
    assert compare([7.0], (5.0, 1.0), 10) == ("5.00 ± 1.00", "+2.00", False)  # 2 < 2 sqrt(1 + 0.1)
    assert compare([7.2], (5.0, 1.0), 10)[2]
    assert compare([6.0, 8.0], (5.0, None), 0) == ("5.00", "+2.00", False)  # se 1, 2 <= 2
    assert compare([6.1, 8.1], (5.0, None), 0)[2]
    assert not compare([100.0], (100.0, 0.0), 10)[2]


def test_many_attacks_have_a_table_of_their_own(tmp_path: Path) -> None:
    common = {"target": "canvas", "task": "t", "seed": 0, "device": "cpu", "preset": "paper", "low": None, "high": None, "n": 10}
    metrics = [f"{kind}/{attack}" for attack in "abcd" for kind in ("pre_asr", "asr")]
    rows = [{**common, "method": "esd", "metric": m, "value": 20.0 if m.startswith("pre") else 50.0} for m in [*metrics, "ua"]]
    rows.append({**common, "method": "uce", "metric": "asr/b", "value": 0.0})
    written = tables.write(tmp_path, "grid", rows, ["esd", "uce"], [], {}, "")[0].read_text()
    plain, own = written.replace("\\", "").split("## t: attacks")
    assert "asr" not in plain.lower() and "| esd | 50.0 [24, 76] |" in plain
    lines = [line for line in own.splitlines() if line.startswith("|")]
    assert lines[0] == "| attack | esd | uce |  |" and lines[2] == "| none | 20.0 [6, 51] | – |  |"
    assert lines[3] == "| a | 50.0 [24, 76] | – |  |" and lines[4] == "| b | 50.0 [24, 76] | 0.0 [0, 28] |  |" and len(lines) == 7
    few = [r for r in rows if not r["metric"].endswith("/d")]
    assert "attacks" not in tables.write(tmp_path, "grid", few, ["esd"], [], {}, "")[0].read_text()


def test_shares_are_pooled_over_seeds_and_tables_say_which_claims_hold() -> None:
    common = {"target": "canvas", "task": "t", "device": "cpu", "preset": "paper", "low": None, "high": None}
    found = {"esd": ((40.0, 10), (60.0, 10)), "mine": ((20.0, 10), (20.0, 10))}
    rows = [
        {**common, "method": m, "seed": seed, "metric": "asr/x", "value": v, "n": n}
        for m, pairs in found.items()
        for seed, (v, n) in enumerate(pairs)
    ]
    shown = tables.sheet("t", rows, ["esd", "mine"], None, {}, "")
    assert [r[:2] for r in shown.rows] == [["esd", "50.0 [30, 70]"], ["mine", "20.0 [8, 42]"]]  # Wilson, n = 20
    claims = [
        tables.Claim(says="half", source="paper", metric="asr/x", method="mine", than="esd", factor=0.5),
        tables.Claim(says="a third", source="paper", metric="asr/x", method="mine", than="esd", factor=1 / 3),
        tables.Claim(says="more", source="paper", metric="asr/x", method="esd", than="mine", holds="at least", margin=30),
        tables.Claim(says="other", source="paper", metric="ira", method="esd", than="mine"),
        tables.Claim(says="elsewhere", source="paper", metric="asr/x", method="esd", than="mine", tasks=("u",)),
    ]
    claims.append(tables.Claim(says="same", source="paper", metric="asr/x", method="esd", than="esd"))
    held = tables.held(rows, claims)
    assert [r[-1] for r in held.rows] == ["held", "not held", "held", "not measured", "not measured", "no difference"]
    assert held.rows[0][2:5] == ["ASR x of mine at most 0.5 × that of esd", "20.0", "50.0"]


def test_doubts() -> None:
    values = {("retrain", "ra"): [99.0, 99.0], ("original", "ua"): [1.0]}
    assert doubts("ga", {"ua": 80.0, "ra": 49.0}, values, "retrain") == ["RA collapsed"]
    assert doubts("ga", {"ua": 1.1, "ra": 50.0}, values, "retrain") == ["forget accuracy as before"]
    assert doubts("original", {"ua": 1.0, "ra": 99.0}, values, "retrain") == doubts("retrain", {"ua": 1.0}, values, "retrain") == []
    assert doubts("esd", {"ira": 1.0}, {}, "") == []


class Words(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.said = set[str](), ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.said += data


def test_tables_beside_published_numbers(tmp_path: Path) -> None:
    evil = "<script>a_b & 5% | $x$"
    rows = []
    for method, ua, ra in (("original", 1.0, 100.0), (evil, 1.1, 40.0), ("retrain", 5.0, 100.0)):
        for seed in (0, 1):
            common = {"target": "net", "task": "t", "method": method, "seed": seed, "n": 1, "low": None, "high": None, "device": "cpu"}
            rows += [
                {**common, "preset": "short", "metric": m, "value": v} for m, v in (("ua", ua + seed), ("ra", ra), ("cost/seconds", 90.0))
            ]
    paper = Published(
        title="Paper", source="arXiv", status="recalled", task="t", rows={evil: {"ua": 1.6, "ra": (90.0, 0.5), "rte_minutes": 1.0}}
    )
    other = replace(paper, task="elsewhere", title="Other")
    files = tables.write(tmp_path, "grid", rows, ["retrain", evil], [paper, other], {("t", evil): "lr=1 is the lowest tried"}, "retrain")
    assert [f.name for f in files] == ["table.md", "table.tex", "table.html"]
    md, tex, page = (f.read_text() for f in files)

    (line,) = [x for x in md.splitlines() if "script" in x and x.startswith("| ")]
    columns = [x.strip() for x in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert columns[0] == r"&lt;script&gt;a_b &amp; 5% \| $x$"
    assert columns[1:4] == ["1.60", "1.60 ± 0.50", "+0.00"]
    assert columns[4:7] == ["90.00 ± 0.50", "40.00 ± 0.00", "-50.00"]
    assert columns[7:10] == ["1.00", "1.50 ± 0.00", "+0.50"]
    assert columns[10] == "RA outside paper ± 2 se; RA collapsed; forget accuracy as before; edge of the grid: lr=1 is the lowest tried"
    head = next(x for x in md.splitlines() if x.startswith("| method"))
    assert "| UA paper | UA ours ± se | UA Δ |" in head and head.endswith("| flag |")
    assert [x.split("|")[1].strip() for x in md.splitlines() if x.startswith("| ")][1:][::2] == [
        "original",
        r"&lt;script&gt;a_b &amp; 5% \\"[:-1],
    ]
    assert "recalled, not confirmed" in md and "Other" not in md

    assert r"$<$script$>$a\_b \& 5\% | \$x\$" in tex
    body = [x for x in tex.splitlines() if x.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", x)) for x in body[1:]} == {10}
    assert r"\multicolumn{3}{c}{UA}" in body[0]

    words = Words(page)
    assert "script" not in words.tags and evil in words.said and "-50.00" in words.said


# --- workers ------------------------------------------------------------------------------------------------------
def note(*, path: str, text: str, progress: Any) -> str:
    progress("noting", 1, 2, {})
    with open(path, "a") as file:
        file.write(f"{text}\n")
    return f"{text} by {os.getpid()} with {os.environ.get('OMP_NUM_THREADS')}"


def die(*, path: str, text: str, progress: Any) -> str:
    """Segfaults the first ``text`` times it is called."""
    with open(path, "a") as file:
        file.write("died\n")
    if Path(path).read_text().count("died") <= int(text):
        os.kill(os.getpid(), signal.SIGSEGV)
    return "lived"


def fail(*, path: str, text: str, progress: Any) -> str:
    raise (UsageError if text == "known" else KeyError)("a reason\nmore")


def job(do: Any, key: str, path: Path, text: str = "", needs: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> Job:
    return Job(key=key, kind="test", method=key, do=do, how={"path": str(path), "text": text or key}, needs=needs, after=after)


def performed(jobs: Sequence[Job], crew: Crew) -> tuple[dict[str, Outcome], list[str]]:
    over: list[str] = []
    try:
        return perform(jobs, crew, lambda j, _: over.append(j.key), lambda j: None), over
    finally:
        crew.close()


def test_jobs_wait_for_what_they_need(tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = [
        job(note, "last", log, needs=("b", "a")), job(fail, "a", log, "known"), job(note, "b", log, after=("a", "unknown")),
        job(note, "c", log, needs=("last",)), job(fail, "bug", log), job(note, "d", log, after=("a",)), job(note, "d", log),
    ]  # fmt: skip
    told: list[Any] = []
    done, over = performed(jobs, Here(lambda *words: told.append(words)))
    assert log.read_text().split() == ["b", "d"]
    assert done["a"].error == "a reason" and not done["a"].trace
    assert done["bug"].error.startswith("KeyError") and "test_bench.py" in done["bug"].trace
    assert done["last"].blocked == done["c"].blocked == "a" and not done["last"].good
    assert sorted(over) == ["a", "b", "bug", "c", "d", "last"]
    assert [words[1:] for words in told] == [("noting", 1, 2, {})] * 2


def test_a_process_that_dies_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    told: list[Any] = []
    crew = Processes(2, tmp_path / "workers.log", lambda *words: told.append(words))
    jobs = [
        job(die, "always", tmp_path / "twice", "9"), job(note, "c", tmp_path / "c", needs=("always",)),
        job(fail, "wrong", tmp_path / "e", "known"), job(note, "d", tmp_path / "d"),
    ]  # fmt: skip
    done, _ = performed(jobs, crew)
    assert "SIGSEGV each time" in done["always"].error and done["c"].blocked == "always"
    assert (tmp_path / "twice").read_text().count("died") == 2
    assert done["wrong"].error == "a reason"
    assert done["d"].value.endswith("with 1") and str(os.getpid()) not in done["d"].value
    assert any(words[0].key == "d" and words[1:] == ("noting", 1, 2, {}) for words in told)
    assert "Segmentation fault" in (tmp_path / "workers.log").read_text()
    assert not crew.workers


def test_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearners.workers.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads(n) for n in (1, 3, 20)] == [8, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [threads(n) for n in (1, 3, 20)] == [2, 2, 1]


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    """The second waits and hears who is first; a killed holder lets go."""
    path, said, order = tmp_path / "run" / ".lock", list[str](), list[str]()
    code = "import sys, time; from pathlib import Path; from unlearners.files import turn\n"
    code += "with turn(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(600)"
    source = os.pathsep.join(p for p in sys.path if p)
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source}
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"

    def second() -> None:
        with turn(path, said.append):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    while not said:
        time.sleep(0.01)
    order.append("killed")
    holder.kill()
    thread.join(60)
    assert order == ["killed", "second"]
    assert said == [str(holder.wait() and holder.pid)]


# --- the board ----------------------------------------------------------------------------------------------------
def test_the_board_knows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    jobs = [Job(key=str(i), kind="erase", task="t", method="[m]", seed=i, do=note) for i in range(4)]
    board = Board(Console(file=io.StringIO(), force_terminal=True, width=120, height=30))
    board.add(jobs)
    assert board.left() is None
    board.began(jobs[0])
    now[0] = 10.0
    board.over(jobs[0], Outcome(value=[{"method": "[m]", "metric": "ua", "value": 12.345}], seconds=10.0))
    assert board.left() == 30.0
    board.began(jobs[1])
    now[0] = 14.0
    assert board.left() == 26.0
    board.size = 2
    assert board.left() == 13.0
    board.progress(jobs[1], "erasing", 3, 9, {})
    board.over(jobs[2], Outcome(error="out of [memory]", seconds=2.0))
    board.over(jobs[3], Outcome(blocked="2"))
    console = Console(file=(shown := io.StringIO()), width=160)
    console.print(board.table())
    for word in ("[m]", "erasing 3/9", "out of [memory]", "left out", "12.35", "3 of 4 done", "1 failed", "0:03 left"):
        assert word in shown.getvalue(), word
    assert [clock(s) for s in (0, 61, 3661)] == ["0:00", "1:01", "1:01:01"]


def test_without_a_terminal_there_is_a_line_for_each_job() -> None:
    one = Job(key="1", kind="erase", task="t[0]", method="m", seed=3, do=note)
    with Board(Console(file=(said := io.StringIO()))) as board:
        board.add([one])
        board.began(one)
        board.progress(one, "erasing", 1, 2, {})
        board.over(one, Outcome(seconds=2.0))
    assert said.getvalue() == "[1/1] erase m on t[0], seed 3 done in 2 s\n"


# --- attacks ------------------------------------------------------------------------------------------------------
def test_attacks_are_counted_with_what_they_took(grid: Callable[..., Path]) -> None:
    """attacks.csv has the threat model and the queries of each attack on each run, and the rate of results.csv."""
    tokens = {"name": "random_tokens", "fields": {"tries": 2}, "prompts": 3}
    grid(
        train=None, target="tiny", tasks=["canvas/neon"], seeds=[0], image_steps=1, metrics=["pre_asr", "asr"], attacks=[tokens],
        methods=[{"name": "uce", "label": "closed form"}, {"name": "uce", "fields": {"lamb": 0.2}, "attacked": False}],
    )  # fmt: skip
    done = bench("grid.yaml", runs="runs", results="results")
    assert not done["errors"]
    with Path("results/attacks.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert [row[k] for k in ("target", "task", "method", "attack")] == ["tiny", "canvas/neon", "closed form", "random_tokens"]
    assert [row[k] for k in ("access", "level", "prompts")] == ["black", "prompt", "3"]
    assert int(row["queries_total"]) <= 2 * (3 - int(row["plain"]))
    rates = {r["metric"]: r["value"] for r in table("results/results.csv") if r["method"] == "closed form"}
    assert rates["asr/random_tokens"] == row["asr"]


# --- kills --------------------------------------------------------------------------------------------------------
SLOW = {**GRID, "methods": [{"name": "original"}, {**FT, "fields": {"batch": 8, "epochs": 40}, "sweep": {}}, GRID["methods"][2]]}


def start(*words: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "unlearners.cli", "bench", "grid.yaml", "--runs", "runs", "--results", "results", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def in_the_middle(process: subprocess.Popen[bytes]) -> int:
    """Wait until a fine-tuning run has made some steps; the process that does it."""
    while process.poll() is None:
        for log in Path("runs").glob("b-ft-*/log.jsonl"):
            if len(log.read_text().splitlines()) > 10 and read_run(log.parent)["status"] == "running":
                return int((log.parent / ".lock").read_text())
        time.sleep(0.02)
    raise AssertionError("it ended before it could be killed")


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The table of the grid without a kill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        Path("b.yaml").write_text(yaml.safe_dump(TASK))
        Path("grid.yaml").write_text(yaml.safe_dump(SLOW))
        assert not bench("grid.yaml", runs="runs", results="results")["errors"]
        return table("results/results.csv")


@pytest.fixture
def whole(grid: Callable[..., Path], uninterrupted: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same, in a new folder with the same grid."""
    grid(**SLOW)
    return uninterrupted


def test_killed_in_mid_grid_it_ends_with_the_same_table(whole: list[dict[str, str]]) -> None:
    process = start()
    assert in_the_middle(process) == process.pid
    process.kill()
    process.wait()
    assert not Path("results/table.md").exists()
    assert not bench("grid.yaml", runs="runs", results="results")["errors"]
    assert table("results/results.csv") == whole


def test_so_it_does_with_two_processes(whole: list[dict[str, str]]) -> None:
    """First one of the two is killed, which costs nothing; then all of it, and then no process is left."""
    process = start("--jobs", "2")
    worker = in_the_middle(process)
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    while (again := in_the_middle(process)) == worker:
        time.sleep(0.02)
    process.kill()
    process.wait()
    for _ in range(500):
        if gone(again):
            break
        time.sleep(0.02)
    assert gone(again), "a worker must end with the process that started it"
    assert start("--jobs", "2").wait() == 0
    assert table("results/results.csv") == whole


@pytest.mark.slow
def test_so_it_does_with_ray(whole: list[dict[str, str]]) -> None:
    process = start("--executor", "ray", "--jobs", "2")
    worker = in_the_middle(process)
    assert worker != process.pid
    os.kill(worker, signal.SIGKILL)
    while (again := in_the_middle(process)) == worker:
        time.sleep(0.02)
    process.kill()
    process.wait()
    for _ in range(3000):  # Ray's processes see that their driver is gone
        if gone(again):
            break
        time.sleep(0.02)
    assert start("--executor", "ray", "--jobs", "2").wait() == 0
    assert table("results/results.csv") == whole


@pytest.mark.slow
def test_a_lost_worker_of_ray_is_noted_and_passed(tmp_path: Path) -> None:
    done, _ = performed(
        [job(die, "once", tmp_path / "a", "1"), job(die, "always", tmp_path / "b", "9"), job(note, "c", tmp_path / "c")], Ray(2)
    )
    assert done["once"].value == "lived" and done["c"].good
    assert "Ray lost its worker" in done["always"].error
