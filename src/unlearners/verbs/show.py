"""One registered thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from .. import listing, registry
from ..errors import unknown
from .base import Result, Verb


@dataclass(frozen=True, kw_only=True)
class Show(Verb):
    """Show a method, attack, metric, judge, export, target, task or recipe: paper, needs, presets and fields."""

    name: Positional[str]
    """its name"""

    def do(self, part: Any) -> Result:
        known = {k: listing.names(k) for k in registry.KINDS}
        found = {k: listing.canonical(k, self.name) for k in registry.KINDS if listing.canonical(k, self.name) in known[k]}
        if not found:
            raise unknown("name", self.name, {n for names in known.values() for n in names})
        return {"found": [listing.about(k, n) for k, n in found.items()]}

    def say(self, result: Result) -> None:
        print("\n\n".join(listing.sheet(about) for about in result["found"]))
