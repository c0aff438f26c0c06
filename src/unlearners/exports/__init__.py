"""Formats in which an erased model leaves: one file each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Export(ABC):
    """A format. ``reads`` says which programs take it."""

    reads: ClassVar[str] = ""

    @abstractmethod
    def run(self, folder: Path, out: Path) -> Path:
        """Write what is in run folder ``folder`` to ``out`` and return the path to hand over."""

    def about(self, path: Path) -> dict[str, Any]:
        """What is worth saying of ``path``, which ``run`` has written."""
        return {}


def export(format: str | Export, folder: str | Path, out: str | Path = "", **fields: Any) -> Path:
    """Export a finished run folder; ``out`` defaults to ``<folder>/export/<format>``. Raises ``UsageError`` for an unfinished run and for
    one whose method changes no weights."""
    from .. import registry
    from ..targets import read_run

    chosen = registry.make("exports", format, **fields) if isinstance(format, str) else format
    record = read_run(folder)
    if (status := record["status"]) != "done":
        raise UsageError(f"the erasure in {folder} is {status}; finish it with the same 'unlearn erase' before exporting")
    if (name := record["run"]["method"]["name"]) == record.get("guide"):
        base = record["run"]["target"]
        raise UsageError(f"{name} changed no weights, so there is nothing to export beyond {base}; use the run folder with unlearners.load")
    where = Path(out) if out else Path(folder) / "export" / type(chosen).__module__.rpartition(".")[2]
    where.parent.mkdir(parents=True, exist_ok=True)
    return chosen.run(Path(folder), where)


def left_behind(folder: str | Path) -> str:
    """What of a finished run no exported file can hold, in one sentence; "" where nothing is lost."""
    from ..targets import read_run

    guide = read_run(folder).get("guide")
    if not guide:
        return ""
    return f"{guide} acts while pictures are drawn and is not in these weights; open the run folder with unlearners.load to keep it"
