"""A whole diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..targets import DTYPES, load
from . import Export


@dataclass(frozen=True, kw_only=True)
class Diffusers(Export):
    """The erased pipeline as a diffusers folder that ``from_pretrained`` loads."""

    reads: ClassVar[str] = "diffusers, Hugging Face Hub"
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """precision of the weights on disk"""

    def run(self, folder: Path, out: Path) -> Path:
        target: Any = load(str(folder))
        target.pipe.to(dtype=DTYPES[self.dtype])
        target.pipe.save_pretrained(out, safe_serialization=True)
        return out
