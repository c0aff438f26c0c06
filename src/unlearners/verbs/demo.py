"""The demonstration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .base import Result, Verb, print_grid, rehearsal


@dataclass(frozen=True, kw_only=True)
class Demo(Verb):
    """Erase a style and an object from the bundled model, attack, evaluate and report: a few minutes on two cores."""

    resumes: ClassVar[bool] = True

    out: Path = Path("runs/demo")
    """where it goes"""
    seed: int = 0
    """seed of everything random"""

    def do(self, part: Any) -> Result:
        if self.dry_run:
            from ..report import report

            with rehearsal() as folder:
                report([folder], images=False)
            return {"dry_run": True, "out": str(self.out)}
        from ..demo import demo

        return dict(demo(self.out, seed=self.seed, progress=True))

    def say(self, result: Result) -> None:
        if self.dry_run:
            print(f"would erase, attack, evaluate and report into {self.out}; tried an erasure and its report on the tiny model")
        else:
            short = {"ua": "UA", "ira": "IRA", "cra": "CRA", "asr/random_tokens": "ASR random", "asr/unlearndiffatk": "ASR UDA"}
            print_grid([{"task": r["task"], "method": r["method"], **{v: r[k] for k, v in short.items()}} for r in result["rows"]])
            print(f"→ {result['report']}")
