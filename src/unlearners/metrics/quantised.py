"""What rounding the weights leaves of an erasure (Zhang et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .. import registry
from ..base import Metric, Outputs, Score, Target, Task
from ..errors import UsageError
from ..targets.base import Chat, Denoiser, DualEncoder
from ._probe import Fresh

VALUES = {"fa": "top1", "ta": "top1", "name_accuracy": "forgotten", "vqa": "others"}
"""of a metric with several values the one that is shown"""


@dataclass(frozen=True, kw_only=True)
class Quantised(Metric):
    """Quantised: what a model with coarsely rounded weights, as many are run, still or again knows of the concept.

    Idea: an erasure that moves weights by less than a rounding step is undone by rounding, which brings the original's weights back.

        Q_b(w) = s · round(w / s),      s = max |w| over the weights of an output channel / (2^(b-1) - 1)

    Q_b takes the place of every linear and convolution weight of a copy, of all components that can be edited; biases, norms and
    embeddings stay, and so does the VAE. The family's own metrics are then measured on the copy: UA and IRA of models that draw, UA and TA
    of classifiers, FA and TA at the first name of dual encoders, name accuracy and VQA (about other things) of models that answer.

    Logged: ``quantised/int8_ua``, ``quantised/int4_ua`` and so on, in percent with the 95 % Wilson intervals and n of the metrics
    themselves. The untouched model goes through the same where it is a row of its own (method ``original``): what rounding alone costs.

    Deviations from the authors' code:
      1. Theirs are language models, rounded by round-to-nearest, GPTQ and AWQ in groups of weights; here round-to-nearest by channel.
      2. Weights are rounded and activations are not; the arithmetic stays that of the model, so nothing gets faster or smaller.
      3. Pictures are drawn with the model's own sampler, whatever steps and guidance an evaluation asks for.
    """

    needs = Target
    higher_is_better: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2410.16454"

    bits: tuple[int, ...] = (8, 4)
    """bits of a weight, from 2 to 8"""
    seeds: int = 0
    """how many of the task's image seeds are drawn; 0: all"""
    source: str = ""
    """questions for a model that answers, as in name_accuracy; empty: the canvas' own for its model"""

    def __post_init__(self) -> None:
        if not self.bits or not all(2 <= b <= 8 for b in self.bits):
            raise UsageError(f"bits is {list(self.bits)} but must be whole numbers from 2 to 8; give for example [8, 4]")
        if self.seeds < 0:
            raise UsageError(f"seeds is {self.seeds} but must be a whole number from 0 on")

    def better(self, name: str) -> bool:
        better: bool = registry.get("metrics", name.partition("_")[2]).higher_is_better
        return better

    def score(self, target: Target, task: Task, outputs: Outputs) -> dict[str, Score]:
        task = replace(task, seeds=task.seeds[: self.seeds or None], utility=())
        found: dict[str, Score] = {}
        for bits in self.bits:
            copy = rounded(target, bits)
            seen = Fresh(copy, task, outputs)
            for metric in self.measured(target):
                score = metric.score(copy, task, seen)
                name = metric.__class__.__module__.rpartition(".")[2]
                found[f"int{bits}_{name}"] = score if isinstance(score, Score) else score[VALUES[name]]
        return found

    def measured(self, target: Target) -> list[Metric]:
        """The family's metrics: of what is to be forgotten, and of what is to stay."""
        if isinstance(target, Chat):
            return [registry.make("metrics", n, source=self.source) for n in ("name_accuracy", "vqa")]
        names = ("ua", "ira") if isinstance(target, Denoiser) else ("fa" if isinstance(target, DualEncoder) else "ua", "ta")
        return [registry.make("metrics", n) for n in names]


def rounded(target: Target, bits: int) -> Target:
    """A frozen copy of ``target`` with rounded weights."""
    copy = target.frozen()
    with torch.no_grad():
        for weight, axis in {w.data_ptr(): (w, axis) for m in copy.modules.values() for w, axis in matrices(m)}.values():
            weight.copy_(nearest(weight, bits, axis))
    return copy


def matrices(module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """The linear and convolution weights of ``module``, and the dimension of their output channels."""
    for m in module.modules():
        if isinstance(m, nn.Linear | _ConvNd):
            yield m.weight, int(isinstance(m, _ConvTransposeNd))
        elif isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None:
            yield m.in_proj_weight, 0


def nearest(w: Tensor, bits: int, axis: int) -> Tensor:
    """Q_b(w), float32, with one step for each index of dimension ``axis``."""
    top, w = 2 ** (bits - 1) - 1, w.float()
    most = w.abs().amax([d for d in range(w.dim()) if d != axis])
    step = torch.where(most > 0, most / top, 1.0)  # a channel of zeros stays one
    return torch.fake_quantize_per_channel_affine(w, step, torch.zeros_like(step, dtype=torch.int32), axis, -top, top)
