"""erase, attack, evaluate: plain functions over a run folder. Each reads the folder and adds files to it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import __version__, config, patch, registry, tasks
from .base import Attack, Item, Judge, Meter, Method, Metric, Request, Row, Run, Score, Stateful, Target, Task, Verdict, kebab
from .errors import NonFiniteError, RefusedError, UnlearnError, UsageError
from .targets import absolute, load, read_run, root

SCHEMA = 1
CHECKPOINT_SECONDS = 60.0
Progress = Callable[[str, int, int, Row], None]


# --- files --------------------------------------------------------------------------------------------------------
@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write, which then replaces ``path``: a reader sees the old file or the new one, also after a full disk or a kill."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise UnlearnError(f"{path} could not be written ({_sentence(error)}) and is as before; free some space and try again") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=True))


def _sentence(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def environment(device: str) -> dict[str, str]:
    """Versions, device and commit: what a result depends on beside its configuration."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return ""

    names = ("torch", "diffusers", "transformers", "safetensors", "numpy")
    here = Path(__file__).resolve().parent
    git = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {
        "python": platform.python_version(),
        "unlearners": __version__,
        **{n: of(n) for n in names},
        "device": device,
        "hardware": gpu,
        "git": git,
    }


class FolderSession:
    """Progress of a running method, kept in its folder: log, checkpoints about once a minute, resuming, the last good state."""

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        self.folder, self.progress = folder, progress
        self.path, self.log = folder / "checkpoint.pt", folder / "log.jsonl"
        self.lines, self.saved, self.row = 0, time.monotonic(), Row()
        self.good: dict[str, Tensor] = {}
        for left in folder.glob(".*.tmp"):  # drafts of a killed process
            left.unlink()
        if not self.path.exists():
            write_text(self.log, "")

    def restore(self, target: Target, states: Sequence[Stateful]) -> int:
        trained = {n: p for n, p in target.named().items() if p.requires_grad}
        start = 0
        if self.path.exists():
            try:
                state = torch.load(self.path, map_location=target.device, weights_only=True)
            except Exception as error:  # a damaged pickle can raise anything
                raise RefusedError(f"{self.path} is damaged; delete it to start again") from error
            if set(state["weights"]) != set(trained):
                raise RefusedError(f"{self.path} is a checkpoint of other weights; delete it to start again")
            for name, p in trained.items():
                p.data.copy_(state["weights"][name])
            for one, saved in zip(states, state["states"], strict=True):
                one.load_state_dict(saved)
            torch.set_rng_state(state["rng"].cpu())
            if target.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"].cpu(), target.device)
            start, self.lines = int(state["step"]), int(state["lines"])
            kept = self.log.read_text().splitlines()[: self.lines]
            write_text(self.log, "".join(f"{line}\n" for line in kept))
        self.good = {n: p.detach().clone() for n, p in trained.items()}
        return start

    def tick(self, target: Target, states: Sequence[Stateful], done: int, total: int) -> None:
        if self.progress:
            self.progress("erasing", done, total, self.row)
        if time.monotonic() - self.saved < CHECKPOINT_SECONDS and done < total:
            return
        named = target.named()
        if bad := [n for n in self.good if not torch.isfinite(named[n]).all()]:
            self.undo(target)
            raise NonFiniteError(f"'{bad[0]}' is no longer finite and training stopped; the last good state is kept: try a lower lr")
        if done == total:
            return
        self.good = {n: named[n].detach().clone() for n in self.good}
        state = {
            "step": done,
            "lines": self.lines,
            "weights": self.good,
            "states": [s.state_dict() for s in states],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(target.device) if target.device.type == "cuda" else None,
        }
        with replacing(self.path) as draft:
            torch.save(state, draft)
        self.saved = time.monotonic()

    def undo(self, target: Target) -> None:
        named = target.named()
        for name, value in self.good.items():
            named[name].data.copy_(value)

    def write(self, row: Row) -> None:
        self.lines, self.row = self.lines + 1, row
        try:
            with self.log.open("a") as f:
                f.write(json.dumps({"step": self.lines, **row}) + "\n")
        except OSError as error:
            raise UnlearnError(f"{self.log} could not be written ({_sentence(error)}); free some space and run the same command") from error


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
    task = tasks.load(task) if isinstance(task, str) else task
    where = absolute(target)
    run = Run(target=where, task=task, method=method, seed=seed, dtype=dtype, patches=tuple(str(Path(p).resolve()) for p in patches))
    folder = Path(out) if out else Path(runs) / run.folder
    if (folder / "run.json").exists():
        found = read_run(folder)
        if found["hash"] != run.hash:
            raise UsageError(
                f"{folder} holds another run ({found['run']['method']['name']} on {found['run']['task']['name']}); give another --out"
            )
        if found["status"] == "done":
            return folder
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "status": "running",
        "hash": run.hash,
        "run": run.plain,
        "preset": _preset(method),
        "force": force,
        "family": "",
        "base": None,
        "error": None,
    }
    record |= {"env": environment(device), "weights": None, "time": None}
    write_json(folder / "run.json", record)
    try:
        base, stack, family, forced = root(where)
        model = load(base, device=device, dtype=dtype, family=family)
        bare = patch.fingerprint(model.modules)
        model.patch([*stack, *run.patches], force=force or forced)
        start = patch.fingerprint(model.modules) if stack or run.patches else bare
        record |= {"family": kebab(model), "base": model.base, "start": config.content_hash(start)}
        write_json(folder / "run.json", record)
        model.session = session = FolderSession(folder, progress)
        spent = float(json.loads((folder / "spent.json").read_text())) if (folder / "spent.json").exists() else 0.0
        meter = Meter(model.device)
        try:
            with meter:
                method(model, task, seed=seed, log=session.write)
        finally:
            write_json(folder / "spent.json", spent + meter.seconds)
            record["weights"] = _save_weights(folder, run, model, bare, start)
        record |= {"status": "done", "time": {"seconds": spent + meter.seconds, "peak_memory": meter.peak}}
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        record |= {
            "status": "stopped" if stopped else "failed",
            "error": "interrupted; the same command resumes" if stopped else _sentence(error),
        }
        raise
    finally:
        write_json(folder / "run.json", record)
        if record["status"] == "done":
            for name in ("checkpoint.pt", "spent.json"):
                (folder / name).unlink(missing_ok=True)
    return folder


