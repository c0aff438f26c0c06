"""The verbs of the command line: dataclasses whose fields are flags. Everything heavy is imported where a verb needs it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro
from tyro.conf import Positional

from . import config, listing, registry
from .errors import UnlearnError, UsageError, unknown

if TYPE_CHECKING:
    from .base import Task

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


# --- the verbs ----------------------------------------------------------------------------------------------------
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


@dataclass(frozen=True, kw_only=True)
class List(Verb):
    """List what there is."""

    what: Positional[str] = ""
    """methods, attacks, metrics, judges, exports, targets or tasks; all of them when left out"""

    def do(self, part: Any) -> Result:
        if self.what and self.what not in registry.KINDS:
            raise unknown("kind", self.what, registry.KINDS)
        kinds = (self.what,) if self.what else registry.KINDS
        return {k: [{"name": n, "summary": about} for n, about in listing.known(k).items()] for k in kinds}

    def say(self, result: Result) -> None:
        print("\n\n".join(listing.lines(k, {row["name"]: row["summary"] for row in rows}) for k, rows in result.items()))


@dataclass(frozen=True, kw_only=True)
class Show(Verb):
    """Show a method, attack, metric, judge, export, target or task: paper, needs, presets and fields."""

    name: Positional[str]
    """its name"""

    def do(self, part: Any) -> Result:
        known = {k: list(listing.known(k)) for k in registry.KINDS}
        found = {k: listing.canonical(k, self.name) for k in registry.KINDS if listing.canonical(k, self.name) in known[k]}
        if not found:
            raise unknown("name", self.name, {n for names in known.values() for n in names})
        return {"found": [listing.about(k, n) for k, n in found.items()]}

    def say(self, result: Result) -> None:
        print("\n\n".join(listing.sheet(about) for about in result["found"]))


@dataclass(frozen=True, kw_only=True)
class Erase(Verb):
    """Erase a concept, a class or single pictures from a model and write what changed into a run folder. Stopped? The same command resumes.

    METHOD comes first; 'unlearn erase METHOD --help' shows its own flags. What to erase is a task ('unlearn list tasks'), text
    (--concept), or training pictures (--data and --forget).
    """

    kind: ClassVar[str] = "methods"
    lists: ClassVar[Sequence[str]] = ("methods",)
    resumes: ClassVar[bool] = True

    method: Positional[str]
    """how: a registered method"""
    target: Positional[str]
    """from what: an alias (canvas, canvas-classifier, canvas-ddpm), hub id, model folder, weights file, FILE@ARCHITECTURE, or run folder"""
    task: Positional[str] = ""
    """what: a registered task or a YAML file; or use --concept"""
    concept: tuple[str, ...] = ()
    """what, in words, in place of a task"""
    concept_kind: Annotated[Literal["style", "object", "identity", "nsfw"] | None, tyro.conf.arg(name="kind")] = None
    """what --concept is; object when left out"""
    anchor: tuple[str, ...] = ()
    """what takes the place of --concept, one for all or one for each; by its kind when left out"""
    preserve: tuple[str, ...] = ()
    """what must stay beside --concept; by its kind when left out"""
    data: str = ""
    """the pictures a classifier was trained on: a folder with one folder per class, a dataset's folder, or a hub name"""
    forget: str = ""
    """which of --data to forget: class=NAME, random=0.1, or a text file with one row number or file name a line; beside --concept, for a
    CLIP, captioned pictures of it: a folder, webdataset tars, a dataset, or draw:PIPELINE"""
    retain: str = ""
    """captioned pictures of other things, beside --concept and --forget"""
    test: str = ""
    """named pictures to measure on, one folder for each name, beside --concept and --forget"""
    validation: float = 0.0
    """share of --data that the model did not see in training"""
    split_seed: int = 0
    """seed of what random= draws and of the validation share"""
    evaluate: bool = False
    """measure the result at once and print the table"""
    preset: str = ""
    """start from these published settings"""
    config: str = ""
    """start from a YAML file with fields of the method; flags override it"""
    seed: int = 0
    """seed of everything random"""
    out: Path | None = None
    """the run folder; named by its content under --runs when left out"""
    runs: Path = Path("runs")
    """where run folders go"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """numbers of the model"""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto is cuda where there is one"""
    force: bool = False
    """apply patches made for another base of the same shape"""
    patches: tuple[str, ...] = ()
    """run folders or patch files to apply first, in order"""

    def do(self, part: Any) -> Result:
        from . import run
        from .base import Run
        from .targets import absolute

        task = self.wanted()
        if self.dry_run:
            patches = tuple(str(Path(p).resolve()) for p in self.patches)
            plan = Run(target=absolute(self.target), task=task, method=part, seed=self.seed, dtype=self.dtype, patches=patches)
            with _rehearsal(part, task) as folder:
                tried = _record(folder)
            return {"dry_run": True, "folder": str(self.out or self.runs / plan.folder), "run": plan.plain, "tried": tried}
        where: Result = {"out": self.out, "runs": self.runs, "device": _device(self.device), "force": self.force}
        with run.progress_bars() as bars:
            folder = run.erase(part, self.target, task, seed=self.seed, dtype=self.dtype, patches=self.patches, progress=bars, **where)
            if self.evaluate:
                run.evaluate(folder, device=_device(self.device), progress=bars)
        return {"folder": str(folder), **_record(folder), "results": run.results(folder) if self.evaluate else None}

    def wanted(self) -> Task:
        """The task that was named or described."""
        from . import tasks

        if bool(self.task) + bool(self.concept) + bool(self.data or (self.forget and not self.concept)) != 1:
            raise UsageError(
                "say what to erase in one way: a task ('unlearn list tasks'), --concept \"some text\", or --data PICTURES --forget WHICH"
            )
        if self.concept and (self.forget or self.retain or self.test):
            if not (self.forget and self.retain):
                raise UsageError("--forget and --retain name captioned pictures of the concept and of other things; give both")
            return tasks.from_pairs(
                self.concept, self.concept_kind or "object", _here(self.forget), _here(self.retain), test=_here(self.test),
                anchors=self.anchor, preserve=self.preserve, **({"validation": self.validation} if self.validation else {}),
            )  # fmt: skip
        if self.data or self.forget:
            if not (self.data and self.forget):
                raise UsageError("--data names the training pictures and --forget which of them to forget; give both")
            return tasks.from_data(_here(self.data), self.forget, seed=self.split_seed, validation=self.validation)
        return _described(self.task, self.concept, self.concept_kind, self.anchor, self.preserve)

    def say(self, result: Result) -> None:
        if self.dry_run:
            print(f"would run {listing.settings(result['run']['method'])}")
            print(f"to erase {', '.join(result['run']['task']['concepts'])} from {self.target} into {result['folder']}")
            print(f"tried two steps on the tiny model: {_cost(result['tried'])}")
        else:
            print(f"erased {', '.join(result['run']['task']['concepts'])} with {self.method}: {_cost(result)}")
            for line in result["warnings"]:
                print(f"warning: {line}")
            _table(result["results"] or [])
            print(f"→ {result['folder']}")


