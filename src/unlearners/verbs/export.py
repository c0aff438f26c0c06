"""Handing on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tyro.conf import Positional

from .base import Result, Verb, parts_of, record_of, rehearsal


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
        from ..exports import export, left_behind

        out = self.out or self.folder / "export" / self.format
        if self.dry_run:
            with rehearsal(*parts_of(record_of(self.folder))) as folder:
                export(part, folder)
            return {"dry_run": True, "out": str(out)}
        path = export(part, self.folder, out)
        lost = left_behind(self.folder)
        return {"out": str(path), **part.about(path), **({"warning": lost} if lost else {})}

    def say(self, result: Result) -> None:
        for name, value in result.items():
            if name not in ("out", "dry_run"):
                print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
        print(f"would write {result['out']}; tried on the tiny model" if self.dry_run else f"→ {result['out']}")
