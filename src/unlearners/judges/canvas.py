"""The canvas' own judge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Judge, Task
from ..diffusion import batches
from ..errors import unknown
from ..zoo import canvas
from ..zoo.canvas.model import HEADS
from ..zoo.canvas.world import SIZE

DOMAINS = {"object": "object", "style": "style", "identity": "mascot", "mascot": "mascot", "nsfw": "lightning", "lightning": "lightning"}
SPOKEN = {"mascot": {"none": ""}, "lightning": {"no": "calm", "yes": "lightning"}}


@dataclass(frozen=True, kw_only=True)
class Canvas(Judge):
    """Reads canvas pictures with the bundled CNN: object, style, identity (the mascots) and nsfw (lightning).

    Idea: an independent reader, trained on the renderer's pictures only and never on generated ones.

        label = argmax over the head's classes of judge(x)

    A concept that the head does not know is refused, since not finding it would say nothing.

    A picture without a mascot has the identity ""; nsfw is "lightning" or "calm". Object and style always get a label, also where
    a picture shows nothing: read them next to the pictures. Pictures of another size are resized to 64×64.
    """

    batch: int = 256
    """pictures read at once"""
    trial: bool = False
    """whether a concept that it does not know is taken all the same, and never found"""

    @torch.no_grad()
    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        if domain not in DOMAINS:
            raise unknown("domain of the canvas judge", domain, DOMAINS)
        head = DOMAINS[domain]
        said = [SPOKEN.get(head, {}).get(label, label) for label in HEADS[head]]
        if domain == task.axis and not self.trial:
            for concept in task.concepts:
                if concept not in said:
                    raise unknown(f"{domain} of the canvas judge", concept, filter(None, said))
        net = canvas.load_judge()
        device = next(net.parameters()).device
        found: list[str] = []
        for part in batches(len(images), self.batch):
            logits = net(2 * fit(images[part].to(device).float()) - 1)[head]  # (B, classes)
            found += [said[i] for i in logits.argmax(-1).tolist()]
        return found


def fit(x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) at the canvas' size (B, 3, 64, 64)."""
    if x.shape[-2:] == (SIZE, SIZE):
        return x
    return F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
