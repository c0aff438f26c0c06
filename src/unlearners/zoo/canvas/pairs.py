"""The canvas at its full size, 64×64, for models that read pictures and texts: pairs with captions, and pictures with names."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .objects import keep, kept
from .world import MASCOTS, OBJECTS, STYLES, Item, caption, grid, official, render

FIRST = {"train": 8_200_000_000, "validation": 8_300_000_000, "test": 8_400_000_000}  # render seeds, disjoint from all others
PAIRS = {"train": 4000, "validation": 400, "test": 800}
SHOWN = {"train": 32, "validation": 24, "test": 60}
"""pictures of each mascot; as many of each style and of each object"""


def drawn(source: str, split: str) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    """uint8 pictures (N, 3, 64, 64), class indices (N,), class names and captions. Drawn once, then cached.

    ``source``: canvas-pairs (a quarter mascots, the rest objects in styles; its classes are the mascots and "" for the others),
    canvas-mascots, canvas-styles or canvas-scenes (objects in all styles), whose captions are the benchmark's.
    """
    items, classes, name = SOURCES[source](split)
    offset = FIRST[split] + 10_000_000 * sorted(SOURCES).index(source)
    rng = random.Random(offset)
    said = tuple(caption(rng, i) if source == "canvas-pairs" else official(i) for i in items)
    y = torch.tensor([classes.index(name(i)) for i in items])
    return _pictures(f"{source}-{split}-{len(items)}", offset, tuple(items)), y, classes, said


@lru_cache(maxsize=8)
def _pictures(name: str, first: int, items: tuple[Item, ...]) -> Tensor:
    found = kept(name)
    if found is None:
        found = np.stack([np.asarray(render(first + k, i)).transpose(2, 0, 1) for k, i in enumerate(items)])
        keep(found, name)
    return torch.from_numpy(found)


Listed = tuple[list[Item], tuple[str, ...], Callable[[Item], str]]


def _pairs(split: str) -> Listed:
    n, cells = PAIRS[split], list(grid())
    items = [Item(mascot=MASCOTS[k // 4 % len(MASCOTS)]) if k % 4 == 0 else cells[(k * 7) % len(cells)] for k in range(n)]
    return items, (*MASCOTS, ""), lambda i: i.mascot


def _mascots(split: str) -> Listed:
    return [Item(mascot=m) for _ in range(SHOWN[split]) for m in MASCOTS], MASCOTS, lambda i: i.mascot


def _styles(split: str) -> Listed:
    things = tuple(OBJECTS)
    items = [Item(object=things[k % len(things)], style=s) for k in range(SHOWN[split]) for s in STYLES]
    return items, tuple(STYLES), lambda i: i.style


def _scenes(split: str) -> Listed:
    looks = tuple(STYLES)
    items = [Item(object=o, style=looks[k % len(looks)]) for k in range(SHOWN[split]) for o in OBJECTS]
    return items, tuple(OBJECTS), lambda i: i.object


SOURCES: dict[str, Callable[[str], Listed]] = {
    "canvas-pairs": _pairs,
    "canvas-mascots": _mascots,
    "canvas-styles": _styles,
    "canvas-scenes": _scenes,
}
