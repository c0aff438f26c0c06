"""Any image classifier as a judge."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import registry
from ..base import Judge, Task
from ..diffusion import batches
from ..errors import unknown

DOMAINS = ("object", "class")


@dataclass(frozen=True, kw_only=True)
class Classifier(Judge):
    """Reads what a picture shows with an image classifier: every picture gets one of its classes.

    Idea: an external network, trained on real pictures only, says which class a generated one shows.

        label = the name of argmax over classes of f(x)

    It knows objects, so the domain must be "object", "class", or the one the task forgets in. Every picture gets a class, also one
    that shows nothing: read the labels next to the pictures. Pictures of another size are resized to the network's. The labels are the
    classifier's own class names: a task's concepts and probes must use the same.
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
        found: list[str] = []
        for part in batches(len(images), self.batch):
            logits = target.logits(fit(images[part].to(target.device).float(), target.side))  # (B, K)
            found += [target.classes[i] for i in logits.argmax(1).tolist()]
        return found


@lru_cache(maxsize=2)
def network(model: str) -> Any:
    """The classifier called ``model``, on the GPU where there is one."""
    return registry.get("targets", "classifier").load(model, device="cuda" if torch.cuda.is_available() else "cpu")


def fit(x: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, H, W) at the network's size (B, 3, side, side)."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
