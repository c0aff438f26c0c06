"""A grid of methods × tasks × seeds × settings: what its YAML file may say, and the runs it stands for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import config, registry, tables, tasks
from .base import Data
from .errors import UsageError

REFERENCE = "retrain"
"""the method that Avg. Gap is measured to, and whose recipe trains originals"""
GAP = ("ua", "ra", "ta", "mia")
"""what Avg. Gap is the mean over"""


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
    target: str = ""
    """for a method: another target than the grid's"""
    of: str = ""
    """for plug and spm_gate: the label of the method whose weights are put on, as trained for the same task and seed"""
    metrics: tuple[str, ...] = ()
    """for a method: what is measured of it; the grid's metrics when empty"""
    prompts: int = 0
    """for an attack: how many prompts; 0 takes all that name the concept once"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A threshold: the mean of ``metric`` over the grid's rows of ``method`` and ``tasks`` is at least or at most so much."""

    metric: str
    method: str
    tasks: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise UsageError(f"the check of {self.metric} of {self.method} compares with nothing; give at_least or at_most")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The original model of a grid, trained once for each seed with the recipe of ``retrain``."""

    architecture: str
    data: Data
    preset: str = "paper"
    """of retrain"""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """of retrain"""
    label: str = ""
    """what the tables call it; the architecture when empty"""
    side: int = config.later(0)
    """height and width of pictures; the architecture's usual one when 0"""
    mean: tuple[float, ...] = config.later(())
    std: tuple[float, ...] = config.later(())
    """what pictures are normalised with; the architecture's usual ones when empty"""

    @property
    def pictures(self) -> dict[str, Any]:
        """What ``train.train`` is told of the pictures' form."""
        return {k: v for k, v in (("side", self.side), ("mean", self.mean), ("std", self.std)) if v}


@dataclass(frozen=True, kw_only=True)
class Select:
    """How ``--select`` chooses among a sweep's values, task by task: on the validation split, with the first seed."""

    metrics: tuple[str, ...] = GAP
    """what is measured"""
    objective: Literal["gap", "max", "min", "best"] = "gap"
    """smallest mean distance to retrain, largest or smallest mean, or largest mean with 100 - value of metrics that are better low"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What ``unlearn bench`` runs."""

    name: str
    target: str = ""
    """what the methods are run on; canvas when it is empty and nothing is trained"""
    train: Train | None = None
    """train the original first; in a file also the name of a recipe ('unlearn list recipes')"""
    tasks: tuple[str, ...]
    methods: tuple[Cell, ...]
    attacks: tuple[Cell, ...] = ()
    metrics: tuple[str, ...] = ()
    """empty: each task's suite"""
    seeds: tuple[int, ...] = (0,)
    split_seed: int | Literal["run"] | None = config.later(None)
    """seed of the split and of the forget sets of all tasks, in place of their own; "run": each seed has a forget set of its own"""
    references: int = config.later(0)
    """for metrics that want models which never saw the forget set: for each seed so many more of the reference method, with other seeds of
    the grid; 0 takes those that the grid has anyway"""
    image_seeds: int = 0
    """pictures for each prompt; 0 takes all of the task's seeds"""
    image_steps: int | None = None
    """sampler steps of each picture; the model's own when left out"""
    image_scheduler: str = ""
    """sampler of each picture, such as lms; the model's own when left out"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    gpus: float = 0.0
    """what a run takes of a GPU with --executor ray: 0.5 puts two on one"""
    select: Select = Select()
    published: tuple[str, ...] = ()
    """tables of published.yaml, beside the grid, to compare with"""
    checks: tuple[Check, ...] = ()
    claims: tuple[tables.Claim, ...] = ()
    """what papers say of two methods; the tables say whether it holds here"""

    def __post_init__(self) -> None:
        if self.train and self.target:
            raise UsageError(f"grid {self.name} has a target and also trains one; take out 'target' or 'train'")
        if not self.seeds or not self.tasks or not self.methods:
            raise UsageError(f"grid {self.name} has nothing to run; give it at least one task, method and seed")


class Planned(NamedTuple):
    """One run of a grid."""

    task: str
    label: str
    cell: Cell
    fields: dict[str, Any]
    seed: int
    forgets: int | None = None
    """the seed of what is forgotten, where it is another run's"""

    @property
    def drawn(self) -> int:
        """The seed of what is forgotten."""
        return self.seed if self.forgets is None else self.forgets


Chosen = Mapping[tuple[str, str], Mapping[str, Any]]  # (task, label) → the swept fields' values
Candidate = tuple[Planned, Mapping[str, Any]]  # a run to choose from, under its plain label, and the swept fields' values


