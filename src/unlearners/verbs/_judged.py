"""What attack and evaluate share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..errors import UsageError
from .base import Result, Verb, described, device_of, parts_of, record_of

if TYPE_CHECKING:
    from ..base import Task


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
        return described(self.task, self.concept, self.concept_kind, (), self.preserve)

    def planned(self, folder: Path) -> tuple[Path, Any, Task]:
        """The run folder, and its method and task; nothing is made."""
        task = self.foreign(folder)
        if task is None:
            return folder, *parts_of(record_of(folder))
        from ..adopt import plan

        run = plan(folder, task, base=self.base, dtype=self.dtype or "float32")
        return self.runs / run.folder, run.method, task

    def found(self, folder: Path, device: str, progress: Any) -> Path:
        """The run folder, which is made for a model of others."""
        task = self.foreign(folder)
        if task is None:
            return folder
        from ..adopt import adopt

        how: Result = {"base": self.base, "runs": self.runs, "dtype": self.dtype or "float32", "device": device_of(device)}
        return adopt(folder, task, progress=progress, **how)

    def adopted(self, folder: Path, result: Result) -> None:
        """Say where the run of a model of others is."""
        if result["folder"] != str(folder):
            print(f"{folder} is now a run: {result['folder']}")
