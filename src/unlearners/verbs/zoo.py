"""The bundled models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from .base import Result, Verb, print_grid, rehearsal


@dataclass(frozen=True, kw_only=True)
class Zoo(Verb):
    """Measure the bundled models again; exit 1 when one falls short of what its card claims."""

    what: Positional[Literal["verify"]]
    """what to do with them"""
    write: bool = False
    """rewrite the zoo card with what was measured"""

    def do(self, part: Any) -> Result:
        if self.dry_run:
            with rehearsal():
                return {"dry_run": True, "rows": [], "short": []}
        from ..run import progress_bars
        from ..zoo.canvas.verify import verify

        with progress_bars() as bars:
            return verify(progress=bars, write=self.write)

    def say(self, result: Result) -> None:
        if self.dry_run:
            print("would draw the grid with the bundled model and read it with the judge and CLIP; tried an erasure on the tiny model")
        print_grid(result["rows"])
        for line in result["short"]:
            print(f"short: {line}")
