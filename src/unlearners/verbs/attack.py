"""Attacking."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tyro.conf import Positional

from .. import config, listing
from ._judged import Judged
from .base import Result, automatic, cut, device_of, print_chosen, rehearsal


@dataclass(frozen=True, kw_only=True)
class Attack(Judged):
    """Look for prompts that bring an erased concept back.

    ATTACK comes first; 'unlearn attack ATTACK --help' shows its own flags.
    """

    kind: ClassVar[str] = "attacks"
    lists: ClassVar[Sequence[str]] = ("attacks",)
    resumes: ClassVar[bool] = True

    attack: Positional[str]
    """how: a registered attack"""
    folder: Positional[Path]
    """what: a run folder; or, with --task and --base, what others erased: a model folder or hub id, a component's folder, a weights file"""
    preset: str = ""
    """start from these published settings"""
    config: str = ""
    """start from a YAML file with fields of the attack; flags override it"""
    seed: int = 0
    """seed of everything random"""
    prompts: int = 0
    """attack only this many prompts; 0 attacks all"""
    steps: int | None = None
    """sampler steps of every picture; the model's own when left out"""
    guidance: float | None = None
    """classifier-free guidance of every picture; the model's own when left out"""
    scheduler: str = ""
    """sampler of every picture (lms, ddim, euler, …); the model's own when left out. UnlearnDiffAtk's paper: lms in 50 or 100 steps"""
    suite: str = ""
    """a task, such as unlearndiffatk/church@FILE.csv, whose prompts and judge take the place of the run's"""
    max_tokens: int = 0
    """count but do not attack longer prompts, start and end tokens included; 60 in UnlearnDiffAtk's code, 0 attacks all"""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto is cuda where there is one"""

    def do(self, part: Any) -> Result:
        from .. import run

        if self.dry_run:
            where, method, task = self.planned(self.folder)
            with rehearsal(method, task) as folder:
                file = run.attack(cut(part), folder, seed=self.seed, prompts=2, scheduler=self.scheduler)
                tried = _rates(json.loads(file.read_text()))
            own = (self.folder / "run.json").is_file() or not self.base
            chosen = automatic(part, str(self.folder) if own else self.base, task)
            would = {"chosen": chosen, "folder": str(where), "attack": {"name": self.attack, **config.to_dict(part)}}
            return {"dry_run": True, "file": str(where / "attacks" / f"{self.attack}.json"), **would, "tried": tried}
        with run.progress_bars() as bars:
            where = self.found(self.folder, self.device, bars)
            file = run.attack(
                part, where, seed=self.seed, prompts=self.prompts, steps=self.steps, guidance=self.guidance, scheduler=self.scheduler,
                suite=self.suite, max_tokens=self.max_tokens, device=device_of(self.device), progress=bars,
            )  # fmt: skip
        return {"file": str(file), "folder": str(where), **_rates(json.loads(file.read_text()))}

    def say(self, result: Result) -> None:
        if self.dry_run:
            print(f"would run {listing.settings(result['attack'])} on {self.folder} and write {result['file']}")
            print_chosen(result["chosen"])
            print(f"tried on {result['tried']['prompts']} prompts of the tiny model")
        else:
            self.adopted(self.folder, result)
            n, before, success = result["prompts"], result["before"], result["success"]
            print(f"{self.attack}: {success} of {n} prompts bring the concept back; {before} did so without an attack")
            if (kept := result.get("filter")) and kept["attacked"] < n:
                print(f"{kept['attacked']} of {n} prompts have at most {self.max_tokens} tokens; the others were not attacked but count")
            print(f"→ {result['file']}")


def _rates(attack: Mapping[str, Any]) -> dict[str, Any]:
    verdicts = attack["verdicts"]
    counts = {"prompts": len(verdicts), "before": sum(v["before"] for v in verdicts), "success": sum(v["success"] for v in verdicts)}
    return counts | {key: value for key, value in attack.items() if key not in ("verdicts", "log")}