def cells(grid: Grid, chosen: Chosen | None = None) -> list[Planned]:
    """Every run of a grid; with ``chosen`` a sweep is only its chosen values, under the plain label."""
    out: list[Planned] = []
    for cell in grid.methods:
        label = cell.label or cell.name
        if chosen is not None and cell.sweep:
            pairs = [(t, chosen[t, label]) for t in cell.tasks or grid.tasks if (t, label) in chosen]
            out += [Planned(t, label, cell, {**cell.fields, **values}, seed) for t, values in pairs for seed in grid.seeds]
            continue
        for values in points(cell):
            name = label + (f"[{written(values)}]" if values else "")
            for task, seed in itertools.product(cell.tasks or grid.tasks, grid.seeds):
                out.append(Planned(task, name, cell, {**cell.fields, **values}, seed))
    return out


def points(cell: Cell) -> list[dict[str, Any]]:
    """Every combination of a sweep's values; one empty one without a sweep."""
    return [dict(zip(cell.sweep, values, strict=True)) for values in itertools.product(*cell.sweep.values())]


def written(values: Mapping[str, Any]) -> str:
    """``lr=0.1,alpha=2``."""
    return ",".join(f"{k}={v}" for k, v in values.items())


def read(path: str | Path) -> Grid:
    """A grid file, checked as far as that is possible before anything runs. Raises ``UsageError``."""
    path = Path(path)
    plain = {"name": path.stem, **config.load_yaml(path)}
    if isinstance(plain.get("train"), str):
        plain["train"] = config.load_yaml(registry.path("recipes", plain["train"]))
    spec: Grid = config.build(Grid, plain, where=str(path))
    if spec.train and isinstance(spec.split_seed, int):
        spec = replace(spec, train=replace(spec.train, data=replace(spec.train.data, seed=spec.split_seed)))
    every = {*spec.tasks, *(t for c in (*spec.methods, *spec.attacks) for t in c.tasks)}
    named = {t: tasks.reseeded(tasks.load(t), spec.split_seed) for t in every}
    for kind, parts in (("methods", spec.methods), ("attacks", spec.attacks)):
        for cell in parts:
            for values in points(cell):
                made(kind, cell, {**cell.fields, **values, **({"patch": cell.of} if cell.of else {})})
    for metric in (*spec.metrics, *(m for c in spec.methods for m in c.metrics)):
        registry.path("metrics", metric)
    seen = set()
    for task, label, cell, _, seed, _ in cells(spec):
        if (task, label, seed) in seen:
            raise UsageError(f"two methods of grid {spec.name} are called '{label}' on {task}; give {cell.name} a 'label' of its own")
        seen.add((task, label, seed))
    for cell in spec.methods:
        if bool(cell.of) != (cell.name in ("plug", "spm_gate")):
            raise UsageError(f"'of' of grid {spec.name} names the run that plug or spm_gate takes; give it to these, and to nothing else")
        for task in cell.tasks or spec.tasks if cell.of else ():
            if (task, cell.of, spec.seeds[0]) not in seen:
                raise UsageError(
                    f"{cell.name} of grid {spec.name} is of '{cell.of}', which is not run on {task}; give the label of a method that is"
                )
    if spec.train:
        recipe(spec.train)
        for name, wanted in named.items():
            one, other = spec.train.data.at(0), wanted.at(0).forget
            if one.source == other.source and (one.seed, one.validation) != (other.seed, other.validation):
                raise UsageError(
                    f"the original is trained on another split than {name} forgets from; give train.data of grid {spec.name} "
                    f"seed {other.seed} and validation {other.validation:g}"
                )
            if one.source == other.source and other.subset and one.subset != other.subset:
                raise UsageError(
                    f"the original is trained on another subset than {name} forgets from; give train.data of grid {spec.name} "
                    f"subset {other.subset}, or take it out of the task, which then has the original's"
                )
    return spec


def made(kind: str, cell: Cell, fields: Mapping[str, Any]) -> Any:
    """The method or attack of a cell with these fields."""
    return registry.make(kind, cell.name, **({"preset": cell.preset} if cell.preset else {}), **fields)


def trained(name: str) -> Train:
    """The recipe called ``name``."""
    made: Train = config.build(Train, config.load_yaml(registry.path("recipes", name)), where=name)
    return made


def recipe(train: Train) -> Any:
    """The method that trains the original."""
    return registry.make("methods", REFERENCE, preset=train.preset, **train.fields)
