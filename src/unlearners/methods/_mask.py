"""SalUn's mask: which weights may move. The same fields and the same code for every method that can have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from .. import config, patch, saliency
from ..base import Row, kebab
from ..data import Examples
from ..errors import RefusedError, UsageError
from ..latents import Latents
from ..targets.base import Learner

Opened = Examples | Latents


@dataclass(frozen=True, kw_only=True)
class Masked:
    """The fields of a mask. With ``none`` every weight that ``params`` selects may move, and nothing is computed."""

    mask: Literal["none", "saliency", "random", "inverted", "all"] = config.later("none")
    """which weights may move: all (none, all), those that matter most for D_f (saliency, SalUn's), or controls (random, inverted)"""
    density: float = config.later(0.5)
    """share of the weights in the mask, above 0 and at most 1"""
    statistic: saliency.Statistic = config.later("abs_sum")
    """of the batches' gradients: abs_sum |sum g| (SalUn's), sum_abs |g| summed, sum_sq g^2 summed"""
    scope: saliency.Scope = config.later("global")
    """rank all weights together, or give every tensor its share (layer)"""
    mask_augment: bool = config.later(False)
    """whether the mask's pass augments the images (SalUn's release does)"""
    saliency_file: str = config.later("")
    """keeps the saliency: read if there, else written, at most a byte a weight (any density in steps of 0.005) or this mask's bits"""

    def masking(self) -> None:
        """Raise ``UsageError`` for a mask that cannot be."""
        if not 0 < self.density <= 1:
            raise UsageError(f"density is {self.density} but must be above 0 and at most 1")
        if self.mask == "none" and self.saliency_file:
            raise UsageError("saliency_file belongs to a mask and mask is none; set mask to saliency, or leave saliency_file out")

    def freeze(
        self, target: Any, forget: Callable[[], Opened], w: Mapping[str, Tensor], batch: int
    ) -> tuple[saliency.Freeze, dict[str, float]]:
        """What holds every weight of ``w`` outside the mask, and the seconds that the mask took, for the first row of the log.

        ``forget`` opens the forget set, in batches of ``batch``; it is called where the mask depends on the data.
        """
        if self.mask == "none":
            return saliency.Freeze({}, {}), {}
        first = perf_counter()
        m, cached = self.chosen(target, forget, w, batch)
        spent = {"mask_seconds": perf_counter() - first + cached, **({"cached_seconds": cached} if cached else {})}
        return saliency.Freeze(w, m), spent

    def chosen(self, target: Any, forget: Callable[[], Opened], w: Mapping[str, Tensor], batch: int) -> tuple[dict[str, Tensor], float]:
        """m, and the seconds that another run spent on its saliency. Random numbers are of a stream of its own, so that the training
        draws the same ones for every mask."""
        with torch.random.fork_rng([target.device] if target.device.type == "cuda" else []):
            torch.manual_seed(torch.initial_seed() ^ 0x5A1)
            if self.mask == "none" or self.mask == "all" or self.mask == "random":
                return saliency.choose(w, self.density, "all" if self.mask == "none" else self.mask, self.scope), 0.0
            D_f = forget()
            kept, cached = self.kept(target, D_f, w, batch) if self.saliency_file else (self.measured(target, D_f, w, batch), 0.0)
            return saliency.choose(kept, self.density, self.mask, self.scope), cached

    def measured(self, target: Any, forget: Opened, w: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        """The statistic of every weight: one pass over D_f in evaluation mode, of the loss that ascent raises.

        On dual encoders that is mean(1 - cos), as in SLUG's baseline: their training loss compares within the batch, where every text of
        D_f may be the same.
        """
        D_f = forget.loader(batch)
        batches = (D_f.draw() for _ in range(len(D_f))) if self.mask_augment else forget.batches(batch)
        return saliency.measure(w, target.forgetting, batches, self.statistic)

    def kept(self, target: Any, forget: Opened, w: Mapping[str, Tensor], batch: int) -> tuple[dict[str, Tensor], float]:
        """The saliency in ``saliency_file``, and the seconds it took the run that wrote it; written now when there is no such file."""
        path, start = Path(self.saliency_file), perf_counter()
        about = saliency.About(
            model=config.content_hash(patch.fingerprint(target.modules)),
            data=config.content_hash([forget.digest, forget.indices.tolist()]),
            loss=f"{kebab(target)}.{'loss' if type(target).forgetting is Learner.forgetting else 'forgetting'}",
            statistic=self.statistic,
            scope=self.scope,
            augment=self.mask_augment,
            batch=0 if self.statistic == "abs_sum" else batch,
            seed=torch.initial_seed(),
        )
        if path.exists():
            found, known = saliency.load(path, w)
            if wrong := known.differs(about):
                raise RefusedError(f"{path} is the saliency of another {wrong}; give another saliency_file, or delete it")
            if known.density not in (-1, self.density):
                raise RefusedError(f"{path} is a mask of density {known.density}, not {self.density}; give another saliency_file")
            return found, known.seconds
        found = self.measured(target, forget, w, batch)
        if saliency.stepped(self.density):
            found = saliency.levels(found, self.scope)
        else:
            found, about = saliency.choose(found, self.density, scope=self.scope), replace(about, density=self.density)
        saliency.save(path, found, replace(about, seconds=perf_counter() - start))
        return found, 0.0


def first(i: int, spent: Row) -> Row:
    """``spent`` in the row of the first step, nothing in later ones."""
    return spent if i == 0 else {}