def _save_weights(folder: Path, run: Run, model: Target, base: Mapping[str, str], start: Mapping[str, str]) -> dict[str, Any]:
    """Save all that differs from ``base``, the model without patches, so that the file stands alone; say what changed since ``start``."""
    tensors, now = patch.diff(base, model.modules), patch.fingerprint(model.modules)
    allowed = {patch.hub_key(n) for n in model.select(run.method.params)}
    changed = sorted(n for n in now if now[n] != start[n])
    touched = {name.partition(".")[0] for name in tensors}
    meta = {"run": run.hash, "method": kebab(run.method), "concepts": json.dumps(run.task.concepts), "unlearners": __version__}
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
        "outside": len([n for n in changed if n not in allowed]),
    }


def _of(folder: Path) -> tuple[dict[str, Any], Task]:
    record = read_run(folder)
    if record["status"] != "done":
        raise UsageError(f"the erasure in {folder} is {record['status']}; run the same 'unlearn erase' again to finish it first")
    return record, config.build(Task, record["run"]["task"])


def _original(record: Mapping[str, Any], device: str) -> Target:
    run = record["run"]
    return load(run["target"], patches=run["patches"], device=device, dtype=run["dtype"], family=record["family"], force=record["force"])


# --- pictures -----------------------------------------------------------------------------------------------------
def _key(prompt: str, seed: int) -> str:
    return f"{seed}\0{prompt}"


class Gallery:
    """Pictures of one model in one folder: what is there is not drawn again."""

    def __init__(self, folder: Path, sampler: Mapping[str, Any]) -> None:
        self.folder, self.sampler = folder, dict(sampler)
        self.manifest = folder / "samples" / "manifest.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        if self.manifest.exists():
            for line in self.manifest.read_text().splitlines():
                row = json.loads(line)
                if row["sampler"] == self.sampler and (folder / row["file"]).exists():
                    self.rows[_key(row["prompt"], row["seed"])] = row

    def fill(self, target: Callable[[], Any], requests: Sequence[Request], batch: int, progress: Progress | None, what: str) -> None:
        """Draw the requests that are missing, in batches, each saved when it is drawn."""
        missing = [r for r in dict.fromkeys(requests) if _key(r.prompt, r.seed) not in self.rows]
        if not missing:
            return
        model, done = target(), 0
        for i in range(0, len(missing), batch):
            part = missing[i : i + batch]
            images = model.sample([r.prompt for r in part], [r.seed for r in part], batch=batch, **self.sampler)
            for request, image in zip(part, images, strict=True):
                name = config.content_hash([request.prompt, request.seed, self.sampler])[:16]  # so no picture is another sampler's
                file = f"samples/{name}.png"
                save_picture(image, self.folder / file)
                row = {"prompt": request.prompt, "seed": request.seed, "file": file, "sampler": self.sampler}
                self.rows[_key(request.prompt, request.seed)] = row
            self.save()
            done += len(part)
            if progress:
                progress(what, done, len(missing), {})

    def save(self) -> None:
        write_text(self.manifest, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.rows.values()))

    def repeats(self, target: Any, request: Request) -> bool:
        """Whether drawing ``request`` again gives the same picture, up to what rounding in another batch size may do."""
        again = target.sample([request.prompt], [request.seed], **self.sampler)[0]
        return bool((again - self.picture(request)).abs().max() < 0.1)

    def picture(self, request: Request) -> Tensor:
        return read_picture(self.folder / self.rows[_key(request.prompt, request.seed)]["file"])


