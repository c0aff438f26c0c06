"""The UNet alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import UsageError
from ..targets import read_run
from . import Export
from ._shared import erased, save, state


@dataclass(frozen=True, kw_only=True)
class UNet(Export):
    """The erased UNet alone, as a folder that ``UNet2DConditionModel.from_pretrained`` loads."""

    reads: ClassVar[str] = "diffusers"
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """precision of the weights on disk"""
    changed: bool = False
    """write only the weights that the run changed, without a configuration, as ESD and UCE publish them"""

    def run(self, folder: Path, out: Path) -> Path:
        target = erased(folder)
        unet: Any = target.modules["unet"]
        weights, file = state("unet", unet, self.dtype), out / "diffusion_pytorch_model.safetensors"
        if self.changed:
            names = {k.removeprefix("unet.") for k in read_run(folder)["weights"]["changed"] if k.startswith("unet.")}
            if not names:
                raise UsageError(f"the run in {folder} changed no weight of the UNet; export the text_encoder, or the whole UNet")
            return save({k: t for k, t in weights.items() if k in names}, file)
        save(weights, file)
        unet.save_config(out)
        return out