@dataclass(frozen=True, kw_only=True)
class Train(Verb):
    """Train a classifier from scratch into a model folder: an original to erase from. Stopped? The same command resumes."""

    resumes: ClassVar[bool] = True

    architecture: Positional[str]
    """resnet18_cifar, resnet20_cifar, resnet50_cifar, vgg16_bn_cifar, swin_t_cifar, torchvision/NAME or timm/NAME"""
    data: Positional[str]
    """a folder with one folder per class, a dataset's folder, or a hub name; "canvas" is bundled"""
    out: Path
    """the model folder"""
    preset: str = "paper"
    """the recipe: a preset of retrain"""
    validation: float = 0.0
    """share of each class that is held back"""
    split_seed: int = 0
    """seed of what is held back"""
    seed: int = 0
    """seed of the weights and the order of pictures"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what the network computes in; weights are float32"""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto is cuda where there is one"""

    def do(self, part: Any) -> Result:
        from . import run
        from .base import Data
        from .targets.classifier import Classifier
        from .train import train

        method = registry.make("methods", "retrain", preset=self.preset)
        where = str(Path(self.data).resolve()) if Path(self.data).exists() else self.data
        source = Data(source=where, validation=self.validation, seed=self.split_seed)
        if self.dry_run:
            with _rehearsal(method, _rehearsed()):
                Classifier.fresh(self.architecture, ("a", "b"))
            return {"dry_run": True, "out": str(self.out), "method": config.to_dict(method)}
        with run.progress_bars() as bars:
            how: Result = {"seed": self.seed, "dtype": self.dtype, "device": _device(self.device), "progress": bars}
            train(self.architecture, source, out=self.out, method=method, **how)
        return {"folder": str(self.out), **json.loads((self.out / "train.json").read_text())}

    def say(self, result: Result) -> None:
        if self.dry_run:
            print(f"would train {self.architecture} on {self.data} into {result['out']}; tried two steps of the recipe on the tiny model")
        else:
            print(f"trained {self.architecture} on {result['n']} pictures in {result['time']['seconds']:.0f} s")
            print(f"→ {result['folder']}")


@dataclass(frozen=True, kw_only=True)
class Judged(Verb):
    """What the verbs have that look at an erased model: a run folder, or the model of somebody else, which is made one first."""

    base: str = ""
    """for a model of others: what it was before the erasure, as 'unlearn erase' takes it; whole models can do without"""
    task: str = ""
    """for a model of others: the task it was made to forget, a registered one or a YAML file; or use --concept"""
    concept: tuple[str, ...] = ()
    """for a model of others: what it was made to forget, in words, in place of a task"""
    concept_kind: Annotated[Literal["style", "object", "identity", "nsfw"] | None, tyro.conf.arg(name="kind")] = None
    """what --concept is; object when left out"""
    preserve: tuple[str, ...] = ()
    """what had to stay beside --concept; by its kind when left out"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """for a model of others: its numbers; float32 when left out"""
    runs: Path = Path("runs")
    """where the run folder of a model of others goes"""

    def foreign(self, folder: Path) -> Task | None:
        """What a model of others was made to forget; None when ``folder`` is a run."""
        given = {"base": self.base, "task": self.task, "concept": self.concept, "kind": self.concept_kind}
        named = [k for k, v in {**given, "preserve": self.preserve, "dtype": self.dtype}.items() if v]
        if (folder / "run.json").is_file():
            if named:
                raise UsageError(f"{folder} is a run folder, which says itself what was erased from what; leave --{named[0]} out")
            return None
        if bool(self.task) + bool(self.concept) != 1:
            raise UsageError(
                f"{folder} is no run folder, which 'unlearn erase' makes; if others erased it, say what it was made to forget in one way: "
                "--task ('unlearn list tasks') or --concept \"some text\""
            )
        return _described(self.task, self.concept, self.concept_kind, (), self.preserve)

    def planned(self, folder: Path) -> tuple[Path, Any, Task]:
        """The run folder, and its method and task; nothing is made."""
        task = self.foreign(folder)
        if task is None:
            return folder, *_parts(_record(folder))
        from .adopt import plan

        run = plan(folder, task, base=self.base, dtype=self.dtype or "float32")
        return self.runs / run.folder, run.method, task

    def found(self, folder: Path, device: str, progress: Any) -> Path:
        """The run folder, which is made for a model of others."""
        task = self.foreign(folder)
        if task is None:
            return folder
        from .adopt import adopt

        how: Result = {"base": self.base, "runs": self.runs, "dtype": self.dtype or "float32", "device": _device(device)}
        return adopt(folder, task, progress=progress, **how)

    def adopted(self, folder: Path, result: Result) -> None:
        """Say where the run of a model of others is."""
        if result["folder"] != str(folder):
            print(f"{folder} is now a run: {result['folder']}")


@dataclass(frozen=True, kw_only=True)
class Attack(Judged):
    """Look for prompts that bring an erased concept back.

    ATTACK comes first; 'unlearn attack ATTACK --help' shows its own flags.
    """

    kind: ClassVar[str] = "attacks"
    lists: ClassVar[Sequence[str]] = ("attacks",)
    resumes: ClassVar[bool] = True

    attack: Positional[str]
    """how: a registered attack"""
    folder: Positional[Path]
    """what: a run folder; or, with --task and --base, what others erased: a model folder or hub id, a component's folder, a weights file"""
    preset: str = ""
    """start from these published settings"""
    config: str = ""
    """start from a YAML file with fields of the attack; flags override it"""
    seed: int = 0
    """seed of everything random"""
    prompts: int = 0
    """attack only this many prompts; 0 attacks all"""
    steps: int | None = None
    """sampler steps of every picture; the model's own when left out"""
    guidance: float | None = None
    """classifier-free guidance of every picture; the model's own when left out"""
    suite: str = ""
    """a task, such as unlearndiffatk/church@FILE.csv, whose prompts and judge take the place of the run's"""
    max_tokens: int = 0
    """count but do not attack longer prompts, start and end tokens included; 60 in UnlearnDiffAtk's code, 0 attacks all"""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto is cuda where there is one"""

    def do(self, part: Any) -> Result:
        from . import run

        if self.dry_run:
            where, method, task = self.planned(self.folder)
            with _rehearsal(method, task) as folder:
                file = run.attack(_cut(part), folder, seed=self.seed, prompts=2)
                tried = _rates(json.loads(file.read_text()))
            would = {"folder": str(where), "attack": {"name": self.attack, **config.to_dict(part)}}
            return {"dry_run": True, "file": str(where / "attacks" / f"{self.attack}.json"), **would, "tried": tried}
        with run.progress_bars() as bars:
            where = self.found(self.folder, self.device, bars)
            file = run.attack(
                part, where, seed=self.seed, prompts=self.prompts, steps=self.steps, guidance=self.guidance,
                suite=self.suite, max_tokens=self.max_tokens, device=_device(self.device), progress=bars,
            )  # fmt: skip
        return {"file": str(file), "folder": str(where), **_rates(json.loads(file.read_text()))}

    def say(self, result: Result) -> None:
        if self.dry_run:
            print(f"would run {listing.settings(result['attack'])} on {self.folder} and write {result['file']}")
            print(f"tried on {result['tried']['prompts']} prompts of the tiny model")
        else:
            self.adopted(self.folder, result)
            n, before, success = result["prompts"], result["before"], result["success"]
            print(f"{self.attack}: {success} of {n} prompts bring the concept back; {before} did so without an attack")
            if (kept := result.get("filter")) and kept["attacked"] < n:
                print(f"{kept['attacked']} of {n} prompts have at most {self.max_tokens} tokens; the others were not attacked but count")
            print(f"→ {result['file']}")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Judged):
    """Generate pictures once and measure a run, or a model that others erased, with all metrics of its task."""

    lists: ClassVar[Sequence[str]] = ("metrics",)
    resumes: ClassVar[bool] = True

    folder: Positional[Path]
    """what: a run folder; or, with --task and --base, what others erased: a model folder or hub id, a component's folder, a weights file"""
    metrics: tuple[str, ...] = ()
    """metrics to compute, with fields where they are wanted (fid:reference=FOLDER); those of the task when left out"""
    suite: str = ""
    """a task, such as i2p or coco@FILE.csv, whose prompts, seeds, judge and metrics take the place of the run's (suites/NAME.json)"""
    seeds: int = 0
    """how many pictures of each prompt: with the seeds of the task, then with the numbers after its largest; 0 takes those of the task"""
    steps: int = 0
    """sampling steps; 0 takes the model's own"""
    guidance: float | None = None
    """classifier-free guidance; the model's own when left out"""
    references: tuple[Path, ...] = ()
    """run folders of models that never saw the forget set, such as retrain's: the membership attack rmia needs them"""
    split: Literal["test", "validation"] = "test"
    """measure on the test pictures, or on held-out training pictures (validation.json)"""
    batch: int = 64
    """pictures sampled at once"""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto is cuda where there is one"""

    def do(self, part: Any) -> Result:
        from . import run, tasks

        metrics = [listing.canonical("metrics", name) + colon + rest for name, colon, rest in (m.partition(":") for m in self.metrics)]
        for name in metrics:
            registry.path("metrics", name.partition(":")[0])  # an unknown name is said before anything is loaded
        where, method, task = self.planned(self.folder)
        task = tasks.load(self.suite) if self.suite else task
        how: Result = {"guidance": self.guidance, "batch": self.batch}
        if self.dry_run:
            tried = [m for m in metrics or task.suite if m in OFFLINE]
            with _rehearsal(method, task) as folder:
                run.evaluate(folder, metrics=tried, steps=2, **how)
                rows = run.results(folder)
            return {"dry_run": True, "file": str(where / "results.json"), "metrics": metrics or list(task.suite), "tried": rows}
        more = range(max(task.seeds) + 1, max(task.seeds) + 1 + self.seeds)
        seeds = (*task.seeds, *more)[: self.seeds] if self.seeds else None
        how |= {"metrics": metrics or None, "seeds": seeds, "steps": self.steps or None, "device": _device(self.device)}
        with run.progress_bars() as bars:
            where = self.found(self.folder, self.device, bars)
            file = run.evaluate(where, progress=bars, references=self.references, split=self.split, suite=self.suite, **how)
        rows = run.results(where) if self.split == "test" and not self.suite else json.loads(file.read_text())
        return {"file": str(file), "folder": str(where), "results": rows, "plot": _plotted(rows, file)}

    def say(self, result: Result) -> None:
        if self.dry_run:
            print(f"would measure {', '.join(result['metrics'])} and write {result['file']}")
            print("tried on the tiny model, where the numbers mean nothing:")
        else:
            self.adopted(self.folder, result)
        _table(result["tried"] if self.dry_run else result["results"])
        if not self.dry_run:
            for file in filter(None, (result["plot"], result["file"])):
                print(f"→ {file}")


@dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Write what is known about one or more runs: report.html, README.md and results.csv."""

    folders: Positional[tuple[Path, ...]]
    """run folders, or folders of run folders"""
    show_images: bool = False
    """put pictures into the report, however many, also those of sensitive tasks"""
    no_images: bool = False
    """leave pictures out"""

    def do(self, part: Any) -> Result:
        from .report import report

        if self.show_images and self.no_images:
            raise UsageError("--show-images and --no-images contradict each other; give one of them")
        images = True if self.show_images else False if self.no_images else None
        if not self.folders:
            raise UsageError("name at least one run folder, for example: unlearn report runs")
        if missing := [f for f in self.folders if not f.is_dir()]:
            raise UsageError(f"there is no folder {missing[0]}; 'unlearn erase' makes run folders")
        if self.dry_run:
            with _rehearsal() as folder:
                report([folder], images=images)
            return {"dry_run": True, "folders": [str(f) for f in self.folders]}
        return {"file": str(report(self.folders, images=images))}

    def say(self, result: Result) -> None:
        print(f"would report on {', '.join(result['folders'])}; tried on the tiny model" if self.dry_run else f"→ {result['file']}")


