"""ImageNet's thousand classes, read by torchvision's ResNet-50 (He et al., CVPR 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import patch
from ..base import Judge, Task
from ..diffusion import batches
from ..errors import RefusedError, UnlearnError, unknown
from . import _named

SYNONYMS = {
    "church building": 497,
    "dustcart": 569,
    "refuse truck": 569,
    "bin lorry": 569,
    "chute": 701,
    "tinca tinca": 0,
    "chainsaw": 491,
    "petrol pump": 571,
    "tape player": 482,
}
"""other words for classes that papers erase"""


@dataclass(frozen=True, kw_only=True)
class Imagenet(Judge):
    """Reads what a picture shows with a ResNet-50: one of the 1,000 classes of ImageNet.

    Idea: the network that ESD, SalUn and others report object erasure with.

        shows(x) = some concept is among the ``top`` classes of f(x)

    A concept must be a class ("church", "garbage truck", "parachute", "tench" …) or one of a few synonyms; the others of the task's
    labels are found where they are classes. Every picture gets a class, also one that shows nothing.

    Deviations from the authors' code: SalUn takes these weights and top-1, as here. UnlearnDiffAtk takes another ResNet-50, which is
    ``style:model=microsoft/resnet-50`` here.
    """

    paper: ClassVar[str] = "arXiv:1512.03385"

    model: str = ""
    """a checkpoint of torchvision's resnet50; empty: torchvision's own weights, fetched once"""
    weights: str = "IMAGENET1K_V2"
    """name of torchvision's weights, which also says how pictures are resized"""
    top: int = 1
    """how many of the likeliest classes may be the concept"""
    batch: int = 64
    """pictures read at once"""

    @torch.no_grad()
    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        _named.only("imagenet", domain, task, ("object", "class"))
        classes = _entry(self.weights).meta["categories"]
        labels = _named.known("imagenet", classes, task, domain, SYNONYMS)
        net, device = network(self.model, self.weights), "cuda" if torch.cuda.is_available() else "cpu"
        fit = _entry(self.weights).transforms()
        logits = torch.cat([net(fit(images[part].float()).to(device)).cpu() for part in batches(len(images), self.batch)])  # (B, 1000)
        return _named.read(logits, classes, labels, task, self.top)

    def describe(self) -> dict[str, Any]:
        import torchvision

        return super().describe() | {"package": f"torchvision {torchvision.__version__}"}


def _entry(name: str) -> Any:
    """torchvision's record of the weights called ``name``."""
    from torchvision.models import ResNet50_Weights

    if name not in ResNet50_Weights.__members__:
        raise unknown("weights of resnet50", name, ResNet50_Weights.__members__)
    return ResNet50_Weights[name]


@lru_cache(maxsize=1)
def network(model: str, weights: str) -> Any:
    """The ResNet-50 with the weights in the file ``model``, or torchvision's own, on the GPU where there is one."""
    from torchvision.models import resnet50

    with torch.random.fork_rng(devices=[]):
        net = resnet50(weights=None)
    try:
        state = patch.read_tensors(model) if model else _entry(weights).get_state_dict(progress=True)
        net.load_state_dict(state)
    except OSError as error:
        raise UnlearnError(f"resnet50's {weights} could not be fetched; connect once, or give a file: imagenet:model=FILE") from error
    except RuntimeError:
        raise RefusedError(
            f"{model or weights} holds no torchvision resnet50 of 1,000 classes; give a checkpoint of that network"
        ) from None
    return net.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")
