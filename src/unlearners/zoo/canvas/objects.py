"""The canvas as a labelled dataset: its twelve objects in photo style, 32×32, for classifiers and class-conditional diffusion."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .world import OBJECTS, Item, render

CLASSES = tuple(OBJECTS)
SIDE = 32
COUNTS = {"train": 6000, "test": 1200}
FIRST = {"train": 8_000_000_000, "test": 8_100_000_000}  # render seeds, disjoint from all others


def objects(split: str) -> tuple[Tensor, Tensor]:
    """uint8 pictures (N, 3, 32, 32) and class indices (N,) into ``CLASSES``, which repeat in order; drawn once, then cached."""
    name = f"canvas-objects-{SIDE}-{split}-{COUNTS[split]}"
    pictures = kept(name)
    if pictures is None:
        pictures = np.stack([picture(FIRST[split] + i, i % len(CLASSES)) for i in range(COUNTS[split])])
        keep(pictures, name)
    return torch.from_numpy(pictures), torch.arange(COUNTS[split]) % len(CLASSES)


def picture(seed: int, label: int) -> np.ndarray:
    """One picture, uint8 (3, 32, 32): the 64×64 render reduced with a box filter."""
    return np.asarray(render(seed, Item(object=CLASSES[label])).reduce(2)).transpose(2, 0, 1)


def kept(name: str) -> np.ndarray | None:
    """What ``keep`` has kept under ``name``; None when there is nothing."""
    path = _home() / f"{name}.npy"
    return np.load(path) if path.exists() else None


def keep(pictures: np.ndarray, name: str) -> None:
    """Cache ``pictures`` under ``name``."""
    path = _home() / f"{name}.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as draft:
            np.save(draft, pictures)
        Path(draft.name).replace(path)
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else


def _home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unlearners"
