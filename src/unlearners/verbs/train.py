"""Originals to erase from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from tyro.conf import Positional

from .. import config, registry
from .base import Result, Verb, device_of, rehearsal, rehearsed


@dataclass(frozen=True, kw_only=True)
class Train(Verb):
    """Train a classifier from scratch into a model folder: an original to erase from. Stopped? The same command resumes."""

    resumes: ClassVar[bool] = True

    architecture: Positional[str]
    """resnet18_cifar, resnet20_cifar, resnet50_cifar, vgg16_bn_cifar, swin_t_cifar, torchvision/NAME or timm/NAME"""
    data: Positional[str]
    """a folder with one folder per class, a dataset's folder, or a hub name; "canvas" is bundled"""
    out: Path
    """the model folder"""
    preset: str = "paper"
    """the recipe: a preset of retrain"""
    validation: float = 0.0
    """share of each class that is held back"""
    split_seed: int = 0
    """seed of what is held back"""
    seed: int = 0
    """seed of the weights and the order of pictures"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what the network computes in; weights are float32"""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto is cuda where there is one"""

    def do(self, part: Any) -> Result:
        from .. import run
        from ..base import Data
        from ..targets.classifier import Classifier
        from ..train import train

        method = registry.make("methods", "retrain", preset=self.preset)
        where = str(Path(self.data).resolve()) if Path(self.data).exists() else self.data
        source = Data(source=where, validation=self.validation, seed=self.split_seed)
        if self.dry_run:
            with rehearsal(method, rehearsed()):
                Classifier.fresh(self.architecture, ("a", "b"))
            return {"dry_run": True, "out": str(self.out), "method": config.to_dict(method)}
        with run.progress_bars() as bars:
            how: Result = {"seed": self.seed, "dtype": self.dtype, "device": device_of(self.device), "progress": bars}
            train(self.architecture, source, out=self.out, method=method, **how)
        return {"folder": str(self.out), **json.loads((self.out / "train.json").read_text())}

    def say(self, result: Result) -> None:
        if self.dry_run:
            print(f"would train {self.architecture} on {self.data} into {result['out']}; tried two steps of the recipe on the tiny model")
        else:
            print(f"trained {self.architecture} on {result['n']} pictures in {result['time']['seconds']:.0f} s")
            print(f"→ {result['folder']}")
