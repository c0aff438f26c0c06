"""A YAML grid of methods × tasks × seeds × settings to run folders, and their numbers to one table."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import config, registry, run, tasks
from .errors import UnlearnError

COLUMNS = ("target", "task", "method", "seed", "metric", "value", "n", "low", "high", "device", "preset")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method (or attack) of a grid: its name, preset, fields, and lists of values to try (``sweep``: field → values)."""

    name: str
    preset: str = ""
    label: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    """the tasks it is for; all when empty"""
    attacked: bool = True
    """for a method: whether the grid's attacks are run on it"""
    prompts: int = 0
    """for an attack: how many prompts; 0 takes all that name the concept once"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A threshold: the mean of ``metric`` over the grid's rows of ``method`` and ``tasks`` is at least ``at_least``."""

    metric: str
    method: str
    tasks: tuple[str, ...] = ()
    at_least: float


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What ``unlearn bench`` runs."""

    name: str
    target: str = "canvas"
    tasks: tuple[str, ...]
    methods: tuple[Cell, ...]
    attacks: tuple[Cell, ...] = ()
    metrics: tuple[str, ...] = ()
    """empty: each task's suite"""
    seeds: tuple[int, ...] = (0,)
    image_seeds: int = 0
    """pictures for each prompt; 0 takes all of the task's seeds"""
    device: str = "cpu"
    checks: tuple[Check, ...] = ()


def cells(grid: Grid) -> list[tuple[str, str, Cell, dict[str, Any], int]]:
    """Every (task, label, cell, fields, seed) of a grid."""
    out = []
    for cell in grid.methods:
        for values in itertools.product(*cell.sweep.values()):
            chosen = dict(zip(cell.sweep, values, strict=True))
            label = (cell.label or cell.name) + (f"[{','.join(f'{k}={v}' for k, v in chosen.items())}]" if chosen else "")
            for task, seed in itertools.product(cell.tasks or grid.tasks, grid.seeds):
                out.append((task, label, cell, {**cell.fields, **chosen}, seed))
    return out


def bench(
    grid: str | Path, *, runs: str | Path = "", results: str | Path = "", check: bool = False, progress: run.Progress | None = None
) -> dict[str, Any]:
    """Run the grid file ``grid``; finished cells are skipped, interrupted ones resume, a failing one is noted and passed.

    Writes ``bench/results/<name>/results.csv`` (or into ``results``) with the grid beside it, after every cell. Returns
    {"results", "rows", "errors", "failed"}; with ``check``, ``failed`` names the thresholds that are missed.
    """
    path = Path(grid)
    spec: Grid = config.build(Grid, {"name": path.stem, **config.load_yaml(path)}, where=str(path))
    for task in {*spec.tasks, *(t for c in (*spec.methods, *spec.attacks) for t in c.tasks)}:
        tasks.load(task)
    todo = cells(spec)
    for _, _, cell, fields, _ in todo:
        _made("methods", cell, fields)
    for cell in spec.attacks:
        _made("attacks", cell, cell.fields)
    folder = Path(results) if results else path.parent / "results" / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    store = Path(runs) if runs else Path("runs") / spec.name
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    for done, (task, label, cell, fields, seed) in enumerate(todo):
        if progress:
            progress("cells", done, len(todo), {})
        try:
            rows += _cell(spec, store, task, label, cell, fields, seed, progress)
        except (UnlearnError, RuntimeError) as error:  # RuntimeError: out of memory
            errors.append(f"{label} on {task}, seed {seed}: {(str(error).splitlines() or [type(error).__name__])[0]}")
        _write(folder / "results.csv", rows)
    if path.resolve() != (folder / path.name).resolve():
        shutil.copy(path, folder / path.name)
    missed = [m for c in spec.checks if (m := _missed(c, rows))] if check else []
    return {"results": str(folder / "results.csv"), "rows": rows, "errors": errors, "failed": [*missed, *errors]}


def _cell(
    spec: Grid, store: Path, task: str, label: str, cell: Cell, fields: Mapping[str, Any], seed: int, progress: run.Progress | None
) -> list[dict[str, Any]]:
    method = _made("methods", cell, fields)
    folder = run.erase(method, spec.target, task, runs=store, seed=seed, device=spec.device, progress=progress)
    for a in spec.attacks:
        if cell.attacked and (not a.tasks or task in a.tasks):
            run.attack(_made("attacks", a, a.fields), folder, prompts=a.prompts, device=spec.device, progress=progress)
    seeds = tasks.load(task).seeds[: spec.image_seeds or None]
    run.evaluate(folder, metrics=spec.metrics or None, seeds=seeds, device=spec.device, progress=progress)
    env = json.loads((folder / "run.json").read_text())["env"]
    common = {"target": spec.target, "task": task, "seed": seed, "device": f"{env['device']} {env['hardware']}"}
    out = []
    for row in run.results(folder):
        score = {k: row[k] for k in ("value", "n", "low", "high")}
        out.append({**common, "method": label, "metric": row["metric"], **score, "preset": cell.preset or "paper"})
        if row["before"]:
            out.append({**common, "method": "original", "metric": row["metric"], **row["before"], "preset": ""})
    return out


def _made(kind: str, cell: Cell, fields: Mapping[str, Any]) -> Any:
    return registry.make(kind, cell.name, **({"preset": cell.preset} if cell.preset else {}), **fields)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The table, each row once (the original's are the same for every method), numbers with six digits."""
    unique = {tuple(r[c] for c in COLUMNS[:5]): r for r in rows}
    with run.replacing(path) as draft, draft.open("w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(
            [["" if r[c] is None else f"{r[c]:.6g}" if isinstance(r[c], float) else r[c] for c in COLUMNS] for r in unique.values()]
        )


def _missed(check: Check, rows: list[dict[str, Any]]) -> str:
    chosen = [
        r["value"]
        for r in rows
        if r["method"] == check.method
        and r["metric"] == check.metric
        and (not check.tasks or r["task"] in check.tasks)
        and r["value"] is not None
    ]
    mean = sum(chosen) / len(chosen) if chosen else float("nan")
    where = f" on {', '.join(check.tasks)}" if check.tasks else ""
    return "" if mean >= check.at_least else f"{check.method} {check.metric}{where}: {mean:.1f} < {check.at_least:g}"
