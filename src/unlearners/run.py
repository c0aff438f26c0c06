"""erase, attack, evaluate: plain functions over a run folder. Each reads the folder and adds files to it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from dataclasses import fields as dataclass_fields
from functools import cache, partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import __version__, config, judges, patch, registry, schedulers, tasks
from .banks import banked
from .base import Attack, Item, Method, Metric, Request, Row, Run, Score, Target, Task, Verdict, chosen, kebab, require, settle
from .errors import UsageError
from .files import locked, replacing, sentence, write_json, write_text
from .meter import Meter
from .outputs import Answers, FolderOutputs, Gallery, Predictions, save_picture
from .session import FolderSession, Progress, environment
from .targets import absolute, guide_run, load, put_guide, read_run, root, weighed
from .targets.base import Chat, DualEncoder, TextToImage, Trainable

SCHEMA = 1
SAID = {field.name for field in dataclass_fields(Verdict)}
__all__ = ["Progress", "attack", "environment", "erase", "evaluate", "progress_bars", "replacing", "results", "write_json"]


# --- erase --------------------------------------------------------------------------------------------------------
def erase(
    method: Method | str,
    target: str = "canvas",
    task: Task | str = "",
    *,
    out: str | Path | None = None,
    runs: str | Path = "runs",
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    patches: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
    **fields: Any,
) -> Path:
    """Make ``target`` forget ``task`` with ``method`` and write a run folder; returns it.

    ``method`` and ``task`` are objects or names; ``fields`` go to a method given by name. The folder is named by the hash of the
    request (or by ``out``): a finished one is returned as it is, an interrupted one resumes and ends with the same weights.
    Raises ``UsageError`` for parts that do not fit and ``NonFiniteError`` when training diverges.
    """
    method = registry.make("methods", method, **fields) if isinstance(method, str) else method
    task = (tasks.load(task) if isinstance(task, str) else task).at(seed)
    where = absolute(target)
    run = Run(target=where, task=task, method=method, seed=seed, dtype=dtype, patches=tuple(str(Path(p).resolve()) for p in patches))
    folder = Path(out) if out else Path(runs) / run.folder
    with locked(folder):
        return _erase(run, folder, device, force, progress)


def _erase(run: Run, folder: Path, device: str, force: bool, progress: Progress | None) -> Path:
    """``erase`` into a folder that this process holds."""
    method, where = run.method, run.target
    if (folder / "run.json").exists():
        found = read_run(folder)
        if found["hash"] != run.hash:
            raise UsageError(
                f"{folder} holds another run ({found['run']['method']['name']} on {found['run']['task']['name']}); give another --out"
            )
        if found["status"] == "done":
            return folder
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "status": "running",
        "hash": run.hash,
        "run": run.plain,
        "preset": _preset(method),
        "force": force,
        "family": "",
        "guide": kebab(method) if method.runtime else "",
        "base": None,
        "error": None,
    }
    record |= {"env": environment(device), "weights": None, "time": None, "data": None, "warnings": [], "chosen": {}}
    write_json(folder / "run.json", record)
    try:
        (base, stack, family, forced), below = root(where), guide_run(where)
        model = load(base, device=device, dtype=run.dtype, family=family)
        bare = patch.fingerprint(model.modules)
        require(method, model)
        model.patch([*stack, *weighed(run.patches)], force=force or forced)
        start = patch.fingerprint(model.modules) if stack or run.patches else bare
        record |= {"family": kebab(model), "base": model.base, "start": config.content_hash([start, below["hash"]] if below else start)}
        record |= {"guide": record["guide"] or (below["guide"] if below else "")}
        put_guide(model, below)
        method = settle(run.method, model, run.task)
        record |= {"chosen": chosen(run.method, method)}
        if isinstance(model, Trainable) and run.task.forget.source:
            record["data"] = _noted(model, run.task, folder)
        write_json(folder / "run.json", record)
        model.session = session = FolderSession(folder, progress)
        spent = float(json.loads((folder / "spent.json").read_text())) if (folder / "spent.json").exists() else 0.0
        meter, cached = Meter(model.device), [0.0]

        def log(row: Row) -> None:
            session.write(row)
            cached[0] += row.get("cached_seconds", 0.0)

        try:
            with meter:
                method(model, run.task, seed=run.seed, log=log)
        finally:
            write_json(folder / "spent.json", spent + meter.seconds)
            record |= {"weights": _save_weights(folder, run, method, model, bare, start), "warnings": list(model.warnings)}
        record |= {"status": "done", "time": {"seconds": spent + meter.seconds + cached[0], "peak_memory": meter.peak}}
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        record |= {
            "status": "stopped" if stopped else "failed",
            "error": "interrupted; the same command resumes" if stopped else sentence(error),
        }
        raise
    finally:
        write_json(folder / "run.json", record)
        if record["status"] == "done":
            for name in ("checkpoint.pt", "spent.json"):
                (folder / name).unlink(missing_ok=True)
    return folder


def _noted(model: Trainable, task: Task, folder: Path) -> dict[str, Any]:
    """What the run record says of the data; the forgotten rows themselves go to ``forget.txt``."""
    forget = model.open(task.forget)
    write_text(folder / "forget.txt", "".join(f"{i}\n" for i in forget.indices.tolist()))
    kept = len(model.open(task.retain)) if task.retain.source else 0
    found = {"source": task.forget.source, "digest": forget.digest, "forget": len(forget), "retain": kept, "classes": len(forget.classes)}
    subset = task.forget.subset or int(model.trained_on.get("subset", 0))
    return {**found, "seed": task.forget.seed, "draw": task.forget.draw, "subset": subset, "augment": forget.augmentation}


def _save_weights(
    folder: Path, run: Run, method: Method, model: Target, base: Mapping[str, str], start: Mapping[str, str]
) -> dict[str, Any]:
    """Save all that differs from ``base``, the model without patches, so that the file stands alone; say what changed since ``start``.

    A method that acts at generation time has no weights of its own, and what lies below it is loaded from there.
    """
    now = patch.fingerprint(model.modules)
    tensors = {} if method.runtime else patch.diff(base, model.modules)
    allowed = set() if method.runtime else {patch.hub_key(n) for n in model.select(method.params)}
    changed = sorted(n for n in now if now[n] != start[n])
    weights = {patch.hub_key(n) for n in model.named()}  # buffers, such as running statistics, are not selected
    touched = {name.partition(".")[0] for name in tensors}
    meta = {"run": run.hash, "method": kebab(method), "concepts": json.dumps(run.task.concepts), "unlearners": __version__}
    path = folder / "weights.safetensors"
    if tensors:
        hashes = {c: h for c, h in model.base["sha256"].items() if c in touched}
        patch.save(patch.Patch(tensors=tensors, kind="value", base=hashes, meta=meta), path)
    else:
        path.unlink(missing_ok=True)
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if tensors else "",
        "bytes": path.stat().st_size if tensors else 0,
        "tensors": len(tensors),
        "changed": changed,
        "outside": len([n for n in changed if n in weights and n not in allowed]),
    }


def _of(folder: Path) -> tuple[dict[str, Any], Task]:
    record = read_run(folder)
    if record["status"] != "done":
        raise UsageError(f"the erasure in {folder} is {record['status']}; run the same 'unlearn erase' again to finish it first")
    return record, config.build(Task, record["run"]["task"])


def _alone(record: Mapping[str, Any]) -> bool:
    """Whether a run is of a model that others erased and nobody says what it was before (see ``plug``): it stands for its own original."""
    run = record["run"]
    return bool(run["method"].get("patch") == run["target"])


def _original(record: Mapping[str, Any], device: str) -> Target:
    run = record["run"]
    return load(run["target"], patches=run["patches"], device=device, dtype=run["dtype"], family=record["family"], force=record["force"])


# --- pictures -----------------------------------------------------------------------------------------------------
def _sampler(model: Any, steps: int | None, guidance: float | None, scheduler: str) -> dict[str, Any]:
    """Settings of every picture that is drawn; ``UsageError`` for a scheduler that the model cannot be drawn with."""
    own = model.sampler
    sampler = {"steps": steps or own["steps"], "guidance": own["guidance"] if guidance is None else guidance}
    if scheduler:
        schedulers.named(model, scheduler)
        sampler["scheduler"] = scheduler
    return sampler


def _original_folder(folder: Path, record: Mapping[str, Any]) -> Path:
    """Pictures of the untouched model are shared by all runs on it: beside them, named by what it was loaded from."""
    key = config.content_hash({"name": record["base"]["name"], "weights": record["start"], "dtype": record["run"]["dtype"]})
    return folder.resolve().parent / f"original-{key[:8]}"


# --- attack -------------------------------------------------------------------------------------------------------
def attack(
    attack: Attack | str,
    folder: str | Path,
    *,
    seed: int = 0,
    prompts: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str = "",
    suite: str = "",
    max_tokens: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    **fields: Any,
) -> Path:
    """Attack the erased model in ``folder``; writes ``attacks/<name>.json`` and returns its path.

    The prompts are the task's that name a concept, each with the task's first seed, then with the next, and so on, until there are
    ``prompts`` of them (0: all with one seed). A prompt with a seed of its own is drawn with that, then with the numbers after it.
    ``steps`` and ``guidance`` are the sampler's, of every picture that is judged, but for prompts that bring their own guidance;
    ``scheduler`` names another sampler than the model's own ("lms", "ddim", "euler" …; see ``schedulers.NAMES``).
    ``suite`` is a task whose prompts and judge take the place of the run's. Prompts of more than ``max_tokens`` tokens, start and end
    included, are judged and counted but not attacked (0: all are). A finished attack with the same settings is not repeated.
    """
    attack = registry.make("attacks", attack, **fields) if isinstance(attack, str) else attack
    folder = Path(folder)
    read_run(folder)
    with locked(folder):
        return _attack(attack, folder, seed, prompts, steps, guidance, scheduler, suite, max_tokens, device, progress)


def _attack(
    attack: Attack,
    folder: Path,
    seed: int,
    prompts: int,
    steps: int | None,
    guidance: float | None,
    scheduler: str,
    suite: str,
    max_tokens: int,
    device: str,
    progress: Progress | None,
) -> Path:
    """``attack`` in a folder that this process holds."""
    record, task = _of(folder)
    task = tasks.load(suite) if suite else task
    name = kebab(attack)
    path = folder / "attacks" / f"{name}.json"
    asked = {"attack": {"name": name, **config.to_dict(attack)}, "seed": seed, "prompts": prompts, "steps": steps, "guidance": guidance}
    asked |= {"suite": suite} if suite else {}
    asked |= {"max_tokens": max_tokens} if max_tokens else {}
    asked |= _reader(task)
    asked |= {"scheduler": scheduler} if scheduler else {}
    if path.exists():
        found = json.loads(path.read_text())
        if found["asked"] == asked:
            return path
    if not issubclass(kind := registry.get("targets", record["family"]), attack.needs):
        raise UsageError(f"{name} attacks a {attack.needs.__name__}, and {folder} holds a {kind.__name__}; see 'unlearn list attacks'")
    named = [p for p in task.probes if task.names_concept(p)]
    if not named:
        raise UsageError(f"task '{task.name}' has no prompt that names its concept; add probes to it")
    rounds = enumerate(chain(task.seeds, count(max(task.seeds) + 1)))
    every = (Request(p.prompt, s if p.seed is None else p.seed + i, p.guidance) for i, s in rounds for p in named)
    if (alone := _alone(record)) and attack.access == "white":
        raise UsageError(
            f"{name} searches towards what the model drew before the erasure, which nobody knows of {record['run']['target']}; "
            "name that model with --base"
        )
    model = load(str(folder), device=device, dtype=record["run"]["dtype"])
    asks = attack.access == "black" or getattr(attack, "transfer", False) or (attack.through and model.late_guide)
    if record.get("guide") and not asks:
        also = "set transfer to search in the weights alone and try what is found, or " if hasattr(attack, "transfer") else ""
        raise UsageError(
            f"{name} follows gradients of the weights and cannot go through {record['guide']}, which acts outside of them; {also}use an "
            "attack that only asks for pictures, such as paraphrase or random_tokens"
        )
    judge = judges.load(task.judge)
    model.sampler = _sampler(model, steps, guidance, scheduler)  # type: ignore[attr-defined]
    before = cache(lambda: _original(record, device))
    model.original = None if alone else before
    gallery = Gallery(_original_folder(folder, record), model.sampler)  # type: ignore[attr-defined]
    requests = list(islice(every, prompts or len(named)))
    gallery.fill(before, requests, 64, progress, "drawing the original")
    lengths, room = _tokens(model, [r.prompt for r in requests])
    long = [n > (max_tokens or room) for n in lengths]
    items = [
        Item(prompt=r.prompt, seed=r.seed, picture=None if alone else gallery.picture(r)[None], guidance=r.guidance, spared=skip)
        for r, skip in zip(requests, long, strict=True)
    ]
    draft = path.with_suffix(".part")  # what an interrupted attack had finished
    draft.parent.mkdir(exist_ok=True)
    kept = json.loads(draft.read_text()) if draft.exists() else {}
    kept = kept if kept.get("asked") == asked else {"log": [], "verdicts": [], "seconds": 0.0}
    log: list[Row] = kept["log"]
    started = time.monotonic()

    def note(row: Row) -> None:
        log.append({"step": len(log) + 1, **row})
        if progress:
            progress(f"attacking ({name})", len(log), 0, row)

    def keep(verdicts: list[Verdict]) -> None:
        spent = kept["seconds"] + time.monotonic() - started
        write_json(draft, {"asked": asked, "seconds": spent, "log": log, "verdicts": [asdict(v) for v in verdicts]})

    def broken(i: int, picture: Tensor) -> None:
        save_picture(picture, folder / f"attacks/{name}/{i:03d}.png")

    known = [Verdict(**v) for v in kept["verdicts"]]
    (path.parent / name).mkdir(exist_ok=True)
    # a judge is tried on the original first, where there is one
    detected = [None] * len(items) if alone else judge.shows(torch.stack([gallery.picture(r) for r in requests]), task)
    with Meter(model.device) as meter:
        verdicts = attack(model, task, judge, items, seed=seed, log=note, known=known, keep=keep, found=broken)
    rows = [asdict(v) | {"detected": d, "picture": None, "clean": None, "original": None} for v, d in zip(verdicts, detected, strict=True)]
    drawn = {(r["prompt"], r["seed"], r.get("guidance")): r["file"] for r in gallery.rows.values()}
    shown = [i for i, v in enumerate(verdicts) if v.success and v.adversarial]
    for i, clean in zip(shown, _clean(model, [requests[i] for i in shown]), strict=True):
        save_picture(clean, folder / f"attacks/{name}/{i:03d}-clean.png")
        rows[i] |= {"picture": f"attacks/{name}/{i:03d}.png", "clean": f"attacks/{name}/{i:03d}-clean.png"}
        rows[i]["original"] = None if alone else drawn[items[i].prompt, items[i].seed, items[i].guidance]
    write_json(
        path,
        {
            "attack": asked["attack"],
            "chosen": chosen(attack, settle(attack, model, task)),
            "asked": asked,
            "access": attack.access,
            "level": attack.level,
            "paper": attack.paper,
            "preset": _preset(attack),
            "task": task.name,
            "judge": task.judge,
            "judging": judge.describe(),
            "full": sum(n >= room for n in lengths),
            "filter": {"max_tokens": max_tokens, "attacked": len(items) - sum(long), "of": len(items)} if max_tokens else None,
            "seed": seed,
            "sampler": model.sampler,  # type: ignore[attr-defined]
            "original": None if alone else os.path.relpath(gallery.folder, folder.resolve()),
            "env": environment(device),
            "time": {"seconds": kept["seconds"] + meter.seconds, "peak_memory": meter.peak},
            "log": log,
            "verdicts": rows,
        },
    )
    draft.unlink(missing_ok=True)
    return path


def _clean(model: Any, requests: Sequence[Request]) -> list[Tensor]:
    """The model's picture (3, H, W) of each request, without an attack."""
    images: dict[int, Tensor] = {}
    for g in dict.fromkeys(r.guidance for r in requests):
        part, own = [k for k, r in enumerate(requests) if r.guidance == g], {} if g is None else {"guidance": g}
        images |= zip(part, model.sample([requests[k].prompt for k in part], [requests[k].seed for k in part], **own), strict=True)
    return [images[k] for k in range(len(requests))]