@dataclass(frozen=True, kw_only=True)
class Export(Verb):
    """Write an erased model in a format that other programs load.

    FORMAT comes first; 'unlearn export FORMAT --help' shows its own flags.
    """

    kind: ClassVar[str] = "exports"
    lists: ClassVar[Sequence[str]] = ("exports",)

    format: Positional[str]
    """the format"""
    folder: Positional[Path]
    """the run folder to export"""
    out: Path | None = None
    """where to write; export/FORMAT in the run folder when left out"""

    def do(self, part: Any) -> Result:
        from .exports import export

        out = self.out or self.folder / "export" / self.format
        if self.dry_run:
            with _rehearsal(*_parts(_record(self.folder))) as folder:
                export(part, folder)
            return {"dry_run": True, "out": str(out)}
        path = export(part, self.folder, out)
        return {"out": str(path), **part.about(path)}

    def say(self, result: Result) -> None:
        for name, value in result.items():
            if name not in ("out", "dry_run"):
                print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
        print(f"would write {result['out']}; tried on the tiny model" if self.dry_run else f"→ {result['out']}")


@dataclass(frozen=True, kw_only=True)
class Patch(Verb):
    """Look at patches, the files of what an erasure changed, and do arithmetic with them.

    show FILE, apply FILES --target BASE --out FOLDER, scale FILE FACTOR --out FILE, stack FILES --out FILE, subtract FILE PART
    --out FILE.
    """

    what: Positional[Literal["show", "apply", "scale", "stack", "subtract"]]
    """show one; apply some to a base and write a diffusers folder; make one stronger or weaker; several as one; one without a part of it"""
    args: Positional[tuple[str, ...]]
    """run folders, patches, or files of others; for scale also the factor, after --out"""
    target: str = ""
    """the untouched base; apply needs it, and the others where the values they were made of are needed, which is said"""
    out: Path | None = None
    """what to write"""
    strength: float = 1.0
    """with apply: how much of each change"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """with apply: numbers of the model"""
    force: bool = False
    """take patches made for another base of the same shape"""

    def do(self, part: Any) -> Result:
        from . import imports, patches

        counts = {"show": (1, 1), "apply": (1, 0), "scale": (2, 2), "stack": (1, 0), "subtract": (2, 2)}
        least, most = counts[self.what]
        if len(self.args) < least or (most and len(self.args) > most):
            raise UsageError(f"'unlearn patch {self.what}' takes {least}{'' if most else ' or more'}, not {len(self.args)}; see --help")
        if self.what == "show":
            return imports.facts(imports.file(self.args[0]))
        if self.out is None:
            raise UsageError(f"say with --out what 'unlearn patch {self.what}' is to write")
        if self.what == "apply" and not self.target:
            raise UsageError("say with --target what to apply the patches to")
        if self.dry_run:
            with _rehearsal():
                return {"dry_run": True, "out": str(self.out)}
        how: Result = {"target": self.target, "force": self.force, "dtype": self.dtype}
        if self.what == "apply":
            return patches.applied(self.args, self.out, strength=self.strength, **how)
        return patches.combined(self.what, self.args, self.out, **how)

    def say(self, result: Result) -> None:
        if self.dry_run and "dry_run" in result:
            print(f"would write {result['out']}; tried an erasure on the tiny model")
            return
        for name, value in result.items():
            if name != "out":
                print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")
        if "out" in result:
            print(f"→ {result['out']}")


@dataclass(frozen=True, kw_only=True)
class Bench(Verb):
    """Do all runs of a grid; what is done is skipped, what died resumes. Tables with the published numbers are written beside."""

    resumes: ClassVar[bool] = True

    grid: Positional[Path]
    """a YAML grid"""
    select: bool = False
    """first choose among each sweep's values on the validation split, and run only the chosen ones on all seeds"""
    check: bool = False
    """compare with the grid's thresholds, and fail where one is missed"""
    executor: Literal["local", "ray"] = "local"
    """where runs are done: on this machine, or by Ray (joins RAY_ADDRESS, or starts itself here)"""
    jobs: int = 0
    """runs at once; left out: one, in this process, or with Ray as many as there are cores"""
    gpus: float = 0.0
    """with Ray, what a run takes of a GPU: 0.5 puts two on one; 0 goes by the grid"""
    device: str = ""
    """cpu, cuda, cuda:1 … or auto; that of the grid when left out"""
    runs: Path | None = None
    """where run folders go; runs/NAME when left out"""
    results: Path | None = None
    """where the tables go; results/NAME beside the grid when left out"""

    def do(self, part: Any) -> Result:
        from rich.console import Console

        from . import tasks
        from .bench import bench, cells, read

        if self.dry_run:
            todo = cells(read(self.grid))
            for task, cell in {cell.label or cell.name: (task, cell) for task, _, cell, _, _ in todo}.values():
                with _rehearsal(start("methods", cell.name, cell.preset, cell.fields), tasks.load(task)):
                    pass
            return {"dry_run": True, "cells": [{"task": task, "method": label, "seed": seed} for task, label, _, _, seed in todo]}
        device = _device(self.device) if self.device else ""
        where = {"runs": self.runs or "", "results": self.results or "", "device": device}
        how: Result = {"select": self.select, "check": self.check, "executor": self.executor, "jobs": self.jobs, "gpus": self.gpus}
        return bench(self.grid, console=Console(stderr=True), **(how | where))

    def say(self, result: Result) -> None:
        if self.dry_run:
            _grid(result["cells"])
            print(f"would do these {len(result['cells'])} runs; tried each method on the tiny model")
        else:
            for line in result["failed"]:
                print(f"failed: {line}")
            for file in filter(None, (result["selected"], result["results"], *result["tables"])):
                print(f"→ {file}")


