"""What 'unlearn patch' does with files: apply them to a base, and combine them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import imports, patch
from .errors import UsageError
from .exports.diffusers import Diffusers
from .patch import Modules, Patch
from .targets import load
from .targets.stable_diffusion import StableDiffusion


def applied(files: Sequence[str], out: Path, *, target: str, strength: float, force: bool, dtype: str) -> dict[str, Any]:
    """Write ``target`` with the patches as a diffusers folder. ``RefusedError`` where one does not fit; nothing is written then."""
    model = load(target, dtype=dtype)
    if not isinstance(model, StableDiffusion):
        raise UsageError(f"'unlearn patch apply' writes diffusers folders, and {target} is a {type(model).__name__}; use 'unlearn erase'")
    read = [imports.read(imports.file(f), model.modules, model.base["sha256"]) for f in files]
    patch.apply_all(model.modules, model.base["sha256"], read, scale=strength, force=force)
    Diffusers(dtype=dtype).write(model, out)  # type: ignore[arg-type]
    return {"out": str(out), "patches": len(read), "tensors": len({k for p in read for k in p.tensors})}


def combined(what: str, args: Sequence[str], out: Path, *, target: str, force: bool, dtype: str) -> dict[str, Any]:
    """Write the patch that ``what`` ("scale", "stack" or "subtract") makes of files; returns ``imports.facts`` of it and "out"."""
    names = args[:1] if what == "scale" else args
    factor = _number(args[1]) if what == "scale" else 1.0
    model = load(target, dtype=dtype) if target else None
    modules: Modules = model.modules if model else {}
    base = model.base["sha256"] if model else {}
    read = [_read(f, modules, base) for f in names]
    for p in read:
        if model:
            patch.check(p, modules, base, force=force)
    if not model and _needs_base(what, read):
        raise UsageError(f"'unlearn patch {what}' needs the weights that these patches were made for; give them with --target")
    made: Patch
    if what == "scale":
        made = patch.scaled(patch.to_delta(read[0], modules) if model else read[0], factor)
    else:
        made = patch.stack(read, modules) if what == "stack" else patch.without(read[0], read[1], modules)
    file = out if out.suffix == ".safetensors" else out / "weights.safetensors"
    patch.save(made, file)
    return {"out": str(file), **{k: v for k, v in imports.facts(file).items() if k != "file"}}


def _read(spec: str, modules: Modules, base: dict[str, str]) -> Patch:
    path = imports.file(spec)
    if modules or patch.is_patch(path):
        return imports.read(path, modules, base)
    raise UsageError(f"{path} was made by others and does not say for what; name the base with --target")


def _needs_base(what: str, read: Sequence[Patch]) -> bool:
    """Whether the values of the base go into the result."""
    values = all(p.kind == "value" for p in read)
    if what == "scale":
        return values
    if what == "stack":
        return not values or len({k for p in read for k in p.tensors}) < sum(len(p.tensors) for p in read)
    whole, part = read
    shared = part.tensors.keys() & whole.tensors.keys()
    return not values or not all(whole.tensors[k].equal(part.tensors[k]) for k in shared)


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"'{word}' is no factor; write for example: unlearn patch scale FILE 0.5 --out HALF.safetensors")
    return number
