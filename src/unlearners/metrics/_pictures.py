"""What FID and KID share: a feature space, how pictures are fitted to it, real pictures, and filling torchmetrics with both."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..base import Outputs, Probe, Request, Task
from ..diffusion import batches
from ..errors import UnlearnError, UsageError
from ..finite import finite
from ..judges.canvas import fit
from ..targets.base import Denoiser, Trainable
from ..zoo import canvas
from ..zoo.canvas import world

BATCH = 64
FIRST_SEED = 7_000_000_000  # renders of the training set and of tasks have smaller seeds
LOOKS: dict[str, Callable[..., Any]] = {"canvas": world.render, "canvas-finetuned": world.shifted}
"""what the canvas' models were trained to draw"""
Mode = Literal["auto", "clean", "plain"]
"""how pictures are fitted to Inception: clean, as the papers do, or plain, squeezed by torchmetrics; auto chooses by their size"""
INCEPTION = 299
SMALL = 128
"""pictures with a shorter side below this are no photographs, and "auto" does not crop or enlarge them"""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def kept(task: Task) -> list[Probe]:
    """The probes that do not name the concept."""
    return [p for p in task.probes if not task.names_concept(p)]


def requests(task: Task) -> list[Request]:
    """Their pictures."""
    return [r for p in kept(task) for r in task.pictures(p)]


def space(target: Denoiser, task: Task) -> str:
    """The usual feature space: the canvas judge's for models of the canvas, else Inception's."""
    return "canvas_judge" if target.base["name"] in LOOKS or unseen_or_retained(task).source == "canvas" else "inception"


def fitting(metric: str, mode: Mode, space: str, outputs: Outputs, requests: list[Request]) -> Mode:
    """ "clean" or "plain", by the size of the model's first picture where ``mode`` is "auto"; the canvas judge's space has no "clean"."""
    if space != "inception":
        if mode == "clean":
            raise UsageError(f"{metric}'s mode 'clean' is how pictures are fitted to Inception; leave it out, or set features to inception")
        return "plain"
    small = min(outputs.images(requests[:1]).shape[-2:]) < SMALL
    return mode if mode != "auto" else "plain" if small else "clean"


def made(outputs: Outputs, requests: list[Request]) -> Iterator[Tensor]:
    """The model's pictures in batches."""
    return (outputs.images(requests[part]) for part in batches(len(requests), BATCH))


def clean(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] as the papers' FID reads them: the middle square, PIL's bicubic to 299, 8 bits (B, 3, 299, 299)."""
    from PIL import Image

    h, w = images.shape[-2:]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = (images[..., top : top + side, left : left + side] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return torch.stack([_tensor(Image.fromarray(x).resize((INCEPTION, INCEPTION), Image.Resampling.BICUBIC)) for x in square])


def unseen_or_retained(task: Task) -> Any:
    """The task's held-out data, or where it names none the retained ones."""
    return task.holdout if task.holdout.source else task.retain


def real(metric: str, target: Denoiser, task: Task, reference: str, renders: int) -> Iterator[Tensor]:
    """Real pictures in batches (B, 3, H, W) in [0, 1]: those in the folder ``reference``, else the task's data, else renders."""
    if reference:
        return pictures(metric, Path(reference))
    if isinstance(target, Trainable):
        examples = target.open(unseen_or_retained(task))
        return (batch["x"].cpu() for batch in examples.batches(BATCH))
    if look := LOOKS.get(target.base["name"]):
        return drawn(kept(task), renders, look)
    raise UsageError(f"{metric} has no real pictures to compare with; set its field 'reference' to a folder of pictures")


def filled(kind: Any, space: str, mode: Mode, fake: Iterable[Tensor], real: Iterable[Tensor], **options: Any) -> Any:
    """A metric of torchmetrics, of class ``kind``, that has seen both sets of pictures (B, 3, H, W) in [0, 1].

    Raises ``NonFiniteError`` for pictures that are not finite.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that KID keeps all features in memory
            metric = kind(JudgeFeatures() if space == "canvas_judge" else 2048, normalize=True, **options)
    except OSError as error:  # URLError is one
        raise UnlearnError("Inception-v3's weights could not be fetched; connect once, or set features to canvas_judge") from error
    metric.to("cuda" if space == "inception" and torch.cuda.is_available() else "cpu")
    for source, is_real in ((fake, False), (real, True)):
        for x in source:
            finite(x)
            metric.update((clean(x) if mode == "clean" else x).to(metric.device), real=is_real)
    return metric


class JudgeFeatures(nn.Module):
    """The canvas judge's last layer, averaged over space: pictures (B, 3, H, W) in [0, 1] to (B, 96)."""

    num_features = 96

    def __init__(self) -> None:
        super().__init__()
        self.judge = canvas.load_judge()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.judge.body(2 * fit(x) - 1).double().mean((2, 3))  # type: ignore[no-any-return]


def drawn(probes: list[Probe], count: int, look: Callable[..., Any] = world.render) -> Iterator[Tensor]:
    """``count`` renders by ``look`` of what ``probes`` ask for, in turn, in batches; seeds are disjoint from all training pictures."""
    for start in range(0, count, BATCH):
        seeds = range(start, min(start + BATCH, count))
        images = [look(FIRST_SEED + i, subject(probes[i % len(probes)], FIRST_SEED + i)) for i in seeds]
        yield torch.stack([_tensor(i) for i in images])


def subject(probe: Probe, seed: int) -> world.Item:
    """What ``probe`` asks the renderer for; a probe that names no object or mascot gets a random object."""
    mascot = probe.truth.get("identity", probe.truth.get("mascot", ""))
    thing = probe.truth.get("object") or random.Random(seed).choice(tuple(world.OBJECTS))
    lightning = probe.truth.get("nsfw", probe.truth.get("lightning", "")) == "lightning"
    weather = "storm" if lightning else "night" if {"nsfw", "lightning"} & set(probe.truth) else ""
    style = probe.truth.get("style", "photo")
    return world.Item(object="" if mascot else thing, style=style, mascot=mascot, weather=weather, lightning=lightning)


def pictures(metric: str, folder: Path) -> Iterator[Tensor]:
    """The pictures in ``folder`` and below, sorted by path, in batches of one size."""
    from PIL import Image

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise UsageError(f"{metric}'s reference '{folder}' holds {len(files)} pictures; give a folder with at least two")
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
