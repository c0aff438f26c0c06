"""Targets: loaded models. ``load`` finds the family of a spec."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import registry
from ..base import Target
from ..errors import UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    spec: str, *, patches: Sequence[str] = (), device: str = "cpu", dtype: str = "float32", family: str = "", force: bool = False
) -> Target:
    """Load ``spec``: an alias (``canvas``, ``tiny``), a hub id, a local diffusers folder, a single file, or a run folder.

    A run folder loads what it was made from, then its patch. ``family`` is a registered target class; when empty the run
    folder says it, else ``stable_diffusion``. ``force`` applies patches made for another base of the same shape.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    record = Path(spec) / "run.json"
    if record.is_file():
        run = json.loads(record.read_text())
        own = Path(spec) / "weights.safetensors"
        stack = [*run["run"]["patches"], *([str(own)] if own.exists() else []), *patches]
        return load(run["run"]["target"], patches=stack, device=device, dtype=dtype, family=run["family"], force=force)
    kind: type[Target] = registry.get("targets", family or "stable_diffusion")
    if spec == "tiny":
        target = kind.tiny()
        target.patch(patches, force=force)
        return target
    return kind.load(spec, patches=patches, device=device, dtype=DTYPES[dtype], force=force)
