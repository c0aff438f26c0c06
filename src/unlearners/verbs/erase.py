"""Erasing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro
from tyro.conf import Positional

from .. import listing
from ..errors import UsageError
from .base import Result, Verb, automatic, cost, described, device_of, here, print_chosen, print_table, record_of, rehearsal

if TYPE_CHECKING:
    from ..base import Task


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
    utility: tuple[str, ...] = ()
    """named pictures of other domains, one folder for each name, that must still be named right, beside --test"""
    names: str = ""
    """a text file, one name a line: names that the pictures of --test, or of a task for a CLIP, may be taken for beside their own"""
    validation: float = 0.0
    """share of --data that the model did not see in training"""
    split_seed: int | Literal["run"] | None = None
    """seed of what random= takes and of the validation share, also of a task's; run: random= takes what --seed says; 0 when left out"""
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
        from .. import run
        from ..banks import banked
        from ..base import Run
        from ..targets import absolute

        task = self.wanted().at(self.seed)
        task = banked(task, self.names) if self.names else task
        if self.dry_run:
            patches = tuple(str(Path(p).resolve()) for p in self.patches)
            plan = Run(target=absolute(self.target), task=task, method=part, seed=self.seed, dtype=self.dtype, patches=patches)
            chosen = automatic(part, self.target, task)
            with rehearsal(part, task) as folder:
                tried = record_of(folder)
            folder = self.out or self.runs / plan.folder
            return {"dry_run": True, "folder": str(folder), "run": plan.plain, "chosen": chosen, "tried": tried}
        where: Result = {"out": self.out, "runs": self.runs, "device": device_of(self.device), "force": self.force}
        with run.progress_bars() as bars:
            folder = run.erase(part, self.target, task, seed=self.seed, dtype=self.dtype, patches=self.patches, progress=bars, **where)
            if self.evaluate:
                run.evaluate(folder, device=device_of(self.device), progress=bars)
        return {"folder": str(folder), **record_of(folder), "results": run.results(folder) if self.evaluate else None}

    def wanted(self) -> Task:
        """The task that was named or described."""
        from .. import tasks

        if bool(self.task) + bool(self.concept) + bool(self.data or (self.forget and not self.concept)) != 1:
            raise UsageError(
                "say what to erase in one way: a task ('unlearn list tasks'), --concept \"some text\", or --data PICTURES --forget WHICH"
            )
        if self.concept and (self.forget or self.retain or self.test):
            if not (self.forget and self.retain):
                raise UsageError("--forget and --retain name captioned pictures of the concept and of other things; give both")
            if self.utility and not self.test:
                raise UsageError("--utility names pictures of other domains beside --test; give --test too")
            return tasks.from_pairs(
                self.concept, self.concept_kind or "object", here(self.forget), here(self.retain), test=here(self.test),
                utility=tuple(here(u) for u in self.utility),
                anchors=self.anchor, preserve=self.preserve, **({"validation": self.validation} if self.validation else {}),
            )  # fmt: skip
        if self.utility:
            raise UsageError("--utility names pictures of other domains beside --concept, --forget, --retain and --test; give all of them")
        if self.data or self.forget:
            if not (self.data and self.forget):
                raise UsageError("--data names the training pictures and --forget which of them to forget; give both")
            return tasks.from_data(here(self.data), self.forget, seed=self.split_seed or 0, validation=self.validation)
        named = described(self.task, self.concept, self.concept_kind, self.anchor, self.preserve)
        if self.validation:
            raise UsageError("--validation is of --data; a task says itself what is held back, and words have no pictures, so leave it out")
        if self.split_seed is not None and not named.forget.source:
            raise UsageError("--split-seed is of pictures, and this task names none; leave it out")
        return tasks.reseeded(named, self.split_seed)

    def say(self, result: Result) -> None:
        if self.dry_run:
            print(f"would run {listing.settings(result['run']['method'])}")
            print_chosen(result["chosen"])
            print(f"to erase {', '.join(result['run']['task']['concepts'])} from {self.target} into {result['folder']}")
            print(f"tried two steps on the tiny model: {cost(result['tried'])}")
        else:
            print(f"erased {', '.join(result['run']['task']['concepts'])} with {self.method}: {cost(result)}")
            for line in result["warnings"]:
                print(f"warning: {line}")
            print_table(result["results"] or [])
            print(f"→ {result['folder']}")
