"""A checkpoint for open_clip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from .. import clip_maps
from ..errors import UsageError
from ..targets import load
from ..targets.clip import CLIP
from . import Export
from ._shared import converted, save


@dataclass(frozen=True, kw_only=True)
class OpenCLIP(Export):
    """The erased CLIP's weights under open_clip's names: ``open_clip.create_model(NAME, pretrained=FILE)``."""

    reads: ClassVar[str] = "open_clip"
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """precision of the weights on disk"""

    def run(self, folder: Path, out: Path) -> Path:
        target = load(str(folder))
        if not isinstance(target, CLIP):
            raise UsageError(f"{folder} holds a {type(target).__name__}, and this export takes a CLIP; see 'unlearn list exports'")
        tensors = {k: converted(t, self.dtype) for k, t in clip_maps.to_open_clip(target.state()).items()}
        return save(tensors, out if out.suffix == ".safetensors" else out / "open_clip_model.safetensors")
