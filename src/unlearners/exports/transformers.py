"""A transformers folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from safetensors.torch import load_file

from ..errors import UsageError
from ..targets import load, root
from ..targets.clip import CLIP
from ..targets.llava import Llava
from . import Export
from ._shared import converted, save


@dataclass(frozen=True, kw_only=True)
class Transformers(Export):
    """The erased CLIP, SigLIP or LLaVA as a folder that transformers' ``from_pretrained`` loads, with its tokenizer and processor."""

    reads: ClassVar[str] = "transformers, Hugging Face Hub"
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """precision of the weights on disk"""

    def run(self, folder: Path, out: Path) -> Path:
        target = load(str(folder))
        if not isinstance(target, CLIP | Llava):
            raise UsageError(f"{folder} holds a {type(target).__name__}, and this export takes a CLIP or LLaVA; see 'unlearn list exports'")
        target.save(out)
        for path in out.glob("*.safetensors"):
            save({k: converted(t, self.dtype) for k, t in load_file(path).items()}, path)
        about = (out / "config.json").read_text(encoding="utf-8")  # transformers loads in the precision that it names
        (out / "config.json").write_text(re.sub(r'("(?:torch_)?dtype": )"\w+"', rf'\1"{self.dtype}"', about), encoding="utf-8")
        if isinstance(target, CLIP):
            self.words(root(str(folder))[0], out)
        return out

    def words(self, spec: str, out: Path) -> None:
        """Put the tokenizer and processor of the model at ``spec`` beside the weights."""
        from transformers import AutoProcessor

        try:
            AutoProcessor.from_pretrained(CLIP.aliases.get(spec, spec)).save_pretrained(out)
        except (OSError, ValueError) as error:
            raise UsageError(f"{spec} has no tokenizer that transformers reads; export it as open_clip") from error
