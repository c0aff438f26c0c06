"""One checkpoint file in the original layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from .. import ldm
from . import Export
from ._shared import erased, save, state


@dataclass(frozen=True, kw_only=True)
class SingleFile(Export):
    """The erased pipeline as one safetensors file with the original code's names, for SD 1.x, 2.x and SDXL.

    The file holds weights alone. A program that does not know the architecture, or that a model predicts v, needs its configuration:
    ``from_single_file(FILE, config=FOLDER)``.
    """

    reads: ClassVar[str] = "diffusers (from_single_file) and programs that take checkpoints in the original layout"
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """precision of the weights on disk"""

    def run(self, folder: Path, out: Path) -> Path:
        target = erased(folder)
        modules: dict[str, Any] = target.modules
        unet, text = state("unet", modules["unet"], self.dtype), state("text_encoder", modules["text_encoder"], self.dtype)
        names = ldm.unet_names(unet)
        made = {ldm.UNET + names[k]: t for k, t in unet.items()}
        made |= {ldm.VAE + k: t for k, t in ldm.vae_state(state("vae", target.vae, self.dtype)).items()}
        if target.xl:
            second = ldm.to_openclip(state("text_encoder_2", modules["text_encoder_2"], self.dtype))
            made |= {ldm.CLIP_XL + k: t for k, t in text.items()} | {ldm.OPENCLIP_XL + k: t for k, t in second.items()}
        elif modules["text_encoder"].config.hidden_act == "gelu":  # OpenCLIP's, as in SD 2.x; OpenAI's has quick_gelu
            made |= {ldm.OPENCLIP + k: t for k, t in ldm.to_openclip(text).items()}
        else:
            made |= {ldm.CLIP + k: t for k, t in text.items()}
        file = out if out.suffix == ".safetensors" else out / "model.safetensors"
        return save({k: t.contiguous() for k, t in made.items()}, file)
