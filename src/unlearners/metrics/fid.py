"""Fréchet inception distance (Heusel et al., NeurIPS 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..base import Metric, Outputs, Request, Score, Task
from ..targets.base import Denoiser
from . import _pictures as shared


@dataclass(frozen=True, kw_only=True)
class FID(Metric):
    """Fréchet distance between the model's pictures without the concept and real ones, as Gaussians in a feature space.

    Idea: whether the edited model still draws as well and as variedly on everything else.

        FID = |mu - mu_r|² + tr(S + S_r - 2 (S S_r)^(1/2)),      mu, S: mean and covariance of the features of the pictures

    Pictures are fitted to Inception in one of two ways. "clean" is what papers on photographs report: the middle square, PIL's bicubic
    to 299, 8 bits. "plain" squeezes the whole picture with bilinear interpolation, which is another number. Where ``mode`` is "auto", it is
    plain for pictures of less than 128 pixels (drawings, CIFAR) and clean for all others.

    Logged: ``fid/inception`` (2048 features of Inception-v3) or ``fid/canvas_judge`` (96 features: the spatial mean of the canvas
    judge's last layer); n = the model's pictures; no interval, as FID is biased upwards for small n. Compare equal n and equal modes only;
    the mode is in the table of the result.

    Deviations from the authors' code:
      1. Computed by torchmetrics with torch-fidelity's port of the original Inception weights.
      2. Pictures are those of the task's prompts that do not name the concept; AdvUnlearn and others draw 10,000 COCO captions.
      3. On the canvas the judge's features and ``renders`` fresh renders of the same probes stand in for Inception and real pictures.
      4. Real pictures of a model with labelled data are the task's held-out ones, at the model's size; SalUn's code takes the first
         500 training pictures of classes 1 to 9, stretches each to the full range, and so shifts the value.
    """

    needs = Denoiser
    higher_is_better: ClassVar[bool] = False
    version: ClassVar[int] = 2  # 1 knew "plain" alone
    paper: ClassVar[str] = "arXiv:1706.08500"

    features: Literal["", "inception", "canvas_judge"] = ""
    """feature space; empty: canvas_judge on the canvas, else inception"""
    mode: shared.Mode = "auto"
    """how pictures are fitted to Inception: clean (middle square, PIL's bicubic, 8 bits), plain, or auto, by their size"""
    reference: str = ""
    """folder of real pictures; empty: the task's held-out data, on the canvas renders of the same probes"""
    renders: int = 600
    """number of renders that make the canvas' reference"""

    def requests(self, target: Denoiser, task: Task) -> list[Request]:
        return shared.requests(task)

    def score(self, target: Denoiser, task: Task, outputs: Outputs) -> dict[str, Score]:
        space, requests = self.features or shared.space(target, task), self.requests(target, task)
        if len(requests) < 2:  # no covariance
            return {space: Score(value=math.nan, n=len(requests))}
        mode = shared.fitting("fid", self.mode, space, outputs, requests)
        real = shared.real("fid", target, task, self.reference, self.renders)
        value = distance(space, shared.made(outputs, requests), real, mode)
        return {space: Score(value=value, n=len(requests), table={"mode": mode})}


def distance(space: str, fake: Iterable[Tensor], real: Iterable[Tensor], mode: shared.Mode = "plain") -> float:
    """Fréchet distance between two sets of pictures, given in batches (B, 3, H, W) in [0, 1]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    filled = shared.filled(FrechetInceptionDistance, space, mode, fake, real)
    return max(0.0, float(filled.compute()))  # rounding can take equal sets just below zero
