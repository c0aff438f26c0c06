"""Any image classifier as a judge."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from .. import registry
from ..base import Judge, Task
from ..diffusion import batches
from ..errors import UsageError, unknown
from . import _named

DOMAINS = ("object", "class")


@dataclass(frozen=True, kw_only=True)
class Classifier(Judge):
    """Reads what a picture shows with an image classifier: every picture gets one of its classes.

    Idea: an external network, trained on real pictures only, says which class a generated one shows.

        label = the name of argmax over classes of f(x)

    It knows objects, so the domain must be "object", "class", or the one the task forgets in. Every picture gets a class, also one
    that shows nothing: read the labels next to the pictures. Pictures of another size are read as the classifier's own are: the shorter
    side at the network's size, and the middle of it. Names are compared as in the judge style, and a concept that is no class is refused.
    """

    model: str = "canvas-classifier"
    """alias, folder, "torchvision/NAME", "timm/NAME", or "weights@architecture" of the classifier"""
    batch: int = 256
    """pictures read at once"""

    @torch.no_grad()
    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        if domain not in (*DOMAINS, task.axis):
            raise unknown("domain of the classifier judge", domain, {*DOMAINS, task.axis})
        target = network(self.model)
        labels = _named.known("classifier", target.classes, task, domain)
        found: list[str] = []
        for part in batches(len(images), self.batch):
            logits = target.logits(fit(images[part].to(target.device).float(), target.side))  # (B, K)
            found += [_named.said(i, target.classes, labels) for i in logits.argmax(1).tolist()]
        return found


@lru_cache(maxsize=2)
def network(model: str) -> Any:
    """The classifier called ``model``, on the GPU where there is one; ``UsageError`` when there is none of that name."""
    if not registry.get("targets", "classifier").claims(model):
        raise UsageError(
            f"there is no classifier '{model}' to read the pictures; train it ('unlearn train RECIPE --out {model}', see 'unlearn list "
            "recipes'), or name another judge"
        )
    return registry.get("targets", "classifier").load(model, device="cuda" if torch.cuda.is_available() else "cpu")


def fit(x: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, H, W) at the network's size (B, 3, side, side), as ``data`` makes them: none is squeezed."""
    if x.shape[-2:] == (side, side):
        return x
    fitted: Tensor = TF.center_crop(TF.resize(x, [side], antialias=True), [side, side])
    return fitted.clamp(0, 1)
