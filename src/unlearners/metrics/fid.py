"""Fréchet inception distance (Heusel et al., NeurIPS 2017)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..base import Metric, Outputs, Probe, Request, Score, Task
from ..diffusion import batches
from ..errors import UnlearnError, UsageError
from ..judges.canvas import fit
from ..targets.base import TextToImage
from ..zoo import canvas
from ..zoo.canvas import world

BATCH = 64
FIRST_SEED = 7_000_000_000  # renders of the training set and of tasks have smaller seeds
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class FID(Metric):
    """Fréchet distance between the model's pictures without the concept and real ones, as Gaussians in a feature space.

    Idea: whether the edited model still draws as well and as variedly on everything else.

        FID = |mu - mu_r|² + tr(S + S_r - 2 (S S_r)^(1/2)),      mu, S: mean and covariance of the features of the pictures

    Logged: ``fid/inception`` (2048 features of Inception-v3) or ``fid/canvas_judge`` (96 features: the spatial mean of the canvas
    judge's last layer); n = the model's pictures; no interval, as FID is biased upwards for small n. Compare equal n only.

    Deviations from the authors' code:
      1. Computed by torchmetrics with torch-fidelity's port of the original Inception weights and antialiased resizing.
      2. Pictures are those of the task's prompts that do not name the concept; AdvUnlearn and others draw 10,000 COCO captions.
      3. On the canvas the judge's features and ``renders`` fresh renders of the same probes stand in for Inception and real pictures.
    """

    needs = TextToImage
    higher_is_better: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:1706.08500"

    features: Literal["", "inception", "canvas_judge"] = ""
    """feature space; empty: canvas_judge on the canvas, else inception"""
    reference: str = ""
    """folder of real pictures; empty on the canvas: renders of the same probes"""
    renders: int = 600
    """number of renders that make the canvas' reference"""

    def requests(self, target: TextToImage, task: Task) -> list[Request]:
        return [Request(p.prompt, s) for p in task.probes if not task.names_concept(p) for s in task.seeds]

    def score(self, target: TextToImage, task: Task, outputs: Outputs) -> dict[str, Score]:
        on_canvas = target.base["name"] == "canvas"
        space = self.features or ("canvas_judge" if on_canvas else "inception")
        requests = self.requests(target, task)
        if len(requests) < 2:  # no covariance
            return {space: Score(value=math.nan, n=len(requests))}
        if not self.reference and not on_canvas:
            raise UsageError("fid has no real pictures to compare with; set its field 'reference' to a folder of pictures")
        kept = [p for p in task.probes if not task.names_concept(p)]
        real = pictures(Path(self.reference)) if self.reference else drawn(kept, self.renders)
        images = outputs.images(requests)
        fake = (images[part] for part in batches(len(images), BATCH))
        return {space: Score(value=distance(space, fake, real), n=len(images))}


def distance(space: str, fake: Iterable[Tensor], real: Iterable[Tensor]) -> float:
    """Fréchet distance between two sets of pictures, given in batches (B, 3, H, W) in [0, 1]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    features = _JudgeFeatures() if space == "canvas_judge" else 2048
    try:
        fid: Any = FrechetInceptionDistance(features, normalize=True)
    except OSError as error:  # URLError is one
        raise UnlearnError("Inception-v3's weights could not be fetched; connect once, or set features to canvas_judge") from error
    fid.to("cuda" if space == "inception" and torch.cuda.is_available() else "cpu")
    for source, is_real in ((fake, False), (real, True)):
        for x in source:
            fid.update(x.to(fid.device), real=is_real)
    return max(0.0, float(fid.compute()))  # rounding can take equal sets just below zero


class _JudgeFeatures(nn.Module):
    """The canvas judge's last layer, averaged over space: pictures (B, 3, H, W) in [0, 1] to (B, 96)."""

    num_features = 96

    def __init__(self) -> None:
        super().__init__()
        self.judge = canvas.load_judge()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.judge.body(2 * fit(x) - 1).double().mean((2, 3))  # type: ignore[no-any-return]


def drawn(probes: list[Probe], count: int) -> Iterator[Tensor]:
    """``count`` renders of what ``probes`` ask for, in turn, in batches; seeds are disjoint from all training pictures."""
    for start in range(0, count, BATCH):
        seeds = range(start, min(start + BATCH, count))
        images = [world.render(FIRST_SEED + i, subject(probes[i % len(probes)], FIRST_SEED + i)) for i in seeds]
        yield torch.stack([_tensor(i) for i in images])


def subject(probe: Probe, seed: int) -> world.Item:
    """What ``probe`` asks the renderer for; a probe that names no object or mascot gets a random object."""
    mascot = probe.truth.get("identity", probe.truth.get("mascot", ""))
    thing = probe.truth.get("object") or random.Random(seed).choice(tuple(world.OBJECTS))
    lightning = probe.truth.get("nsfw", probe.truth.get("lightning", "")) == "lightning"
    weather = "storm" if lightning else "night" if {"nsfw", "lightning"} & set(probe.truth) else ""
    style = probe.truth.get("style", "photo")
    return world.Item(object="" if mascot else thing, style=style, mascot=mascot, weather=weather, lightning=lightning)


def pictures(folder: Path) -> Iterator[Tensor]:
    """The pictures in ``folder`` and below, sorted by path, in batches of one size."""
    from PIL import Image

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise UsageError(f"fid's reference '{folder}' holds {len(files)} pictures; give a folder with at least two")
    batch: list[Tensor] = []
    for file in files:
        with Image.open(file) as opened:
            x = _tensor(opened.convert("RGB"))
        if batch and (len(batch) == BATCH or batch[0].shape != x.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(x)
    yield torch.stack(batch)


def _tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
