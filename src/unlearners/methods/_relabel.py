"""Wrong labels on what is to be forgotten and right ones on the rest, in the orders that ``rl``, ``salun`` and ``salun_soft`` have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..data import Examples, Loader
from ..latents import Latents
from ._learn import joined, size

Order = Literal["joint", "sequential", "mixed"]
DDPM: Mapping[str, Any] = {
    "labels": "next", "alpha": 3.072,
    "steps": 1000, "batch": 128, "forget_batch": 128, "lr": 1e-4, "optimizer": "adam", "weight_decay": 0.0, "clip": 1.0,
}  # fmt: skip
"""what SalUn's release does on class-conditional diffusion"""


class Lessons:
    """The loss of each step, for a ``method`` with the fields order, labels, alpha, drop, batch and forget_batch.

    ``epoch`` is the steps of an epoch, ``loaders`` what ``Target.steps`` is to checkpoint.
    """

    def __init__(self, method: Any, target: Any, forget: Examples | Latents, retain: Examples | Latents) -> None:
        self.method, self.target, batch = method, target, method.batch
        self.alpha = method.alpha or len(retain) / len(forget)
        self.loaders: list[Loader]
        if method.order == "mixed":
            self.loaders = [Loader(_Both(forget, retain), batch)]  # type: ignore[arg-type]
            self.epoch = len(self.loaders[0])
            return
        share = method.forget_batch or max(16, round(batch * len(forget) / len(retain)))
        joint = method.order == "joint"
        self.loaders = [forget.loader(share if joint else batch), retain.loader(batch)]
        self.epoch = len(self.loaders[1]) if joint else sum(map(len, self.loaders))

    def loss(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of step ``i``, and its parts "forget" and "retain" where they are computed apart."""
        if self.method.order == "mixed":
            return self.mixed(self.loaders[0].draw())
        parts: dict[str, Tensor] = {}
        joint, (D_f, D_r) = self.method.order == "joint", self.loaders
        if joint or i % self.epoch < len(D_f):
            parts["forget"] = self.target.loss(self.wrong(D_f.draw()))
        if joint or i % self.epoch >= len(D_f):
            parts["retain"] = self.target.loss(D_r.draw())
        return parts["forget"] + self.alpha * parts["retain"] if joint else next(iter(parts.values())), parts

    def mixed(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over all examples of a batch. Where wrong labels are a matter of ``y`` alone both kinds go through the network
        together, so that batch normalisation sees what the authors' does."""
        kinds = {"forget": batch.get("forget"), "retain": batch.get("retain")}
        found = {name: self.wrong(b) if name == "forget" else b for name, b in kinds.items() if b is not None}
        if len(found) == 2 and set(found["forget"]) == set(found["retain"]):
            return self.target.loss(joined(found["forget"], found["retain"])), {}
        parts: dict[str, Tensor] = {name: self.target.loss(b) for name, b in found.items()}
        n = {name: size(b) for name, b in found.items()}
        return torch.stack([n[name] * part for name, part in parts.items()]).sum() / sum(n.values()), parts

    def wrong(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A forgotten batch with wrong labels; with ``drop="both"`` a model that drops labels in training drops these too."""
        told: Mapping[str, Any] = self.target.relabel(batch, self.method.labels)
        return {**told, "drop": True} if self.method.drop == "both" and "toward" in told else told


class _Both:
    """D_f and D_r as one set, for ``Loader``."""

    def __init__(self, forget: Examples | Latents, retain: Examples | Latents) -> None:
        self.forget, self.retain = forget, retain

    def __len__(self) -> int:
        return len(self.forget) + len(self.retain)

    def batch(self, rows: Tensor, augment: bool = False) -> dict[str, Any]:
        """{"forget": a batch, "retain": a batch}, without one that would be empty."""
        n = len(self.forget)
        f, r = rows[rows < n], rows[rows >= n] - n
        found = {"forget": self.forget.batch(f, augment)} if len(f) else {}
        return {**found, "retain": self.retain.batch(r, augment)} if len(r) else found