def save_picture(image: Tensor, path: Path) -> None:
    """(3, H, W) in [0, 1] to an 8-bit PNG."""
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def read_picture(path: Path) -> Tensor:
    """An 8-bit picture file to (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1).float() / 255


class GalleryOutputs:
    """What metrics see of one gallery (see ``base.Outputs``): every domain is judged once."""

    def __init__(
        self, gallery: Gallery, judge: Judge, task: Task, record: Mapping[str, Any], verdicts: Mapping[str, Sequence[Verdict]]
    ) -> None:
        self.gallery, self.judge, self.task, self.record, self.verdicts = gallery, judge, task, record, verdicts
        self.judged: dict[str, dict[str, str]] = {}

    def images(self, requests: Sequence[Request]) -> Tensor:
        return torch.stack([self.gallery.picture(r) for r in requests])

    def labels(self, requests: Sequence[Request], domain: str) -> list[str]:
        known = self.judged.setdefault(domain, {})
        new = [r for r in dict.fromkeys(requests) if _key(r.prompt, r.seed) not in known]
        for i in range(0, len(new), 256):
            part = new[i : i + 256]
            found = self.judge.labels(self.images(part), self.task, domain)
            known.update({_key(r.prompt, r.seed): label for r, label in zip(part, found, strict=True)})
        return [known[_key(r.prompt, r.seed)] for r in requests]

    def annotate(self) -> None:
        """Write truth and labels of this task's probes into the manifest, for the report."""
        truth = {p.prompt: (dict(p.truth), self.task.names_concept(p)) for p in self.task.probes}
        for key, row in self.gallery.rows.items():
            if row["prompt"] in truth:
                row["truth"], row["named"] = truth[row["prompt"]]
                found = {d: known[key] for d, known in self.judged.items() if key in known}
                row["labels"] = {**row.get("labels", {}), **found}  # the original's pictures serve several tasks
        self.gallery.save()


