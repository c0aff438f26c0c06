"""What the methods that train share: settings of the family at hand, the optimizer, and batches of two sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from .. import optim
from ..base import Method, Task

M = TypeVar("M", bound=Method)


def settled(method: M, target: Any, task: Task) -> M:
    """``method`` with the family's setting in place of each "auto".

    What the method's own preset for the family says comes first ("sd-nsfw" for a task of kind nsfw, then "sd"), then ``target.training``.
    A number of epochs that somebody asked for is not replaced by the family's number of steps.
    """
    presets = type(method).presets
    own = {**presets.get(target.recipe, {}), **presets.get(f"{target.recipe}-{task.kind}", {})} if target.recipe else {}
    auto = [f.name for f in fields(method) if getattr(method, f.name) == "auto"]  # type: ignore[arg-type]
    asked = {"steps": 0} if getattr(method, "epochs", "auto") != "auto" else {}
    known: Mapping[str, Any] = {**target.training, **own, **asked}
    return replace(method, **{name: known[name] for name in auto if name in known})  # type: ignore[type-var]


def least(*values: float | str) -> float:
    """The smallest of the values that are numbers; "auto" is chosen later, and is fine."""
    return min((v for v in values if not isinstance(v, str)), default=float("inf"))


def optimizer(method: Any, weights: Iterable[torch.nn.Parameter]) -> Any:
    """The optimizer of ``weights`` that the method's fields describe."""
    return optim.make(method.optimizer, weights, lr=method.lr, momentum=method.momentum, weight_decay=method.weight_decay)


def size(batch: Mapping[str, Any]) -> int:
    """The number of examples in a batch."""
    return len(next(iter(batch.values())))


def joined(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Two batches with the same keys as one."""
    return {k: a[k] + b[k] if isinstance(a[k], list) else torch.cat([a[k], b[k]]) for k in a}
