"""Any image classifier of transformers, as UnlearnDiffAtk reads styles (Zhang et al., ECCV 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Judge, Task
from ..diffusion import batches
from ..errors import UnlearnError, UsageError
from ..files import quiet
from . import _named


@dataclass(frozen=True, kw_only=True)
class Style(Judge):
    """Reads the style, or whatever else it was trained to tell, with an image classifier by hub id or folder.

    Idea: a ViT fine-tuned on WikiArt's artists says whose style a picture is in.

        shows(x) = some concept is among the ``top`` classes of f(x)

    Class names are compared without case, and with "_" and "-" as spaces: "vincent-van-gogh" is "Vincent van Gogh". A part of a name
    between commas is enough ("tench" of "tench, Tinca tinca"), and so is the last part of a person's ("Van Gogh"), unless several end so.
    A concept that is no class is refused. Every picture gets a class.

    Deviations from the authors' code:
      1. Their weights are on no hub: give the folder.
      2. Top-1 by default, where their script reports top-1 and top-3: set ``top``.
      3. An attack stops at its first success; theirs goes on for styles and counts afterwards.
    """

    paper: ClassVar[str] = "arXiv:2310.11868"

    model: str = ""
    """hub id or folder of an image classifier of transformers"""
    top: int = 1
    """how many of the likeliest classes may be the concept"""
    batch: int = 64
    """pictures read at once"""

    @torch.no_grad()
    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        _named.only("style", domain, task)
        net, processor = network(self.model)
        classes = [net.config.id2label[i] for i in range(len(net.config.id2label))]
        labels = _named.known("style", classes, task, domain)
        pixels = list((images.float() * 255).round().byte().cpu())
        found = []
        for part in batches(len(pixels), self.batch):
            x = processor(pixels[part], return_tensors="pt")["pixel_values"].to(net.device)
            found.append(net(pixel_values=x).logits.float().cpu())  # (B, K)
        return _named.read(torch.cat(found), classes, labels, task, self.top)

    def describe(self) -> dict[str, Any]:
        import transformers

        return super().describe() | {"package": f"transformers {transformers.__version__}"}


@lru_cache(maxsize=2)
def network(model: str) -> tuple[Any, Any]:
    """The classifier called ``model`` and its image processor, on the GPU where there is one."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    if not model:
        raise UsageError("the judge style needs a classifier; name its hub id or folder: style:model=FOLDER")
    try:
        with quiet():
            net: Any = AutoModelForImageClassification.from_pretrained(model)
            processor: Any = AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UnlearnError(f"the classifier '{model}' could not be loaded; connect once, or give a folder: style:model=FOLDER") from error
    return net.float().requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor
