"""Text alone for methods that train: what is said of the concept, what is held, and how fast, where nobody names neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import neighbours
from ..base import Target, Task
from ..targets.base import TextToImage

AROUND = ("templates", "preserved")
SHORT = 2e-4
"""lr of a run with one of these "auto", where none is chosen"""
ALONE: Mapping[str, Any] = {"params": "xattn", "eta": 4.0}
"""what goes with those that are chosen, except eta on SDXL"""
PACE = 9e-3
"""their lr as a share of the root mean square of the trained weights"""
EMPTY, HELD = 4, 92
"""how often the empty prompt, which guidance starts from, is held, and how many others are"""


def alone(method: Any, target: Target, task: Task) -> dict[str, Any]:
    """The fields of ``method`` that take the place of "auto" in ``AROUND``, and of the other "auto" that go with them.

    Nothing is chosen where neighbours are named, for nudity, which is to go where no word names it, and for classes.
    """
    auto = [name for name in AROUND if getattr(method, name) == "auto"]
    if neighbours.named(task, "preserve") or task.kind not in ("style", "object", "identity") or not isinstance(target, TextToImage):
        return {**dict.fromkeys(auto, ()), "lr": SHORT if method.lr == "auto" else method.lr}
    found = neighbours.choose(target, task)
    keep = (*[""] * EMPTY, *neighbours.spread(found.preserve, HELD))
    chosen = {"templates": found.templates, "preserved": keep}
    own = {n: v for n, v in ALONE.items() if getattr(method, n) == "auto" and not (n == "eta" and "text_encoder_2" in target.modules)}
    own |= {name: chosen[name] for name in auto}
    if method.lr == "auto":
        w = torch.cat([p.detach().float().flatten() for p in target.select(own.get("params", method.params)).values()])
        own["lr"] = float(f"{PACE * float(w.square().mean().sqrt()):.2g}")
    return own