def _sampler(target_defaults: Mapping[str, Any], steps: int | None, guidance: float | None) -> dict[str, Any]:
    return {"steps": steps or target_defaults["steps"], "guidance": target_defaults["guidance"] if guidance is None else guidance}


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
    device: str = "cpu",
    progress: Progress | None = None,
    **fields: Any,
) -> Path:
    """Attack the erased model in ``folder``; writes ``attacks/<name>.json`` and returns its path.

    The prompts are the task's that name a concept, each with the task's first seed (then the next, …); ``prompts`` caps their number
    (0: all with one seed). A finished attack with the same settings is not repeated.
    """
    attack = registry.make("attacks", attack, **fields) if isinstance(attack, str) else attack
    folder = Path(folder)
    record, task = _of(folder)
    name = kebab(attack)
    path = folder / "attacks" / f"{name}.json"
    asked = {"attack": {"name": name, **config.to_dict(attack)}, "seed": seed, "prompts": prompts}
    if path.exists():
        found = json.loads(path.read_text())
        if found["asked"] == asked:
            return path
    named = [p.prompt for p in task.probes if task.names_concept(p)]
    if not named:
        raise UsageError(f"task '{task.name}' has no prompt that names its concept; add probes to it")
    pairs = [(p, s) for s in task.seeds for p in named][: prompts or len(named)]
    model, judge = load(str(folder), device=device, dtype=record["run"]["dtype"]), registry.make("judges", task.judge)
    gallery = Gallery(_original_folder(folder, record), model.sampler)  # type: ignore[attr-defined]
    requests = [Request(p, s) for p, s in pairs]
    gallery.fill(lambda: _original(record, device), requests, 64, progress, "drawing the original")
    items = [Item(prompt=r.prompt, seed=r.seed, picture=gallery.picture(r)[None]) for r in requests]
    log: list[Row] = []

    def note(row: Row) -> None:
        log.append({"step": len(log) + 1, **row})
        if progress:
            progress(f"attacking ({name})", len(log), 0, row)

    with Meter(model.device) as meter:
        verdicts = attack(model, task, judge, items, seed=seed, log=note)
    path.parent.mkdir(exist_ok=True)
    rows = [asdict(v) | {"picture": None} for v in verdicts]
    pictures = path.parent / name
    pictures.mkdir(exist_ok=True)
    shown = [i for i, v in enumerate(verdicts) if v.success and v.adversarial and v.level == "prompt"][:16]
    if shown:
        images = model.sample([verdicts[i].adversarial for i in shown], [verdicts[i].seed for i in shown])  # type: ignore[attr-defined]
        for i, image in zip(shown, images, strict=True):
            rows[i]["picture"] = f"attacks/{name}/{i:03d}.png"
            save_picture(image, folder / str(rows[i]["picture"]))
    write_json(
        path,
        {
            "attack": asked["attack"],
            "asked": asked,
            "access": attack.access,
            "preset": _preset(attack),
            "judge": task.judge,
            "seed": seed,
            "time": {"seconds": meter.seconds},
            "log": log,
            "verdicts": rows,
        },
    )
    return path


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
    batch: int = 64,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Draw what the metrics ask for, once, from the original and the erased model; judge it; write ``results.json``. Returns its path.

    What the machine decides and not the seed (cost) goes to ``cost.json``, so that the same seed gives the same ``results.json``.

    ``metrics`` defaults to the task's suite and ``seeds`` to its seeds; pictures that are there are not drawn again, and nothing is
    done when the results are those of the same request.
    """
    folder = Path(folder)
    record, task = _of(folder)
    if seeds:
        task = replace(task, seeds=tuple(seeds))
    suite = [registry.make("metrics", m) if isinstance(m, str) else m for m in (metrics or task.suite)]
    asked = {
        "metrics": [{"name": kebab(m), "version": m.version, **config.to_dict(m)} for m in suite],
        "seeds": list(task.seeds),
        "steps": steps,
        "guidance": guidance,
        "attacks": {p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "attacks").glob("*.json"))},
        "weights": (record["weights"] or {}).get("sha256"),
    }
    done = folder / "evaluate.json"
    if done.exists() and (folder / "results.json").exists() and json.loads(done.read_text()).get("asked") == asked:
        return folder / "results.json"
    started = time.monotonic()
    erased = load(str(folder), device=device, dtype=record["run"]["dtype"])
    sampler = _sampler(erased.sampler, steps, guidance)  # type: ignore[attr-defined]
    wanted = [r for m in suite for r in m.requests(erased, task)]
    judge = registry.make("judges", task.judge)
    verdicts = {p.stem: [Verdict(**{k: v for k, v in row.items() if k != "picture"}) for row in json.loads(p.read_text())["verdicts"]]
                for p in sorted((folder / "attacks").glob("*.json"))}  # fmt: skip
    sides = []
    for where, model, what, mine in (
        (_original_folder(folder, record), lambda: _original(record, device), "drawing the original", {}),
        (folder, lambda: erased, "drawing the erased", verdicts),
    ):
        gallery = Gallery(where, sampler)
        gallery.fill(model, wanted, batch, progress, what)
        sides.append(GalleryOutputs(gallery, judge, task, record if mine is verdicts else {}, mine))
    differs = not done.exists() and bool(wanted) and not sides[1].gallery.repeats(erased, wanted[0])
    rows: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for metric in suite:
        after = _scores(metric, metric.score(erased, task, sides[1]))
        before = _scores(metric, metric.score(erased, task, sides[0])) if metric.requests(erased, task) else {}
        for name, score in after.items():
            was = before.get(name)
            rows[metric.reproducible].append(
                {
                    "metric": name,
                    "version": metric.version,
                    "config": config.to_dict(metric),
                    **_plain(score),
                    "higher_is_better": metric.higher_is_better,
                    "before": _plain(was) if was else None,
                }
            )
    for side in sides:
        side.annotate()
    done.unlink(missing_ok=True)  # killed from here on, the next evaluation does not take one request's results for another's
    write_json(folder / "results.json", rows[True])
    write_json(folder / "cost.json", rows[False])
    write_json(
        done,
        {
            "asked": asked,
            "original": os.path.relpath(sides[0].gallery.folder, folder.resolve()),
            "sampler": sampler,
            "judge": task.judge,
            "seeds": list(task.seeds),
            "repeat_differs": differs,
            "seconds": time.monotonic() - started,
        },
    )
    return folder / "results.json"


def results(folder: str | Path) -> list[dict[str, Any]]:
    """Every measured row of a run folder: ``results.json``, then ``cost.json``."""
    files = [Path(folder) / "results.json", Path(folder) / "cost.json"]
    return [row for file in files if file.exists() for row in json.loads(file.read_text())]


def _scores(metric: Metric, score: Score | dict[str, Score]) -> dict[str, Score]:
    name = kebab(metric)
    return {name: score} if isinstance(score, Score) else {f"{name}/{k}": v for k, v in score.items()}


def _plain(score: Score) -> dict[str, Any]:
    """As JSON: what is not a number is null."""
    finite = {k: getattr(score, k) if getattr(score, k) == getattr(score, k) else None for k in ("value", "low", "high")}
    return {"value": finite["value"], "n": score.n, "low": finite["low"], "high": finite["high"]}


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
