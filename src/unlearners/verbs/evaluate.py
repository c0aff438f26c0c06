"""Measuring."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tyro.conf import Positional

from .. import listing, registry
from ._judged import Judged
from .base import OFFLINE, Result, device_of, print_table, rehearsal


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
    scheduler: str = ""
    """sampler of every picture (lms, ddim, euler, …); the model's own when left out"""
    references: tuple[Path, ...] = ()
    """run folders of models that never saw the forget set, such as retrain's: the membership attack rmia needs them"""
    names: str = ""
    """a text file, one name a line: names that test pictures may be taken for beside their own (fa, ta of a CLIP)"""
    split: Literal["test", "validation"] = "test"
    """measure on the test pictures, or on held-out training pictures (validation.json)"""
    batch: int = 64
    """pictures sampled at once"""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto is cuda where there is one"""

    def do(self, part: Any) -> Result:
        from .. import run, tasks
        from ..banks import banked

        metrics = [listing.canonical("metrics", name) + colon + rest for name, colon, rest in (m.partition(":") for m in self.metrics)]
        for name in metrics:
            registry.path("metrics", name.partition(":")[0])  # an unknown name is said before anything is loaded
        where, method, task = self.planned(self.folder)
        task = tasks.load(self.suite) if self.suite else task
        if self.names:
            banked(task, self.names)
        how: Result = {"guidance": self.guidance, "scheduler": self.scheduler, "batch": self.batch}
        if self.dry_run:
            tried = [m for m in metrics or task.suite if m in OFFLINE]
            with rehearsal(method, task) as folder:
                run.evaluate(folder, metrics=tried, steps=2, **how)
                rows = run.results(folder)
            return {"dry_run": True, "file": str(where / "results.json"), "metrics": metrics or list(task.suite), "tried": rows}
        more = range(max(task.seeds) + 1, max(task.seeds) + 1 + self.seeds)
        seeds = (*task.seeds, *more)[: self.seeds] if self.seeds else None
        how |= {
            "names": self.names,
            "metrics": metrics or None,
            "seeds": seeds,
            "steps": self.steps or None,
            "device": device_of(self.device),
        }
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
        print_table(result["tried"] if self.dry_run else result["results"])
        if not self.dry_run:
            for file in filter(None, (result["plot"], result["file"])):
                print(f"→ {file}")


def _plotted(rows: Sequence[Mapping[str, Any]], file: Path) -> str | None:
    """Draw the counts of body parts beside the results they are from, where they were measured; the file's name."""
    if not any(row["metric"].startswith("nudenet_counts/") for row in rows):
        return None
    from ..files import write_text
    from ..plots import body_parts, standalone

    path = file.with_suffix(".svg")
    write_text(path, standalone(body_parts(rows, "parts")))
    return str(path)
