"""UnlearnCanvas' classifiers of styles and objects (Zhang et al., NeurIPS 2024 Datasets and Benchmarks)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import nets, patch
from ..base import Judge, Task
from ..diffusion import batches
from ..errors import RefusedError, UsageError
from . import _named

STYLES = (
    "Abstractionism", "Artist_Sketch", "Blossom_Season", "Bricks", "Byzantine", "Cartoon", "Cold_Warm", "Color_Fantasy", "Comic_Etch",
    "Crayon", "Cubism", "Dadaism", "Dapple", "Defoliation", "Early_Autumn", "Expressionism", "Fauvism", "French", "Glowing_Sunset",
    "Gorgeous_Love", "Greenfield", "Impressionism", "Ink_Art", "Joy", "Liquid_Dreams", "Magic_Cube", "Meta_Physics", "Meteor_Shower",
    "Monet", "Mosaic", "Neon_Lines", "On_Fire", "Pastel", "Pencil_Drawing", "Picasso", "Pop_Art", "Red_Blue_Ink", "Rust", "Seed_Images",
    "Sketch", "Sponge_Dabbed", "Structuralism", "Superstring", "Surrealism", "Ukiyoe", "Van_Gogh", "Vibrant_Flow", "Warm_Love",
    "Warm_Smear", "Watercolor", "Winter",
)  # fmt: skip
OBJECTS = (
    "Architectures", "Bears", "Birds", "Butterfly", "Cats", "Dogs", "Fishes", "Flame", "Flowers", "Frogs", "Horses", "Human",
    "Jellyfish", "Rabbits", "Sandwiches", "Sea", "Statues", "Towers", "Trees", "Waterfalls",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Unlearncanvas(Judge):
    """Reads 51 styles and 20 objects with the benchmark's two ViT-L/16, given as local files.

    Idea: both were fine-tuned on the benchmark's real pictures only.

        label = the name of argmax over classes of f_domain(x)

    The domains are "style" and "object". Names are compared without case and with "_" as a space; a concept that is none of them is
    refused. Pictures are resized to 224×224 and scaled to [-1, 1].

    Deviations from the authors' code:
      1. Checkpoints are opened without running code.
      2. Pictures are read as the model draws them; theirs have gone through JPEG files.
    """

    paper: ClassVar[str] = "arXiv:2402.11846"

    style: str = ""
    """the checkpoint of the style classifier (.pth)"""
    object: str = ""
    """the checkpoint of the object classifier (.pth)"""
    architecture: str = "vit_large_patch16_224"
    """timm's name of both networks"""
    batch: int = 32
    """pictures read at once"""

    @torch.no_grad()
    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        asked = task.kind if domain == task.axis else domain
        _named.only("unlearncanvas", asked, task, ("style", "object"))
        if asked not in ("style", "object"):
            raise UsageError(f"the judge unlearncanvas reads styles and objects and '{asked}' is neither; name another judge in the task")
        classes, file = (STYLES, self.style) if asked == "style" else (OBJECTS, self.object)
        labels = _named.known("unlearncanvas", classes, task, domain)
        net = network(file, asked, self.architecture)
        device = next(net.parameters()).device
        logits = [net(2 * fit(images[part].to(device).float()) - 1).float().cpu() for part in batches(len(images), self.batch)]
        return _named.read(torch.cat(logits), classes, labels, task, 1)


def fit(x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) at (B, 3, 224, 224)."""
    return F.interpolate(x, (224, 224), mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


@lru_cache(maxsize=2)
def network(file: str, domain: str, architecture: str) -> Any:
    """The classifier of ``domain`` from its checkpoint, on the GPU where there is one."""
    classes = STYLES if domain == "style" else OBJECTS
    if not file:
        raise UsageError(f"the judge unlearncanvas needs the benchmark's {domain} classifier; name its file: unlearncanvas:{domain}=FILE")
    state = patch.read_tensors(file)
    with torch.random.fork_rng(devices=[]):
        net = nets.build(f"timm/{architecture}", len(classes))
    try:
        net.load_state_dict(state)
    except RuntimeError:
        raise RefusedError(
            f"{file} holds no {architecture} with {len(classes)} classes; give the benchmark's {domain} classifier"
        ) from None
    return net.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")
