"""Targets: loaded models. ``load`` finds the family of a spec."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import config, registry
from ..base import Target, Task
from ..errors import RefusedError, UsageError
from .stable_diffusion import split

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(spec: str, *, patches: Sequence[str] = (), device: str = "cpu", dtype: str = "", family: str = "", force: bool = False) -> Target:
    """Load ``spec``: an alias (``canvas``, ``tiny``), a hub id, a local diffusers folder, a single file, or a run folder.

    A run folder loads the model at its root, then its patch, then the guide of a method that acts at generation time. ``dtype`` and
    ``family`` (a registered target class) are the run folder's when empty, else ``float32`` and ``stable_diffusion``. ``force`` applies
    patches made for another base of the same shape.
    """
    run = read_run(spec)["run"] if is_run(spec) else {}
    dtype = dtype or run.get("dtype", "float32")
    if dtype not in DTYPES:
        raise UsageError(f"there is no dtype '{dtype}'; choose {', '.join(DTYPES)}")
    base, stack, family, forced = root(spec, family)
    kind: type[Target] = registry.get("targets", family or family_of(base))
    target = kind.load(base, patches=[*stack, *weighed(patches)], device=device, dtype=DTYPES[dtype], force=force or forced)
    put_guide(target, guide_run(spec))
    return target


def family_of(spec: str) -> str:
    """The registered family that claims ``spec``; Stable Diffusion, which also reads hub ids, when none does."""
    names = [n for n in registry.names("targets") if n != "stable_diffusion"]
    return next((n for n in names if registry.get("targets", n).claims(spec)), "stable_diffusion")


def aliases() -> list[str]:
    """The names that stand for a model, of all families."""
    return sorted({a for n in registry.names("targets") for a in registry.get("targets", n).aliases})


def is_run(spec: str | Path) -> bool:
    """Whether ``spec`` is a run folder."""
    return (Path(spec) / "run.json").is_file()


def read_run(folder: str | Path) -> dict[str, Any]:
    """The run record of a folder; ``UsageError`` when it is none, ``RefusedError`` when it is damaged."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no run folder (it has no run.json); give a folder that 'unlearn erase' wrote")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sound = {"status", "hash", "run", "family"} <= record.keys()
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise RefusedError(f"{path} is damaged; run the erasure again in another folder")
    return record  # type: ignore[no-any-return]


def root(spec: str, family: str = "") -> tuple[str, list[str], str, bool]:
    """What lies below a run folder: the model, the patches on it, its family, and whether they were forced onto it.

    A run's own patch holds all that changed since that model, so one patch is enough however many runs lie between.
    """
    if not is_run(spec):
        return spec, [], family, False
    record = read_run(spec)
    base, below, family, forced = root(record["run"]["target"], family or record["family"])
    own = Path(spec) / "weights.safetensors"
    if own.is_file():
        return base, [str(own)], family, False
    return base, [*below, *record["run"]["patches"]], family, forced or record["force"]


def weighed(patches: Sequence[str]) -> Sequence[str]:
    """``patches`` as they are; ``RefusedError`` for a run folder without weights, such as that of a method that changes none."""
    for patch in patches:
        if is_run(patch) and not (Path(patch) / "weights.safetensors").is_file():
            raise RefusedError(f"the run in {patch} has no weights to apply as a patch; give the folder as the target instead")
    return patches


def guide_run(spec: str) -> dict[str, Any] | None:
    """The record of the run, ``spec`` or one below it, whose method acts at generation time; there is at most one."""
    if not is_run(spec):
        return None
    record = read_run(spec)
    return record if record.get("guide") == record["run"]["method"]["name"] else guide_run(record["run"]["target"])


def put_guide(target: Target, record: Mapping[str, Any] | None) -> None:
    """Run the method of ``guide_run`` again on ``target``."""
    if record is None:
        return
    run = record["run"]
    fields = {k: v for k, v in run["method"].items() if k != "name"}
    registry.make("methods", run["method"]["name"], **fields)(target, config.build(Task, run["task"]), seed=run["seed"])


def absolute(spec: str) -> str:
    """``spec`` with local paths made absolute; aliases and hub ids as they are, also where a folder has the same name."""
    if spec in aliases():
        return spec
    file, at, name = spec.rpartition("@")
    if at and Path(file).is_file() and not Path(name).exists():  # a checkpoint and its architecture
        return f"{Path(file).resolve()}@{name}"
    return "@".join(str(Path(p).resolve()) if p and Path(p).exists() else p for p in split(spec)).removesuffix("@")
