"""Tensors that can be made again, in files of the cache folder: read only when whole and of what is asked for, and bounded in size."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import cache, replacing

FOLDER_GB = 10.0  # of all files of one kind together; the longest unused are dropped


def place(kind: str, key: str) -> Path:
    """The file of what ``key``, a content hash, stands for."""
    return cache(kind) / f"{key[:32]}.safetensors"


def read(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors, mapped and not copied, and what was noted with them; None when the file is not there, not whole, or not of ``key``."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError):
        return None
    if about.get("sum") != _sum(tensors):
        return None
    path.touch()
    return tensors, about


def write(path: Path, key: str, tensors: Mapping[str, Tensor], **noted: str) -> None:
    """Write the file whole or not at all, and drop the longest unused of its folder when they are too many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        save_file(dict(tensors), draft, {"key": key, "sum": _sum(tensors), **noted})
    with os.scandir(path.parent) as entries:
        others = [(e.stat().st_mtime, e.stat().st_size, e.path) for e in entries if e.name.endswith(".safetensors") and e.path != str(path)]
    left = FOLDER_GB * 1e9 - path.stat().st_size
    for _, size, name in sorted(others, reverse=True):  # the newest may stay
        left -= size
        if left < 0:
            Path(name).unlink(missing_ok=True)


def _sum(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of all values: one pass over the file, some seconds for gigabytes."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
