"""Arithmetic with patches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from ..errors import UsageError
from .base import Result, Verb, rehearsal


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
        from .. import imports, patches

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
            with rehearsal():
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
