"""A text encoder alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import UsageError
from . import Export
from ._shared import erased, save, state


@dataclass(frozen=True, kw_only=True)
class TextEncoder(Export):
    """A text encoder of the erased pipeline alone, to be put into any model that shares it: a folder that ``from_pretrained`` loads."""

    reads: ClassVar[str] = "transformers 4 and 5, diffusers"
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """precision of the weights on disk"""
    which: Literal["text_encoder", "text_encoder_2"] = "text_encoder"
    """which of SDXL's two"""

    def run(self, folder: Path, out: Path) -> Path:
        target = erased(folder)
        if self.which not in target.modules:
            raise UsageError(f"the model in {folder} has no {self.which}; leave 'which' out")
        encoder: Any = target.modules[self.which]
        save(state(self.which, encoder, self.dtype), out / "model.safetensors")
        encoder.config.architectures = [type(encoder).__name__]
        encoder.config.save_pretrained(out)
        return out
