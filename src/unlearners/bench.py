"""A grid to run folders, and their numbers to tables."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from . import config, flags, registry, report_attacks, run, tables, tasks
from .base import Data, Method, Run, Task
from .board import Board
from .data import has_validation
from .errors import UsageError
from .files import replacing, turn
from .grids import GAP, REFERENCE, Candidate, Cell, Check, Grid, Planned, Select, cells, made, points, read, recipe, written
from .session import Progress
from .targets import absolute, is_run, read_run
from .workers import Crew, Here, Job, Outcome, Processes, Ray, perform

COLUMNS = ("target", "task", "method", "seed", "metric", "value", "n", "low", "high", "device", "preset")
REFERENCED = ("rmia",)  # the metrics that want models which never saw the forget set


# --- the verb -----------------------------------------------------------------------------------------------------
def bench(
    grid: str | Path,
    *,
    runs: str | Path = "",
    results: str | Path = "",
    check: bool = False,
    select: bool = False,
    executor: Literal["local", "ray"] = "local",
    jobs: int = 0,
    gpus: float = 0.0,
    device: str = "",
    console: Any = None,
) -> dict[str, Any]:
    """Run the grid file ``grid``; finished runs are skipped, interrupted ones resume, a failing one is noted and passed.

    Run folders go to ``runs`` (``runs/<name>``), tables to ``results`` (``results/<name>`` beside the grid): results.csv after every
    run, then attacks.csv where the grid attacks, table.md, table.tex, table.html and the grid. ``jobs`` runs are done at once: 0 is one
    in this process, or with Ray as many as there is room for. ``gpus`` (with Ray, for each run) and ``device`` are the grid's when 0 and
    empty. ``select`` first chooses among each sweep's values on the validation split and writes selected.csv. ``console`` is a rich
    Console for the live table.

    Returns {"results", "tables", "selected", "rows", "errors", "failed"}; ``failed`` has the errors and, with ``check``, the thresholds
    that are missed. Raises ``UsageError`` for a wrong grid before anything is run.
    """
    path = Path(grid)
    spec = read(path)
    spec = replace(spec, device=device or spec.device)
    compared = tables.published(path.parent / "published.yaml", spec.published)
    if jobs < 0:
        raise UsageError(f"{jobs} jobs cannot run at once; give --jobs 1 or more")
    plan = _Plan(spec, Path(runs) if runs else Path("runs") / spec.name)
    if select:
        plan.check_selection()
    folder = Path(results) if results else path.parent / "results" / spec.name
    crew: Crew
    with Board(console) as board:
        if executor == "ray":
            crew = Ray(jobs, gpus=gpus or spec.gpus)
        elif jobs > 1:
            crew = Processes(jobs, plan.store / "workers.log", board.progress, gpus=spec.device == "cuda")
        else:
            crew = Here(board.progress)
        board.size = crew.size
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return _bench(plan, path, folder, crew, board, compared, check=check, select=select)
        finally:
            crew.close()


def _bench(
    plan: _Plan, path: Path, folder: Path, crew: Crew, board: Board, compared: Sequence[tables.Published], *, check: bool, select: bool
) -> dict[str, Any]:
    spec, errors, notes, chosen = plan.spec, list[str](), dict[tuple[str, str], str](), None
    if path.resolve() != (folder / path.name).resolve():
        shutil.copy(path, folder / path.name)

    def do(todo: Sequence[Job], after: Any = None) -> dict[str, Outcome]:
        board.add(todo)
        done: dict[str, Outcome] = {}

        def over(job: Job, outcome: Outcome) -> None:
            board.over(job, outcome)
            done[job.key] = outcome
            if after:
                after(done)

        perform(todo, crew, over, board.began)
        errors.extend(_errors(todo, done, plan.store / "errors.log"))
        return done

    if select:
        candidates = plan.candidates()
        done = do(plan.validations(candidates))
        chosen, choice, missing = choose(plan, candidates, done)
        errors.extend(missing)
        _write(folder / "selected.csv", choice, list(choice[0]) if choice else [])
        notes = {(r["task"], r["method"]): r["note"] for r in choice if r["chosen"] and r["note"]}
    planned = cells(spec, chosen)
    keys = [plan.score(p).key for p in planned]

    def rows(done: Mapping[str, Outcome]) -> list[dict[str, Any]]:
        found = [r for k in keys if k in done and done[k].good for r in done[k].value]
        return _gaps(list({tuple(r[c] for c in COLUMNS[:5]): r for r in found}.values()), plan.reference)

    done = do(plan.jobs(planned), lambda done: _write(folder / "results.csv", rows(done), COLUMNS))
    table = rows(done)
    _write(folder / "results.csv", table, COLUMNS)
    if spec.attacks:
        good = [p for p, key in zip(planned, keys, strict=True) if done[key].good]
        _write(folder / "attacks.csv", _attacks(plan, good), report_attacks.COLUMNS)
    order = list(dict.fromkeys(name for p in planned for name in (_untouched(p.cell), p.label)))
    files = tables.write(folder, spec.name, table, order, compared, notes, plan.reference, spec.claims)
    missed = [m for c in spec.checks if (m := _missed(c, table))] if check else []
    out = {"results": str(folder / "results.csv"), "tables": [str(f) for f in files], "rows": table, "errors": errors}
    return out | {"selected": str(folder / "selected.csv") if select else "", "failed": [*missed, *errors]}


def _errors(todo: Iterable[Job], done: Mapping[str, Outcome], log: Path) -> list[str]:
    """A line for each job that failed; tracebacks go to ``log``."""
    out = []
    for job in todo:
        outcome = done[job.key]
        if outcome.error:
            waiting = sum(o.blocked == job.key for o in done.values()) if job.kind == "train" else 0
            out.append(f"{job.title}: {outcome.error}" + (f" ({waiting} jobs wait for it)" if waiting else ""))
        if outcome.trace:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{job.kind} {job.title}\n{outcome.trace}\n")
    return out


# --- from a grid to jobs ------------------------------------------------------------------------------------------
class _Plan:
    """The jobs of a grid and their folders in ``store``."""

    def __init__(self, spec: Grid, store: Path) -> None:
        self.spec, self.store = spec, store.resolve()
        self.tasks: dict[tuple[str, int], Task] = {}
        retrain = [c for c in spec.methods if c.name == REFERENCE and not c.sweep]
        self.reference = (retrain[0].label or retrain[0].name) if retrain else ""

    def task(self, name: str, seed: int) -> Task:
        """The task called ``name``, with the forget set of ``seed`` where it follows the run's."""
        if (name, seed) not in self.tasks:
            self.tasks[name, seed] = tasks.reseeded(tasks.load(name), self.spec.split_seed).at(seed)
        return self.tasks[name, seed]

    def method(self, p: Planned) -> Method:
        given = {"patch": str(self.folder(self.source(p)))} if p.cell.of else {}
        return made("methods", p.cell, {**p.fields, **given})  # type: ignore[no-any-return]

    def source(self, p: Planned) -> Planned:
        """The run whose weights a plug puts on."""
        return next(q for q in cells(self.spec) if (q.task, q.label, q.seed) == (p.task, p.cell.of, p.seed))

    def target(self, seed: int, cell: Cell | None = None) -> str:
        """What is unlearned: the cell's target, the grid's, or the folder that this seed's original is trained into."""
        if cell and cell.target:
            return absolute(cell.target)
        if not self.spec.train:
            return absolute(self.spec.target or "canvas")
        train = self.spec.train
        asked = [train.architecture, config.to_dict(train.data.at(seed)), config.to_dict(recipe(train)), seed, self.spec.dtype]
        asked += [config.to_dict(train.pictures)] if train.pictures else []
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", train.architecture)
        return str(self.store / f"trained-{name}-{config.content_hash(asked)[:8]}")

    def folder(self, p: Planned) -> Path:
        return (
            self.store
            / Run(
                target=self.target(p.seed, p.cell),
                task=self.task(p.task, p.drawn),
                method=self.method(p),
                seed=p.seed,
                dtype=self.spec.dtype,
            ).folder
        )

    def train(self, seed: int) -> list[Job]:
        train = self.spec.train
        if not train:
            return []
        how = {
            "architecture": train.architecture, "data": train.data.at(seed), "method": recipe(train), "seed": seed,
            "out": self.target(seed), "dtype": self.spec.dtype, "device": self.spec.device, **train.pictures,
        }  # fmt: skip
        label = f"{train.label or train.architecture} (original)"
        return [Job(key=self.target(seed), kind="train", method=label, seed=seed, do=_train, how=how)]

    def erase(self, p: Planned) -> Job:
        folder = self.folder(p)
        how = {
            "method": self.method(p), "target": self.target(p.seed, p.cell), "task": self.task(p.task, p.drawn), "out": folder,
            "seed": p.seed, "dtype": self.spec.dtype, "device": self.spec.device,
        }  # fmt: skip
        needs = tuple(j.key for j in self.train(p.seed))
        if p.cell.of:
            needs = (*needs, f"erase {self.folder(self.source(p)).name}")
        return Job(key=f"erase {folder.name}", kind="erase", task=p.task, method=p.label, seed=p.seed, do=_erase, how=how, needs=needs)

    def metrics(self, p: Planned) -> tuple[str, ...]:
        """What is measured of a run."""
        return p.cell.metrics or self.spec.metrics or self.task(p.task, p.seed).suite

    def score(self, p: Planned) -> Job:
        """Attack and evaluate, once the run and the models it is compared with are there."""
        spec, task = self.spec, self.task(p.task, p.seed)
        metrics, others = self.metrics(p), self.references(p)
        attacks = [
            (made("attacks", a, a.fields), a.prompts) for a in spec.attacks if p.cell.attacked and (not a.tasks or p.task in a.tasks)
        ]
        common = {
            "target": p.cell.target or self.label,
            "task": p.task,
            "method": p.label,
            "seed": p.seed,
            "preset": p.cell.preset or _usual(p.cell),
        }
        how = {
            "folder": self.folder(p), "attacks": attacks, "metrics": metrics, "seeds": task.seeds[: spec.image_seeds or None],
            "steps": spec.image_steps, "scheduler": spec.image_scheduler,
            "references": [self.folder(r) for r in others], "device": spec.device, "common": common,
            "untouched": _untouched(p.cell),
        }  # fmt: skip
        name = self.folder(p).name
        return Job(
            key=f"score {name} {p.label}", kind="evaluate", task=p.task, method=p.label, seed=p.seed, do=_score, how=how,
            needs=(f"erase {name}",), after=tuple(f"erase {self.folder(r).name}" for r in others),
        )  # fmt: skip

    def references(self, p: Planned) -> list[Planned]:
        """The retrained models that never saw what ``p`` forgets, for the metrics that want them; none is its own reference."""
        if not set(REFERENCED) & set(self.metrics(p)):
            return []
        retrained = [r for r in cells(self.spec) if r.cell.name == REFERENCE and r.task == p.task]
        if self.task(p.task, p.seed).forget != self.task(p.task, p.seed + 1).forget:  # each seed forgets others
            own = [r for r in retrained if r.seed == p.seed]
            more = [r._replace(forgets=p.seed) for r in retrained if r.seed != p.seed][: self.spec.references]
            return more or [r for r in own if r.label != p.label]
        return [r for r in retrained if r.seed != p.seed] or [r for r in retrained if r.label != p.label]

    @property
    def label(self) -> str:
        train = self.spec.train
        return (train.label or train.architecture) if train else self.spec.target or "canvas"

    def jobs(self, planned: Sequence[Planned]) -> list[Job]:
        """Everything that ``planned`` takes. The runs that others are compared with come early."""
        out: list[Job] = []
        first = [p for p in planned if p.cell.name == REFERENCE and set(REFERENCED) & set(self.metrics(p))]
        first += [r for p in planned for r in self.references(p) if r.forgets is not None]
        for p in first:
            out += [*self.train(p.seed), self.erase(p)]
        for p in planned:
            out += [*self.train(p.seed), self.erase(p), self.score(p)]
        return list({job.key: job for job in out}.values())  # each once, where it comes first

    # --- selection ------------------------------------------------------------------------------------------------
    def check_selection(self) -> None:
        """Refuse a grid with nothing to choose, nothing to compare with, or no validation split."""
        spec = self.spec
        swept = [c for c in spec.methods if c.sweep]
        if not swept:
            raise UsageError(f"--select has nothing to choose in grid {spec.name}; give a method a 'sweep', or leave --select out")
        if spec.select.objective == "gap" and not self.reference:
            raise UsageError(f"--select compares with '{REFERENCE}', which grid {spec.name} lacks; add it to 'methods', without a 'sweep'")
        for metric in spec.select.metrics:
            registry.path("metrics", _plain(metric))
            if _plain(metric) in REFERENCED:
                raise UsageError(f"--select cannot go by {metric}, which needs other models; take it out of 'select.metrics'")
        for name in {t for c in swept for t in c.tasks or spec.tasks}:
            data = self.task(name, spec.seeds[0]).holdout
            if not data.source or not (data.validation or has_validation(data.source)):
                raise UsageError(f"--select needs a validation split and task {name} has none; give its data a 'validation' share")

    def candidates(self) -> list[Candidate]:
        """What is measured on the validation split, with the first seed: every swept value, and first of all the reference."""
        spec, out = self.spec, list[Candidate]()
        swept = [c for c in spec.methods if c.sweep]
        wanted = {t for c in swept for t in c.tasks or spec.tasks}
        for cell in [*[c for c in spec.methods if spec.select.objective == "gap" and _label(c) == self.reference], *swept]:
            for task in cell.tasks or spec.tasks:
                if task in wanted:
                    out += [(Planned(task, _label(cell), cell, {**cell.fields, **v}, spec.seeds[0]), v) for v in points(cell)]
        return out

    def validations(self, candidates: Sequence[Candidate]) -> list[Job]:
        out = []
        for p, values in candidates:
            named = p._replace(label=f"{p.label}[{written(values)}]" if values else p.label)
            out += [*self.train(p.seed), self.erase(named), self.validate(named)]
        return list({job.key: job for job in out}.values())

    def validate(self, p: Planned) -> Job:
        how = {"folder": self.folder(p), "metrics": sorted({_plain(m) for m in self.spec.select.metrics})}
        how |= {"device": self.spec.device, "label": p.label}
        name = self.folder(p).name
        return Job(
            key=f"validate {name}", kind="validate", task=p.task, method=p.label, seed=p.seed, do=_validate, how=how,
            needs=(f"erase {name}",),
        )  # fmt: skip

    def validated(self, p: Planned) -> str:
        """The key of ``validate``."""
        return f"validate {self.folder(p).name}"


