"""A whole diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from safetensors.torch import load_file, save_file

from .. import patch
from ..targets import DTYPES, load
from . import Export


@dataclass(frozen=True, kw_only=True)
class Diffusers(Export):
    """The erased pipeline as a diffusers folder that ``from_pretrained`` loads."""

    reads: ClassVar[str] = "diffusers, Hugging Face Hub"
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """precision of the weights on disk"""

    def run(self, folder: Path, out: Path) -> Path:
        target: Any = load(str(folder))  # at the run's own precision, or the patch would not fit its base
        target.pipe.to(dtype=DTYPES[self.dtype])
        target.pipe.save_pretrained(out, safe_serialization=True)
        for component in ("text_encoder", "text_encoder_2"):
            for path in (out / component).glob("*.safetensors"):
                weights = {patch.hub_key(f"{component}.{k}").partition(".")[2]: v for k, v in load_file(path).items()}
                save_file(weights, path, {"format": "pt"})  # transformers 5 saves CLIP text models in a spelling version 4 cannot read
        return out
