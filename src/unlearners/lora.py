"""Low-rank adapters on some of a target's weights while a method trains, merged into those weights afterwards.

The adapters are PEFT's. What a run leaves is the target's own modules under their own names, with W + (alpha / r) B A in place of W,
so the change of each weight has rank r and a truncated SVD gives the factors back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .base import Task
from .diffusion import Cond
from .errors import UsageError


class Adapters:
    """The adapters of a UNet: ``weights`` to train (A and B of each layer) and ``off()``, the model without them."""

    def __init__(self, unet: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        self.layers = [m for m in unet.modules() if isinstance(m, LoraLayer)]
        self.weights: list[nn.Parameter] = [p for p in unet.parameters() if p.requires_grad]
        for p in self.weights:
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))

    @contextmanager
    def off(self) -> Iterator[None]:
        """The original model inside, without gradients: the teacher needs no weights of its own."""
        for layer in self.layers:
            layer.enable_adapters(False)
        try:
            with torch.no_grad():
                yield
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)


@contextmanager
def adapted(target: Any, params: str, rank: int, alpha: float) -> Iterator[Adapters]:
    """Rank-``rank`` adapters on every Linear and Conv2d whose weight ``params`` selects, merged when the block ends, however it does.

    A starts as PEFT draws it (Kaiming-uniform, as in Hu et al. 2021), B at 0. In half precision the adapters are float32.
    Raises ``UsageError`` where ``params`` selects no such layer, or one outside the UNet.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    target.differentiable()
    chosen = target.select(params)
    if other := [n for n in chosen if not n.startswith("unet.")]:
        raise UsageError(f"'{other[0]}' is not in the UNet, where the adapters go; choose params such as xattn or selfattn")
    unet = target.modules["unet"]
    layers = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and f"unet.{n}.weight" in chosen]
    if not layers:
        raise UsageError(f"'{params}' selects no linear or convolution layer to adapt; choose params such as xattn or full")
    held = "|".join(map(re.escape, layers))  # a pattern, since PEFT takes a list of names for endings
    scaled: Any = {"r": rank, "lora_alpha": alpha}  # PEFT says int and takes any number
    tuner = LoraModel(unet, LoraConfig(target_modules=held, **scaled), "default")
    try:
        yield Adapters(unet)
    finally:
        tuner.merge_and_unload()


def neutrals(task: Task, kind: str) -> list[str]:
    """What takes a concept's place, for each of ``task.said``: "" or, with "anchor", the anchor of the concept that the phrase names."""
    if kind == "empty":
        return [""] * len(task.said)
    named = [next((i for i, c in enumerate(task.concepts) if c.lower() in said.lower()), 0) for said in task.said]
    return [task.anchor(i) for i in named]


def each(target: Any, x_t: Tensor, t: Tensor, *conds: Cond) -> tuple[Tensor, ...]:
    """The predictions for the same states (B, 4, h, w) under several conditionings of B rows, from one call of the network."""
    n = len(conds)
    out: Tensor = target.eps(x_t.repeat(n, 1, 1, 1), t.repeat(n), Cond.cat(conds))
    return out.chunk(n)