@dataclass(frozen=True, kw_only=True)
class Demo(Verb):
    """Erase a style and an object from the bundled model, attack, evaluate and report: a few minutes on two cores."""

    resumes: ClassVar[bool] = True

    out: Path = Path("runs/demo")
    """where it goes"""
    seed: int = 0
    """seed of everything random"""

    def do(self, part: Any) -> Result:
        if self.dry_run:
            from .report import report

            with _rehearsal() as folder:
                report([folder], images=False)
            return {"dry_run": True, "out": str(self.out)}
        from .demo import demo

        return dict(demo(self.out, seed=self.seed, progress=True))

    def say(self, result: Result) -> None:
        if self.dry_run:
            print(f"would erase, attack, evaluate and report into {self.out}; tried an erasure and its report on the tiny model")
        else:
            short = {"ua": "UA", "ira": "IRA", "cra": "CRA", "asr/random_tokens": "ASR random", "asr/unlearndiffatk": "ASR UDA"}
            _grid([{"task": r["task"], "method": r["method"], **{v: r[k] for k, v in short.items()}} for r in result["rows"]])
            print(f"→ {result['report']}")


@dataclass(frozen=True, kw_only=True)
class Zoo(Verb):
    """Measure the bundled models again; exit 1 when one falls short of what its card claims."""

    what: Positional[Literal["verify"]]
    """what to do with them"""
    write: bool = False
    """rewrite the zoo card with what was measured"""

    def do(self, part: Any) -> Result:
        if self.dry_run:
            with _rehearsal():
                return {"dry_run": True, "rows": [], "short": []}
        from .run import progress_bars
        from .zoo.canvas.verify import verify

        with progress_bars() as bars:
            return verify(progress=bars, write=self.write)

    def say(self, result: Result) -> None:
        if self.dry_run:
            print("would draw the grid with the bundled model and read it with the judge and CLIP; tried an erasure on the tiny model")
        _grid(result["rows"])
        for line in result["short"]:
            print(f"short: {line}")


