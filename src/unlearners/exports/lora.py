"""The change as a LoRA."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open

from .. import lora_files, patch
from ..errors import UsageError
from . import Export
from ._shared import converted, erased, original, save

ABOUT = "unlearners.lora"


@dataclass(frozen=True, kw_only=True)
class LoRA(Export):
    """What the erasure changed as a LoRA: the change of each Linear and Conv2d as the best product of two thin matrices.

    ``residual`` in what is printed is ||D - BA|| / ||D|| over everything that changed: 0 means that nothing is lost, 1 that the file
    does nothing. A LoRA can be unloaded, and then the concept is back.
    """

    reads: ClassVar[str] = "diffusers (load_lora_weights); programs that take kohya's LoRA files with naming kohya"
    rank: int = 16
    """rank of every layer; 0 takes as much as any layer needs, so that nothing is lost"""
    naming: Literal["peft", "kohya"] = "peft"
    """how the weights are called: by PEFT and diffusers, or by kohya's scripts"""
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """precision of the weights on disk"""
    leave_out: bool = False
    """leave out changed norms, biases and embeddings, which a LoRA cannot hold, in place of refusing; the residual counts them"""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UsageError(f"a rank cannot be {self.rank}; give 1 or more, or 0 for the full rank")

    def run(self, folder: Path, out: Path) -> Path:
        old, target = patch.live(original(folder).modules), erased(folder)
        new = patch.live(target.modules)
        change = {k: t.double() - old[k].double() for k, t in new.items() if not torch.equal(t, old[k])}
        if not change:
            raise UsageError(f"the run in {folder} changed no weight, so there is no LoRA to write; give a run that did")
        layers = {k: name for k, name in lora_files.layers(new).items() if k in change}
        if (lost := sorted(change.keys() - layers.keys())) and not self.leave_out:
            raise UsageError(
                f"a LoRA cannot hold the change of '{lost[0]}' and {len(lost) - 1} more; set leave_out, or export as diffusers"
            )
        if not layers:
            raise UsageError(f"a LoRA can hold none of the {len(lost)} weights that the run in {folder} changed; export it as diffusers")
        names = lora_files.original_layers(new) if target.xl and self.naming == "kohya" else {}
        if odd := [k for k, name in layers.items() if re.fullmatch(r"output_blocks\.\d+\.1\.conv", names.get(name, ""))]:
            raise UsageError(f"readers of kohya's names for SDXL expect attention before '{odd[0]}' and would lose it; use naming peft")
        # One rank for all layers: readers of older versions take the first layer's for the scale of all.
        rank = self.rank or max(min(len(d), d[0].numel()) for k, d in change.items() if k in layers)
        made: dict[str, torch.Tensor] = {}
        left, total = 0.0, sum(float(d.square().sum()) for d in change.values())
        for k, d in change.items():
            if k not in layers:
                left += float(d.square().sum())
                continue
            down, up = (converted(t, self.dtype) for t in lora_files.factor(d, rank))
            left += float((d.flatten(1) - up.double().flatten(1) @ down.double().flatten(1)).square().sum())
            keys = lora_files.pair_names(layers[k], self.naming, names)
            made |= {keys["down"]: down, keys["up"]: up}
            if "alpha" in keys:
                made[keys["alpha"]] = torch.tensor(float(rank))
        about = {"rank": rank, "residual": (left / total) ** 0.5, "layers": len(layers), "left_out": lost}
        file = out if out.suffix == ".safetensors" else out / "pytorch_lora_weights.safetensors"
        return save(made, file, {ABOUT: json.dumps(about)})

    def about(self, path: Path) -> dict[str, Any]:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads(file.metadata()[ABOUT]))