def _tokens(model: Any, prompts: Sequence[str]) -> tuple[list[int], int]:
    """How many tokens each prompt has, start and end included, and how many the text encoder reads, to which a longer one is cut."""
    if not isinstance(model, TextToImage):  # drawn by class, so nothing is read
        return [0] * len(prompts), 1
    ids, special = model.tokens(prompts).cpu(), torch.tensor(sorted(model.special))
    return [int((~torch.isin(row, special)).sum()) + 2 for row in ids], ids.shape[1]


def _preset(part: Any) -> str:
    """The name of the preset whose settings ``part`` has, or ""."""
    for name, fields in part.presets.items():
        if part == config.build(type(part), dict(fields)):
            return str(name)
    return ""


# --- evaluate -----------------------------------------------------------------------------------------------------
def evaluate(
    folder: str | Path,
    *,
    metrics: Sequence[Metric | str] | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str = "",
    split: Literal["test", "validation"] = "test",
    references: Sequence[str | Path] = (),
    suite: str = "",
    names: str | Path = "",
    batch: int = 64,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Draw and predict what the metrics ask for, once, with the original and the erased model; write ``results.json``. Returns its path.

    What the machine decides and not the seed (cost) goes to ``cost.json``, so that the same seed gives the same ``results.json``.

    ``metrics`` defaults to the task's suite and ``seeds`` to its seeds; pictures that are there are not drawn again, and nothing is
    done when the results are those of the same request. ``split="validation"`` measures on held-out training pictures in place of the
    test pictures and writes ``validation.json`` alone: settings are chosen there. ``references`` are run folders of models that never
    saw the forget set. ``suite`` is a task, such as "i2p", whose prompts, seeds, judge and metrics take the place of the run's; what it
    measures goes to ``suites/<name>.json`` alone. ``scheduler`` names another sampler than the model's own, as in ``attack``. ``names`` is
    a text file of names, one a line, that the test pictures of a dual encoder may be taken for too.
    """
    folder = Path(folder)
    read_run(folder)
    with locked(folder):
        return _evaluate(folder, metrics, seeds, steps, guidance, scheduler, split, references, suite, str(names), batch, device, progress)


def _evaluate(
    folder: Path,
    metrics: Sequence[Metric | str] | None,
    seeds: Sequence[int] | None,
    steps: int | None,
    guidance: float | None,
    scheduler: str,
    split: Literal["test", "validation"],
    references: Sequence[str | Path],
    suite: str,
    names: str,
    batch: int,
    device: str,
    progress: Progress | None,
) -> Path:
    """``evaluate`` in a folder that this process holds."""
    record, task = _of(folder)
    for other in references:
        _same_forgotten(task, Path(other))
    task = tasks.load(suite).at(record["run"]["seed"]) if suite else task
    if names:
        if not issubclass(registry.get("targets", record["family"]), DualEncoder):
            raise UsageError(f"--names is of pictures that are named zero-shot, and {folder} is a {record['family']}; leave it out")
        task = banked(task, names)
    if seeds:
        task = replace(task, seeds=tuple(seeds))
    if split != "test":
        task = replace(task, holdout=replace(task.holdout, split=split), utility=tuple(replace(u, split=split) for u in task.utility))
    measured = [registry.from_spec("metrics", m) if isinstance(m, str) else m for m in (metrics or task.suite)]
    attacked = {} if suite else {p.stem: p for p in sorted((folder / "attacks").glob("*.json"))}
    asked = {
        "metrics": [{"name": kebab(m), "version": m.version, **config.to_dict(m)} for m in measured],
        "seeds": list(task.seeds),
        "steps": steps,
        "guidance": guidance,
        "attacks": {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in attacked.items()},
        "weights": (record["weights"] or {}).get("sha256"),
        "references": sorted(read_run(r)["hash"] for r in references),
    }
    asked |= {"scheduler": scheduler} if scheduler else {}
    asked |= {"suite": suite, "probes": config.content_hash(config.to_dict(task.probes))} if suite else {}
    asked |= {"names": task.holdout.names_digest} if names else {}
    asked |= _reader(task)
    tests = split == "test" and not suite
    done, file = (
        _suite_files(folder, task.name)
        if suite
        else (
            folder / ("evaluate.json" if tests else "evaluate-validation.json"),
            folder / ("results.json" if tests else "validation.json"),
        )
    )
    if done.exists() and file.exists() and json.loads(done.read_text()).get("asked") == asked:
        return file
    started = time.monotonic()
    erased = load(str(folder), device=device, dtype=record["run"]["dtype"])
    original = erased.original = cache(lambda: _original(record, device))
    wanted = [r for m in measured for r in m.requests(erased, task)]
    sampler = _sampler(erased, steps, guidance, scheduler) if wanted else {}
    judge = cache(lambda: judges.load(task.judge))
    verdicts = {name: [Verdict(**{k: v for k, v in row.items() if k in SAID}) for row in json.loads(p.read_text())["verdicts"]]
                for name, p in attacked.items()}  # fmt: skip
    others = [Predictions(Path(r), partial(load, str(r), device=device)) for r in references]
    shared = _original_folder(folder, record)
    sides = []
    for where, model, what, mine in ((shared, original, "the original", {}), (folder, lambda: erased, "the erased", verdicts)):
        gallery = Gallery(where, sampler)
        gallery.fill(model, wanted, batch, progress, f"drawing {what}")
        predict, ask = Predictions(where, model), Answers(where, model)
        for i, data in enumerate(read := [d for m in measured for d in m.data(erased, task)]):
            (ask if isinstance(erased, Chat) else predict)(data)
            if progress:
                progress(f"predicting with {what}", i + 1, len(read), {})
        known = record if mine is verdicts else {}
        sides.append(FolderOutputs(gallery, judge, task, predict, ask, record=known, verdicts=mine, references=others))
    differs = not done.exists() and bool(wanted) and not sides[1].gallery.repeats(erased, wanted[0])
    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for metric in measured:
        after = _scores(metric, metric.score(erased, task, sides[1]))
        compares = metric.requests(erased, task) or metric.data(erased, task)
        before = _scores(metric, metric.score(erased, task, sides[0])) if compares else {}
        for name, score in after.items():
            was = before.get(name)
            rows[metric.reproducible].append(
                {
                    "metric": name,
                    "version": metric.version,
                    "config": config.to_dict(metric),
                    **_plain(score),
                    "higher_is_better": metric.better(name),
                    "before": _plain(was) if was else None,
                }
            )
    for side in () if suite else sides:  # the report's samples are of the run's own prompts
        side.annotate()
    done.unlink(missing_ok=True)  # killed from here on, the next evaluation does not take one request's results for another's
    write_json(file, rows[True])
    if tests:
        write_json(folder / "cost.json", rows[False])
    write_json(
        done,
        {
            "asked": asked,
            "original": os.path.relpath(sides[0].gallery.folder, folder.resolve()),
            "references": [os.path.relpath(Path(r).resolve(), folder.resolve()) for r in references],
            "sampler": sampler,
            "judge": task.judge,
            "judging": judge().describe() if judge.cache_info().currsize else None,
            "seeds": list(task.seeds),
            "repeat_differs": differs,
            "seconds": time.monotonic() - started,
        },
    )
    return file


def _reader(task: Task) -> dict[str, Any]:
    """The version of the task's judge where it has had another, so that what an older one said is not taken for an answer."""
    name = task.judge.partition(":")[0]
    version = registry.get("judges", name).version if name in registry.names("judges") else 1
    return {"judge": [name, version]} if version > 1 else {}


def _same_forgotten(task: Task, reference: Path) -> None:
    """Refuse a reference that did not leave out what ``task`` forgets: it would have seen it."""
    other = config.build(Task, read_run(reference)["run"]["task"]).forget
    if other != task.forget:
        said = f"{other.rows or 'all'} of {other.source or 'nothing'}" + (f", seed {other.seed if other.draw is None else other.draw}")
        raise UsageError(
            f"the reference {reference} left out other pictures ({said}) than this run forgets, so it saw those; give one of the same "
            "task, with the same --split-seed"
        )


def _suite_files(folder: Path, suite: str) -> tuple[Path, Path]:
    """Where the request and the results of a named suite go."""
    (folder / "suites").mkdir(exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", suite).strip("-")[:80]
    return folder / "suites" / f"{name}-evaluate.json", folder / "suites" / f"{name}.json"


def results(folder: str | Path) -> list[dict[str, Any]]:
    """Every measured row of a run folder: ``results.json``, then ``cost.json``."""
    files = [Path(folder) / "results.json", Path(folder) / "cost.json"]
    return [row for file in files if file.exists() for row in json.loads(file.read_text())]


def _scores(metric: Metric, score: Score | dict[str, Score]) -> dict[str, Score]:
    name = kebab(metric)
    return {name: score} if isinstance(score, Score) else {f"{name}/{k}" if k else name: v for k, v in score.items()}


def _plain(score: Score) -> dict[str, Any]:
    """As JSON: what is not a number is null."""
    finite = {k: getattr(score, k) if getattr(score, k) == getattr(score, k) else None for k in ("value", "low", "high")}
    plain = {"value": finite["value"], "n": score.n, "low": finite["low"], "high": finite["high"]}
    return plain | ({"table": score.table} if score.table is not None else {})


# --- progress -----------------------------------------------------------------------------------------------------
@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Progress bars with ETA on standard error, one for each kind of work."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[row]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        known: dict[str, Any] = {}

        def show(what: str, done: int, total: int, row: Row) -> None:
            if what not in known or bars.tasks[bars.task_ids.index(known[what])].completed > done:
                known[what] = bars.add_task(what, total=total or None, row="")
            text = "  ".join(f"{k} {v:.4g}" for k, v in list(row.items())[:3])
            bars.update(known[what], completed=done, row=text)

        yield show