VERBS: dict[str, type[Verb]] = {
    "list": List, "show": Show, "train": Train, "erase": Erase, "attack": Attack, "evaluate": Evaluate, "report": Report, "export": Export,
    "patch": Patch, "bench": Bench, "demo": Demo, "zoo": Zoo,
}  # fmt: skip


# --- what the verbs share -----------------------------------------------------------------------------------------
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


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _record(folder: Path) -> dict[str, Any]:
    """run.json of a run folder."""
    file = folder / "run.json"
    if not file.is_file():
        raise UsageError(f"{folder} is not a run folder (it has no run.json); 'unlearn erase' makes them")
    try:
        record: dict[str, Any] = json.loads(file.read_text())
    except ValueError:
        raise UnlearnError(f"{file} is not readable as JSON; delete {folder} and run its 'unlearn erase' again") from None
    return record


def _parts(record: Mapping[str, Any]) -> tuple[Any, Task]:
    """The method and the task of a recorded run."""
    from .base import Task

    fields = dict(record["run"]["method"])
    return config.build(registry.get("methods", fields.pop("name")), fields), config.build(Task, record["run"]["task"])


@contextlib.contextmanager
def _rehearsal(method: Any = None, task: Task | None = None) -> Iterator[Path]:
    """A temporary run folder: ``method`` (UCE when left out) with its budgets cut, on the tiny model and a few prompts of ``task``.

    The canvas' judge reads the pictures, since it needs nothing from the network. A task of pictures gets the tiny model's own.
    """
    from . import run, tasks

    task = task or tasks.from_concept("cup", "object")
    if task.forget.source:
        with tempfile.TemporaryDirectory() as runs:
            tiny = "tiny-ddpm" if task.probes else "tiny-classifier"
            yield run.erase(_cut(method or registry.make("methods", "ga")), tiny, _rehearsed(draws=bool(task.probes)), runs=runs)
        return
    named = [p for p in task.probes if task.names_concept(p)]
    few = (*named[:2], *[p for p in task.probes if p not in named][:4])
    task = dataclasses.replace(task, probes=few, seeds=task.seeds[:1], judge="canvas", suite=OFFLINE)
    with tempfile.TemporaryDirectory() as runs:
        yield run.erase(_cut(method or registry.make("methods", "uce")), "tiny", task, runs=runs)


