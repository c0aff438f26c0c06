"""Grids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tyro.conf import Positional

from .base import Result, Verb, device_of, print_grid, rehearsal, start


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

        from .. import tasks
        from ..bench import bench
        from ..grids import cells, read

        if self.dry_run:
            todo = cells(read(self.grid))
            for task, cell in {p.cell.label or p.cell.name: (p.task, p.cell) for p in todo}.values():
                with rehearsal(start("methods", cell.name, cell.preset, cell.fields), tasks.load(task)):
                    pass
            return {"dry_run": True, "cells": [{"task": p.task, "method": p.label, "seed": p.seed} for p in todo]}
        device = device_of(self.device) if self.device else ""
        where = {"runs": self.runs or "", "results": self.results or "", "device": device}
        how: Result = {"select": self.select, "check": self.check, "executor": self.executor, "jobs": self.jobs, "gpus": self.gpus}
        return bench(self.grid, console=Console(stderr=True), **(how | where))

    def say(self, result: Result) -> None:
        if self.dry_run:
            print_grid(result["cells"])
            print(f"would do these {len(result['cells'])} runs; tried each method on the tiny model")
        else:
            for line in result["failed"]:
                print(f"failed: {line}")
            for file in filter(None, (result["selected"], result["results"], *result["tables"])):
                print(f"→ {file}")
