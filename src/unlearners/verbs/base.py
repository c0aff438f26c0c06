"""What every verb has, and what some share. Everything heavy is imported where a verb needs it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .. import config, listing, registry
from ..errors import UnlearnError, UsageError, unknown

if TYPE_CHECKING:
    from ..base import Task

Result = dict[str, Any]
CUT = {
    "steps": 2,
    "sampler_steps": 4,
    "pool": 2,
    "pictures": 2,
    "keep_pictures": 2,
    "trajectories": 2,
    "timesteps": 2,
    "iterations": 2,
    "evaluations": 2,
    "tries": 2,
    "queries": 2,
    "restarts": 1,
    "budget": 2,
    "epochs": 1,
    "samples": 4,
}
"""what --dry-run lowers the budgets of methods and attacks to"""
OFFLINE = ("ua", "ira", "cra", "ra", "ta", "mia", "pre_asr", "asr", "cost")
"""the metrics that --dry-run computes on the tiny model: those that need nothing from the network"""


@dataclass(frozen=True, kw_only=True)
class Verb(ABC):
    """What every verb has."""

    kind: ClassVar[str] = ""
    """the registered kind whose fields become flags, named by the first word"""
    lists: ClassVar[Sequence[str]] = ()
    """the kinds that --help lists"""
    resumes: ClassVar[bool] = False

    json: bool = False
    """print one JSON object; progress goes to stderr"""
    dry_run: bool = False
    """say what would be done, and try it on the tiny model in a temporary folder"""

    @abstractmethod
    def do(self, part: Any) -> Result:
        """Do it and return what --json prints. ``part`` is the method or attack of the verbs that have one."""

    @abstractmethod
    def say(self, result: Result) -> None:
        """Tell a person about ``result``."""


def start(kind: str, name: str, preset: str, fields: Any) -> Any:
    """A method, attack or export: a preset, then ``fields``, which may name a preset themselves."""
    if not isinstance(fields, Mapping):
        raise UsageError(f"--config must hold 'key: value' lines with the fields of {name}; see 'unlearn show {name}'")
    cls, fields = registry.get(kind, name), dict(fields)
    if kind == "exports":
        return config.build(cls, fields, name)
    inside = fields.pop("preset", "")
    if (preset := preset or str(inside)) and preset not in cls.presets:
        raise unknown(f"preset of {name}", preset, cls.presets)
    return config.build(cls, {**(cls.presets[preset] if preset else {}), **fields}, name)


def device_of(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def record_of(folder: Path) -> dict[str, Any]:
    """run.json of a run folder."""
    file = folder / "run.json"
    if not file.is_file():
        raise UsageError(f"{folder} is not a run folder (it has no run.json); 'unlearn erase' makes them")
    try:
        record: dict[str, Any] = json.loads(file.read_text())
    except ValueError:
        raise UnlearnError(f"{file} is not readable as JSON; delete {folder} and run its 'unlearn erase' again") from None
    return record


def parts_of(record: Mapping[str, Any]) -> tuple[Any, Task]:
    """The method and the task of a recorded run."""
    from ..base import Task

    fields = dict(record["run"]["method"])
    return config.build(registry.get("methods", fields.pop("name")), fields), config.build(Task, record["run"]["task"])


@contextlib.contextmanager
def rehearsal(method: Any = None, task: Task | None = None) -> Iterator[Path]:
    """A temporary run folder: ``method`` (UCE when left out) with its budgets cut, on the tiny model and a few prompts of ``task``.

    The canvas' judge reads the pictures, since it needs nothing from the network. A task of pictures gets the tiny model's own.
    """
    from .. import run, tasks
    from ..base import Data, kebab

    task = task or tasks.from_concept("cup", "object")
    method = method or registry.make("methods", "ga" if task.forget.source else "uce")
    draws = bool(task.probes)
    if task.forget.source and draws and not issubclass(registry.get("targets", "ddpm"), method.needs):  # it reads no pictures, only words
        task = dataclasses.replace(task, forget=Data(), retain=Data(), holdout=Data())
    if task.forget.source:
        with tempfile.TemporaryDirectory() as runs:
            yield run.erase(cut(method), "tiny-ddpm" if draws else "tiny-classifier", rehearsed(draws=draws), runs=runs)
        return
    named = [p for p in task.probes if task.names_concept(p)]
    few = (*named[:2], *[p for p in task.probes if p not in named][:4])
    task = dataclasses.replace(task, probes=few, seeds=task.seeds[:1], judge="canvas:trial=true", suite=OFFLINE)
    small = cut(method)
    with tempfile.TemporaryDirectory() as runs:
        if kebab(method) == "spm_gate":  # it acts on the adapters of another run
            small = dataclasses.replace(small, patch=str(run.erase(cut(registry.make("methods", "spm")), "tiny", task, runs=runs)))
        yield run.erase(small, "tiny", task, runs=runs)


def rehearsed(*, draws: bool = False) -> Task:
    """A task of the tiny models that read pictures: a classifier's, or with ``draws`` a DDPM's."""
    from .. import tasks
    from ..base import Probe

    task = tasks.from_data("tiny", "class=b")
    probes = tuple(Probe(prompt=c, truth={"class": c}) for c in "abcd") if draws else ()
    return dataclasses.replace(task, probes=probes, seeds=(1,), judge="classifier:tiny-classifier", suite=OFFLINE if draws else task.suite)


def cut(part: Any) -> Any:
    """``part`` with every budget lowered, in the parts it holds too."""
    lower: dict[str, Any] = {}
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if dataclasses.is_dataclass(value):
            lower[f.name] = cut(value)
        elif f.name in CUT and value == "auto":
            lower[f.name] = CUT[f.name]
        elif f.name in CUT and type(value) is int:
            lower[f.name] = min(value, CUT[f.name])
        elif f.name == "goal":
            lower[f.name] = -1.0  # random weights know nothing that could be forgotten
        elif f.name in ("patch", "saliency_file"):
            lower[f.name] = ""  # no file of a model fits the tiny one, and none is to be written of it
    return dataclasses.replace(part, **lower)


def described(task: str, concept: Sequence[str], kind: Any, anchor: Sequence[str], preserve: Sequence[str]) -> Task:
    """The task that was named, or else described in words."""
    from .. import tasks

    if task and (kind or anchor or preserve):
        raise UsageError("--kind, --anchor and --preserve describe a --concept; a task has its own, so leave them out")
    return tasks.load(task) if task else tasks.from_concept(concept, kind or "object", anchors=anchor, preserve=preserve)


def automatic(part: Any, spec: str, task: Task) -> Result:
    """What the "auto" fields of a method or attack become for ``task`` on a model like the one at ``spec``: {field: value}.

    The tiny model of the same family and layout stands for it, so nothing is loaded.
    """
    from ..base import chosen, require, settle
    from ..targets import family_of, root

    base, _, family, _ = root(spec)
    target = registry.get("targets", family or family_of(base)).tiny_like(base)
    require(part, target)
    return chosen(part, settle(part, target, task))


def print_chosen(chosen: Mapping[str, Any]) -> None:
    """Say what ``automatic`` chose."""
    if chosen:
        print("settings chosen by kind of concept and family of model (numbers that go by the weights are the tiny model's here):")
    for name, value in chosen.items():
        print(f"  {name}: {listing.short(value)}")


def here(spec: str) -> str:
    """A path made absolute; anything else, such as a hub name, as it is."""
    return str(Path(spec).resolve()) if spec and Path(spec).exists() else spec


def cost(record: Mapping[str, Any]) -> str:
    """What an erasure changed and took, for a person."""
    return f"{len(record['weights']['changed'])} tensors, {record['weights']['bytes'] / 1e6:.1f} MB, {record['time']['seconds']:.1f} s"


def print_table(results: Sequence[Mapping[str, Any]]) -> None:
    """Metrics with their intervals, before and after."""

    def cell(score: Mapping[str, Any] | None) -> str:
        if not score or score["value"] is None:
            return "-"
        ends = [score.get("low"), score.get("high")]
        return f"{score['value']:.4g}" + ("" if None in ends else f"  [{ends[0]:.4g}, {ends[1]:.4g}]")

    rows = [
        {"metric": r["metric"], "": "↑" if r["higher_is_better"] else "↓", "before": cell(r["before"]), "after": cell(r), "n": r["n"]}
        for r in results
    ]
    print_grid(rows)


def print_grid(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table whose columns are the first row's keys."""
    from rich.console import Console
    from rich.table import Table

    if rows:
        table = Table(*rows[0], box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        Console(soft_wrap=True, markup=False, highlight=False).print(table)