def _rehearsed(*, draws: bool = False) -> Task:
    """A task of the tiny models that read pictures: a classifier's, or with ``draws`` a DDPM's."""
    from . import tasks
    from .base import Probe

    task = tasks.from_data("tiny", "class=b")
    probes = tuple(Probe(prompt=c, truth={"class": c}) for c in "abcd") if draws else ()
    return dataclasses.replace(task, probes=probes, seeds=(1,), judge="classifier:tiny-classifier", suite=OFFLINE if draws else task.suite)


def _cut(part: Any) -> Any:
    """``part`` with every budget lowered, in the parts it holds too."""
    lower: dict[str, Any] = {}
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if dataclasses.is_dataclass(value):
            lower[f.name] = _cut(value)
        elif f.name in CUT and type(value) is int:
            lower[f.name] = min(value, CUT[f.name])
        elif f.name == "goal":
            lower[f.name] = -1.0  # random weights know nothing that could be forgotten
        elif f.name == "patch":
            lower[f.name] = ""  # no patch of a model fits the tiny one
    return dataclasses.replace(part, **lower)


def _described(task: str, concept: Sequence[str], kind: Any, anchor: Sequence[str], preserve: Sequence[str]) -> Task:
    """The task that was named, or else described in words."""
    from . import tasks

    if task and (kind or anchor or preserve):
        raise UsageError("--kind, --anchor and --preserve describe a --concept; a task has its own, so leave them out")
    return tasks.load(task) if task else tasks.from_concept(concept, kind or "object", anchors=anchor, preserve=preserve)


