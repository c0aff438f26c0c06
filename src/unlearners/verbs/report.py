"""Reporting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ..errors import UsageError
from .base import Result, Verb, rehearsal


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
        from ..report import report

        if self.show_images and self.no_images:
            raise UsageError("--show-images and --no-images contradict each other; give one of them")
        images = True if self.show_images else False if self.no_images else None
        if not self.folders:
            raise UsageError("name at least one run folder, for example: unlearn report runs")
        if missing := [f for f in self.folders if not f.is_dir()]:
            raise UsageError(f"there is no folder {missing[0]}; 'unlearn erase' makes run folders")
        if self.dry_run:
            with rehearsal() as folder:
                report([folder], images=images)
            return {"dry_run": True, "folders": [str(f) for f in self.folders]}
        return {"file": str(report(self.folders, images=images))}

    def say(self, result: Result) -> None:
        print(f"would report on {', '.join(result['folders'])}; tried on the tiny model" if self.dry_run else f"→ {result['file']}")