def _label(cell: Cell) -> str:
    return cell.label or cell.name


def _usual(cell: Cell) -> str:
    """What a cell without a preset runs: "default", where the paper's settings are a preset of their own, else "paper"."""
    return "default" if registry.get("methods", cell.name).presets.get("paper") else "paper"


def _untouched(cell: Cell) -> str:
    """What the row of the model without the method is called."""
    return f"original {cell.target}" if cell.target else "original"


def _plain(metric: str) -> str:
    """The registered name: ``rmia`` of ``rmia/auc``."""
    return metric.partition("/")[0]


# --- the jobs; each may be done in another process ----------------------------------------------------------------
def _busy(progress: Progress) -> Any:
    return lambda holder: progress(f"waiting for process {holder}", 0, 0, {})


def _train(*, architecture: str, data: Data, out: str, progress: Progress, **how: Any) -> str:
    from .train import train

    with turn(Path(out) / ".lock", _busy(progress)):
        return str(train(architecture, data, out=out, progress=progress, **how))


def _erase(*, method: Method, target: str, task: Task, out: Path, progress: Progress, **how: Any) -> str:
    with turn(out / ".lock", _busy(progress)):
        return str(run.erase(method, target, task, out=out, progress=progress, **how))


def _score(
    *,
    folder: Path,
    attacks: Sequence[tuple[Any, int]],
    metrics: Sequence[str],
    seeds: Sequence[int],
    steps: int | None,
    scheduler: str,
    references: Sequence[Path],
    device: str,
    common: Mapping[str, Any],
    untouched: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Attack and evaluate a finished run; its rows of the table."""
    finished = [str(r) for r in references if is_run(r) and read_run(r)["status"] == "done"]
    more: dict[str, Any] = {"references": finished} if finished else {}
    drawn: dict[str, Any] = {"steps": steps, "scheduler": scheduler, "device": device, "progress": progress}
    with turn(folder / ".lock", _busy(progress)):
        for attack, prompts in attacks:
            run.attack(attack, folder, prompts=prompts, **drawn)
        run.evaluate(folder, metrics=list(metrics) or None, seeds=seeds, **drawn, **more)
    env = read_run(folder)["env"]
    shared = {**common, "device": f"{env['device']} {env['hardware']}"}
    out = []
    for row in run.results(folder):
        score = {k: row[k] for k in ("value", "n", "low", "high")}
        out.append({**shared, "metric": row["metric"], **score})
        if row["before"]:
            out.append({**shared, "method": untouched, "metric": row["metric"], **row["before"], "preset": ""})
    return out


def _validate(*, folder: Path, metrics: Sequence[str], device: str, label: str, progress: Progress) -> list[dict[str, Any]]:
    """Evaluate a finished run on the validation split, beside its results; the test split is not opened."""
    with turn(folder / ".lock", _busy(progress)):
        path = run.evaluate(folder, metrics=list(metrics), split="validation", device=device, progress=progress)
    return [{"method": label, "metric": r["metric"], "value": r["value"]} for r in json.loads(path.read_text())]


# --- choosing on the validation split -----------------------------------------------------------------------------
def choose(
    plan: _Plan, candidates: Sequence[Candidate], done: Mapping[str, Outcome]
) -> tuple[dict[tuple[str, str], Mapping[str, Any]], list[dict[str, Any]], list[str]]:
    """The best values for each task and swept method, the rows of selected.csv, and a line for each that has none."""
    select = plan.spec.select
    measured = [_measured(select, done[plan.validated(p)]) for p, _ in candidates]
    base = {p.task: found for (p, _), found in zip(candidates, measured, strict=True) if not p.cell.sweep}
    rows: list[dict[str, Any]] = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    values_of: dict[int, Mapping[str, Any]] = {}
    for (p, values), found in zip(candidates, measured, strict=True):
        if select.objective == "gap":
            to = base.get(p.task)
            score = math.nan if not found or not to else sum(abs(found[m] - to[m]) for m in select.metrics) / len(select.metrics)
        else:
            better = [100 - v if select.objective == "best" and not _higher(m) else v for m, v in found.items()]
            score = sum(better) / len(found) if found else math.nan
        row = {"task": p.task, "method": p.label, "chosen": "", "values": written(values), "seed": p.seed}
        row |= {m: found.get(m) for m in select.metrics} | {select.objective: None if math.isnan(score) else score, "note": ""}
        rows.append(row)
        if p.cell.sweep:
            values_of[id(row)] = values
            groups.setdefault((p.task, p.label), []).append(row)
    chosen: dict[tuple[str, str], Mapping[str, Any]] = {}
    missing = []
    for (task, label), tried in groups.items():
        usable = [r for r in tried if r[select.objective] is not None]
        if not usable:
            missing.append(f"{label} on {task}: none of its {len(tried)} settings could be compared, so none is chosen")
            continue
        best = (max if select.objective in ("max", "best") else min)(usable, key=lambda r: r[select.objective])
        chosen[task, label] = values_of[id(best)]
        best["chosen"], best["note"] = "yes", edges(values_of[id(best)], [values_of[id(r)] for r in tried])
    return chosen, rows, missing


def edges(best: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> str:
    """Which numbers of the winner are the lowest or highest that were tried, so that still better ones may lie beyond."""
    out = []
    for name, value in best.items():
        numbers = sorted({t[name] for t in tried if isinstance(t[name], int | float) and not isinstance(t[name], bool)})
        if len(numbers) > 1 and value in (numbers[0], numbers[-1]):
            out.append(f"{name}={value} is the {'lowest' if value == numbers[0] else 'highest'} tried")
    return ", ".join(out)


def _higher(metric: str) -> bool:
    return bool(registry.get("metrics", _plain(metric)).higher_is_better)


def _measured(select: Select, outcome: Outcome) -> dict[str, float]:
    """The values of the selection's metrics; empty when one is missing."""
    found = {r["metric"]: r["value"] for r in outcome.value} if outcome.good else {}
    values = {m: found.get(m) for m in select.metrics}
    return {m: v for m, v in values.items() if v is not None} if None not in values.values() else {}


# --- rows ---------------------------------------------------------------------------------------------------------
def _gaps(rows: list[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """``rows`` with Avg. Gap: the mean distance to the reference of the same task and seed over UA, RA, TA and MIA."""
    values = {(r["task"], r["method"], r["seed"], r["metric"]): r["value"] for r in rows}
    first = {(r["task"], r["method"], r["seed"]): r for r in reversed(rows)}
    out = list(rows)
    for (task, method, seed), row in reversed(first.items()):
        pairs = [(values.get((task, method, seed, m)), values.get((task, reference, seed, m))) for m in GAP]
        apart = [abs(a - b) for a, b in pairs if a is not None and b is not None]
        if len(apart) == len(GAP):
            out.append({**row, "metric": "avg_gap", "value": sum(apart) / len(apart), "n": len(apart), "low": None, "high": None})
    return out


def _attacks(plan: _Plan, planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """What each attack took beside what it found: threat model, queries, seconds, settings and judge."""
    asked, out = {a.name for a in plan.spec.attacks}, list[dict[str, Any]]()
    for p in planned:
        common = {"target": p.cell.target or plan.label, "task": p.task, "method": p.label}
        out += [row | common for row in report_attacks.rows(flags.read(plan.folder(p))) if row["attack"] in asked and p.cell.attacked]
    return out


def _write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A CSV, numbers with six digits."""
    with replacing(path) as draft, draft.open("w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(["" if r[c] is None else f"{r[c]:.6g}" if isinstance(r[c], float) else r[c] for c in columns] for r in rows)


def _missed(check: Check, rows: Sequence[Mapping[str, Any]]) -> str:
    chosen = [
        r["value"]
        for r in rows
        if r["method"] == check.method
        and r["metric"] == check.metric
        and (not check.tasks or r["task"] in check.tasks)
        and r["value"] is not None
    ]
    mean = sum(chosen) / len(chosen) if chosen else math.nan
    what = f"{check.method} {check.metric}" + (f" on {', '.join(check.tasks)}" if check.tasks else "")
    if check.at_least is not None and not mean >= check.at_least:
        return f"{what}: {mean:.1f} < {check.at_least:g}"
    if check.at_most is not None and not mean <= check.at_most:
        return f"{what}: {mean:.1f} > {check.at_most:g}"
    return ""