def _here(spec: str) -> str:
    """A path made absolute; anything else, such as a hub name, as it is."""
    return str(Path(spec).resolve()) if spec and Path(spec).exists() else spec


def _plotted(rows: Sequence[Mapping[str, Any]], file: Path) -> str | None:
    """Draw the counts of body parts beside the results they are from, where they were measured; the file's name."""
    if not any(row["metric"].startswith("nudenet_counts/") for row in rows):
        return None
    from .files import write_text
    from .plots import body_parts, standalone

    path = file.with_suffix(".svg")
    write_text(path, standalone(body_parts(rows, "parts")))
    return str(path)


def _rates(attack: Mapping[str, Any]) -> dict[str, Any]:
    verdicts = attack["verdicts"]
    counts = {"prompts": len(verdicts), "before": sum(v["before"] for v in verdicts), "success": sum(v["success"] for v in verdicts)}
    return counts | {key: value for key, value in attack.items() if key not in ("verdicts", "log")}


def _cost(record: Mapping[str, Any]) -> str:
    return f"{len(record['weights']['changed'])} tensors, {record['weights']['bytes'] / 1e6:.1f} MB, {record['time']['seconds']:.1f} s"


def _table(results: Sequence[Mapping[str, Any]]) -> None:
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
    _grid(rows)


def _grid(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table whose columns are the first row's keys."""
    from rich.console import Console
    from rich.table import Table

    if rows:
        table = Table(*rows[0], box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        Console(soft_wrap=True, markup=False, highlight=False).print(table)
