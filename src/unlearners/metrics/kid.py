"""Kernel inception distance (Bińkowski et al., ICLR 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..base import Metric, Outputs, Request, Score, Task
from ..errors import UsageError
from ..targets.base import Denoiser
from . import _pictures as shared


@dataclass(frozen=True, kw_only=True)
class KID(Metric):
    """Kernel distance between the model's pictures without the concept and real ones: as FID, but unbiased, so it suits few pictures.

    Idea: the squared maximum mean discrepancy of the features under a cubic kernel.

        KID = 1000 · mean over subsets of MMD²(X, Y),      k(x, y) = (x · y / d + 1)³,      X, Y: m features each, d wide

    Logged: ``kid/inception`` or ``kid/canvas_judge`` (the feature spaces and modes of ``fid``), times 1000 as is usual; n = the model's
    pictures; no interval. Equal distributions give 0 on average, so small values can be negative.

    Deviations from the authors' code:
      1. Computed by torchmetrics with torch-fidelity's port of the original Inception weights.
      2. Subsets are drawn from a fixed seed, and are as large as the smaller set where it has fewer than ``subset`` pictures.
      3. Pictures and real pictures are those of ``fid``.
    """

    needs = Denoiser
    higher_is_better: ClassVar[bool] = False
    version: ClassVar[int] = 2  # 1 knew "plain" alone
    paper: ClassVar[str] = "arXiv:1801.01401"

    features: Literal["", "inception", "canvas_judge"] = ""
    """feature space; empty: canvas_judge on the canvas, else inception"""
    mode: shared.Mode = "auto"
    """how pictures are fitted to Inception: clean (middle square, PIL's bicubic, 8 bits), plain, or auto, by their size; see ``fid``"""
    reference: str = ""
    """folder of real pictures; empty: the task's held-out data, on the canvas renders of the same probes"""
    renders: int = 600
    """number of renders that make the canvas' reference"""
    subsets: int = 100
    """how many subsets are averaged over"""
    subset: int = 1000
    """pictures in a subset"""

    def requests(self, target: Denoiser, task: Task) -> list[Request]:
        return shared.requests(task)

    def score(self, target: Denoiser, task: Task, outputs: Outputs) -> dict[str, Score]:
        space, requests = self.features or shared.space(target, task), self.requests(target, task)
        if len(requests) < 2:  # no pair
            return {space: Score(value=math.nan, n=len(requests))}
        if self.subsets < 1 or self.subset < 2:
            raise UsageError(f"kid cannot average {self.subsets} subsets of {self.subset} pictures; give at least 1 of at least 2")
        mode = shared.fitting("kid", self.mode, space, outputs, requests)
        real = shared.real("kid", target, task, self.reference, self.renders)
        value = distance(space, shared.made(outputs, requests), real, self.subsets, self.subset, mode)
        return {space: Score(value=value, n=len(requests), table={"mode": mode})}


def distance(space: str, fake: Iterable[Tensor], real: Iterable[Tensor], subsets: int, subset: int, mode: shared.Mode = "plain") -> float:
    """1000 · kernel distance between two sets of pictures, given in batches (B, 3, H, W) in [0, 1]."""
    from torchmetrics.image.kid import KernelInceptionDistance

    filled = shared.filled(KernelInceptionDistance, space, mode, fake, real, subsets=subsets)
    found = min(sum(map(len, filled.real_features)), sum(map(len, filled.fake_features)))
    if found < 2:
        raise UsageError("kid compares sets of at least two pictures; give more real pictures")
    filled.subset_size = min(subset, found)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return 1000 * float(filled.compute()[0])
