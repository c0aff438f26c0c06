"""Originals to erase from."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tyro.conf import Positional

from .. import config, registry
from ..errors import UsageError
from .base import Result, Verb, device_of, here, rehearsal, rehearsed

if TYPE_CHECKING:
    from ..grids import Train as Recipe


@dataclass(frozen=True, kw_only=True)
class Train(Verb):
    """Train a model from scratch into a model folder: an original to erase from, or a judge. Stopped? The same command resumes.

    Either a recipe ('unlearn list recipes'), such as cifar10/resnet18, or an architecture and the data. Flags override what a recipe says.
    """

    resumes: ClassVar[bool] = True

    architecture: Positional[str]
    """a recipe; or resnet18_cifar, resnet20_cifar, resnet34_cifar, resnet50_cifar, vgg16_bn_cifar, swin_t_cifar, torchvision/NAME,
    timm/NAME, or ddpm_cifar, a class-conditional DDPM"""
    data: Positional[str] = ""
    """a folder with one folder per class, a dataset's folder, or a hub name; "canvas" is bundled; a recipe has its own"""
    out: Path
    """the model folder"""
    preset: str = ""
    """of retrain: how it is trained; paper when left out and no recipe says another"""
    epochs: int | None = None
    """passes over the pictures"""
    augment: str = ""
    """of training batches: none, flip, crop, crop-flip, or crop4-flip with its pixels; by the data set and the family when left out"""
    subset: int | None = None
    """so many of the training pictures, of each class in proportion, drawn with --split-seed"""
    validation: float | None = None
    """share of each class that is held back"""
    split_seed: int | None = None
    """seed of what is held back and of the subset"""
    seed: int = 0
    """seed of the weights and the order of pictures"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what the network computes in; weights are float32"""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto is cuda where there is one"""

    def do(self, part: Any) -> Result:
        from .. import grids, run
        from ..targets.classifier import Classifier
        from ..targets.ddpm import DDPM, DDPM_CIFAR
        from ..train import train

        asked = self.recipe()
        method = grids.recipe(asked)
        draws = asked.architecture.partition(":")[0] == DDPM_CIFAR
        if self.dry_run:
            with rehearsal(method, rehearsed(draws=draws)):
                (DDPM if draws else Classifier).fresh(asked.architecture, ("a", "b"))
            return {"dry_run": True, "out": str(self.out), "method": config.to_dict(method), "recipe": config.to_dict(asked)}
        with run.progress_bars() as bars:
            how: Result = {"seed": self.seed, "dtype": self.dtype, "device": device_of(self.device), "progress": bars, **asked.pictures}
            train(asked.architecture, asked.data, out=self.out, method=method, **how)
        return {"folder": str(self.out), **json.loads((self.out / "train.json").read_text())}

    def recipe(self) -> Recipe:
        """The recipe that is named, or else described by flags, which override it."""
        from .. import grids
        from ..base import Data

        if self.architecture in registry.names("recipes"):
            made = grids.trained(self.architecture)
            made = dataclasses.replace(made, data=dataclasses.replace(made.data, source=here(self.data) or made.data.source))
        elif self.data:
            made = grids.Train(architecture=self.architecture, data=Data(source=here(self.data)))
        else:
            raise UsageError(
                f"'{self.architecture}' is no recipe ('unlearn list recipes'), and an architecture needs data; "
                f"give them, for example 'unlearn train {self.architecture} path/to/images'"
            )
        given: dict[str, Any] = {"subset": self.subset, "validation": self.validation, "seed": self.split_seed}
        data = dataclasses.replace(made.data, **{k: v for k, v in given.items() if v is not None})
        own = {**({"epochs": self.epochs} if self.epochs else {}), **({"augment": self.augment} if self.augment else {})}
        if self.preset and self.preset != made.preset:  # the recipe's fields belong to its own preset
            return dataclasses.replace(made, data=data, preset=self.preset, fields=own)
        return dataclasses.replace(made, data=data, fields={**made.fields, **own})

    def say(self, result: Result) -> None:
        if self.dry_run:
            recipe = result["recipe"]
            where, named = recipe["data"]["source"], recipe["architecture"]
            print(f"would train {named} on {where} into {result['out']}; tried two steps of the recipe on the tiny model")
        else:
            print(f"trained {result['asked']['architecture']} on {result['n']} pictures in {result['time']['seconds']:.0f} s")
            print(f"→ {result['folder']}")
