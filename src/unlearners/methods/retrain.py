"""Retraining without the forget set: what every approximate method is measured against."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typing_extensions import Self

from .. import config, files, optim
from ..base import Auto, Method, Row, Task, kebab
from ..patch import live
from ..targets.base import Trainable
from ._learn import optimizer, settled

VERSION = 1  # raised when the recipe's meaning changes, so that old weights are not taken for new ones


@dataclass(frozen=True, kw_only=True)
class Retrain(Method):
    """Exact unlearning: train from fresh weights on the retain set alone, with the original's augmentation.

    Idea: a model that never saw the forget set is the reference; all other methods try to come near it in less time.

        theta_r = argmin over theta of E over D_r of L(theta; x, y)

    Logged: the training loss and learning rate; ``cached_seconds`` when finished weights were found and how long they once took.

    Finished weights are kept by data, rows, architecture, recipe and seed in the user's cache folder (``UNLEARNERS_CACHE``), so a second
    grid with the same reference does not train it again. A killed run resumes from its checkpoint.

    Deviations from the authors' code:
      1. The schedule is the paper's cosine; theirs drops to a tenth at epochs 91 and 136 of 182 (preset ``release``).
      2. One seeded split of training and validation pictures; theirs draws the forget set from another split than the original's.
      3. The last weights are used; users of theirs pick the best epoch by validation accuracy.
    """

    paper: ClassVar[str] = "arXiv:2310.12508"
    needs = Trainable

    params: str = "full"
    """weights to train"""
    epochs: int | Auto = "auto"
    """passes over the retain set; this and the other settings that are auto: SalUn's recipe for the family of the model (presets
    classifier and ddpm)"""
    steps: int | Auto = "auto"
    """optimizer steps in place of epochs; 0 goes by epochs"""
    batch: int | Auto = "auto"
    """images a step"""
    lr: float | Auto = "auto"
    """highest learning rate"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float | Auto = "auto"
    """of all weights"""
    optimizer: optim.Optimizer | Auto = "auto"
    """sgd, adam or adamw"""
    schedule: optim.Schedule | Auto = "auto"
    """of the learning rate"""
    smoothing: float | Auto = "auto"
    """decay of the moving average of weights that is kept in the end; 0 keeps the last weights"""
    clip: float | Auto = "auto"
    """highest gradient norm; 0 does not clip"""
    augment: str = config.later("")
    """of training batches: none, flip, crop, crop-flip, or crop4-flip with its pixels; empty: what the task says, else what the original
    was trained with"""
    cache: bool = True
    """take finished weights from the cache and put them there"""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {},
        "release": {"schedule": "multistep"},
        "short": {"epochs": 20, "batch": 128, "lr": 0.2, "schedule": "onecycle"},
        "classifier": {
            "epochs": 182, "steps": 0, "batch": 256, "lr": 0.1, "weight_decay": 5e-4, "optimizer": "sgd", "schedule": "cosine",
            "smoothing": 0.0, "clip": 0.0,
        },
        "ddpm": {
            "epochs": 1, "steps": 800_000, "batch": 128, "lr": 2e-4, "weight_decay": 0.0, "optimizer": "adam", "schedule": "constant",
            "smoothing": 0.9999, "clip": 1.0,
        },
    }  # fmt: skip

    def resolve(self, target: Trainable, task: Task) -> Self:
        return settled(self, target, task)

    def run(self, target: Trainable, task: Task) -> Iterator[Row]:
        D_r = target.open(replace(task.retain, augment=self.augment) if self.augment else task.retain)
        kept = self.kept(target, D_r)
        if self.cache and kept.exists():
            state = load_file(kept)
            for name, tensor in live(target.modules).items():
                if name in state:
                    tensor.data.copy_(state[name])
            yield {"cached_seconds": float(state["seconds"])}
            return

        started = time.perf_counter()
        target.reset()
        w = target.trainable(self.params)
        opt, retain = optimizer(self, w.values()), D_r.loader(int(self.batch))
        total = int(self.steps) or int(self.epochs) * len(retain)
        rate = optim.schedule(opt, self.schedule, total)  # type: ignore[arg-type]  # no field is "auto" here
        average = _Average(w, float(self.smoothing))
        target.train()
        for _ in target.steps(total, opt, retain, rate, average):
            loss = target.loss(retain.draw())
            opt.zero_grad()
            loss.backward()
            if self.clip:
                nn.utils.clip_grad_norm_(w.values(), float(self.clip))
            opt.step()
            rate.step()
            average.update(w)
            yield {"loss": loss.item(), "lr": float(rate.get_last_lr()[0])}
        average.put(w)
        if self.cache:
            seconds = torch.tensor(time.perf_counter() - started)
            tensors = {k: t.detach().cpu().contiguous() for k, t in live(target.modules).items()}
            kept.parent.mkdir(parents=True, exist_ok=True)
            draft = kept.with_suffix(f".{os.getpid()}.tmp")
            save_file(tensors | {"seconds": seconds}, draft)
            draft.replace(kept)

    def kept(self, target: Trainable, D_r: Any) -> Path:
        """Where finished weights lie: named by data, rows, family, architecture, recipe, numbers and seed."""
        shapes = {k: list(t.shape) for k, t in live(target.modules).items()}
        recipe = {k: v for k, v in config.to_dict(self).items() if k not in ("cache", "augment")}
        if D_r.augmentation != target.augmentation:  # the family's own is not named, as in older files
            recipe["augment"] = D_r.augmentation
        rows = {"digest": D_r.digest, "rows": D_r.indices.tolist(), "dtype": str(target.amp)}
        where = {"family": kebab(target), "shapes": shapes, "version": VERSION, "seed": torch.initial_seed()}
        return files.cache("retrain") / f"{config.content_hash([recipe, rows, where])[:32]}.safetensors"


class _Average:
    """A moving average of weights that ``Target.steps`` can checkpoint; does nothing with decay 0."""

    def __init__(self, w: dict[str, nn.Parameter], decay: float) -> None:
        self.decay, self.values = decay, {n: p.detach().clone() for n, p in w.items()} if decay else {}

    def update(self, w: dict[str, nn.Parameter]) -> None:
        for n, value in self.values.items():
            value.lerp_(w[n].detach(), 1 - self.decay)

    def put(self, w: dict[str, nn.Parameter]) -> None:
        for n, value in self.values.items():
            w[n].data.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state
