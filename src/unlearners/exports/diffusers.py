"""A whole diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ..targets.stable_diffusion import StableDiffusion
from . import Export
from ._shared import erased, save_pipeline


@dataclass(frozen=True, kw_only=True)
class Diffusers(Export):
    """The erased pipeline as a diffusers folder that ``from_pretrained`` loads."""

    reads: ClassVar[str] = "diffusers, Hugging Face Hub"
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """precision of the weights on disk"""

    def run(self, folder: Path, out: Path) -> Path:
        return self.write(erased(folder), out)

    def write(self, target: StableDiffusion, out: Path) -> Path:
        """``target`` as it is; its precision is changed."""
        return save_pipeline(target, out, self.dtype)
