"""What there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from .. import listing, registry
from ..errors import unknown
from .base import Result, Verb


@dataclass(frozen=True, kw_only=True)
class List(Verb):
    """List what there is."""

    what: Positional[str] = ""
    """methods, attacks, metrics, judges, exports, targets, tasks or recipes; all of them when left out"""

    def do(self, part: Any) -> Result:
        if self.what and self.what not in registry.KINDS:
            raise unknown("kind", self.what, registry.KINDS)
        kinds = (self.what,) if self.what else registry.KINDS
        return {k: [{"name": n, "summary": about} for n, about in listing.known(k).items()] for k in kinds}

    def say(self, result: Result) -> None:
        print("\n\n".join(listing.lines(k, {row["name"]: row["summary"] for row in rows}) for k, rows in result.items()))
