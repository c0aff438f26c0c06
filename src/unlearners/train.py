"""Train the original: a fresh architecture on labelled pictures, into a folder that ``targets.load`` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import config, data, nets
from .base import Data, Row, Task, kebab
from .errors import UsageError
from .files import locked, write_json
from .meter import Meter
from .methods.retrain import Retrain
from .session import FolderSession, Progress, environment
from .targets.classifier import Classifier
from .targets.ddpm import DDPM, DDPM_CIFAR


def train(
    architecture: str,
    source: Data,
    *,
    out: str | Path,
    method: Retrain | None = None,
    seed: int = 0,
    dtype: str = "float32",
    side: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Train ``architecture`` (see ``nets.build``, or "ddpm_cifar") on the pictures ``source`` names; returns the
    model's folder ``out``. ``side``, ``mean`` and ``std`` of pictures are the architecture's usual ones when 0 and empty.

    The recipe is that of ``retrain``, so the original and the reference that never saw the forget set are trained alike. A finished
    folder is returned as it is; a killed one resumes. Raises ``UsageError`` when ``out`` holds another model.
    """
    method, out, source = method or Retrain(), Path(out), source.at(seed)
    asked = {"architecture": architecture, "data": config.to_dict(source), "method": config.to_dict(method), "seed": seed, "dtype": dtype}
    asked |= {k: v for k, v in (("side", side), ("mean", list(mean)), ("std", list(std))) if v}
    record = out / "train.json"
    if not record.exists() and ((out / "config.json").exists() or (out / "model_index.json").exists()):
        raise UsageError(f"{out} holds a model that 'unlearn train' did not write; give another --out")
    if record.exists():
        found = json.loads(record.read_text())
        if found["asked"] != asked:
            raise UsageError(f"{out} holds a model that was trained otherwise; give another --out")
        if found["status"] == "done":
            return out
    with locked(out):
        return _train(out, asked, source, method, device, progress)


def _train(out: Path, asked: dict[str, Any], source: Data, method: Retrain, device: str, progress: Progress | None) -> Path:
    """``train`` into a folder that this process holds."""
    from .targets import DTYPES

    architecture, seed, record = asked["architecture"], asked["seed"], out / "train.json"
    row = {"asked": asked, "status": "running", "env": environment(device)}
    write_json(record, row)
    own: dict[str, Any] = {k: asked[k] for k in ("side", "mean", "std") if k in asked}
    told = replace(source, augment=method.augment) if method.augment else source
    family = DDPM if architecture.partition(":")[0] == DDPM_CIFAR else Classifier
    opened = data.open_data(told, int(own.get("side") or nets.defaults(architecture)["side"]), device, family.augmentation)
    how: dict[str, Any] = {"device": device, "dtype": DTYPES[asked["dtype"]], **own}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target: Classifier | DDPM = family.fresh(architecture, opened.classes, **how)
    target.session = session = FolderSession(out, progress)
    task = Task(name="train", kind="samples", concepts=("nothing",), retain=source)
    log: Callable[[Row], None] = session.write
    with Meter(target.device) as meter:
        method(target, task, seed=seed, log=log)
    seen: dict[str, Any] = {"source": source.source, "digest": opened.digest, "seed": source.seed, "validation": source.validation}
    seen |= {"subset": source.subset, "augment": opened.augmentation}
    target.save(out, trained_on=seen)
    write_json(record, row | {"status": "done", "family": kebab(target), "n": len(opened), "time": {"seconds": meter.seconds}})
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return out
