"""The classes and sizes of the canvas zoo, and the judge that reads its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .world import MASCOTS, OBJECTS, STYLES, Item

HEADS: dict[str, tuple[str, ...]] = {
    "object": tuple(OBJECTS),
    "style": tuple(STYLES),
    "mascot": ("none", *MASCOTS),
    "lightning": ("no", "yes"),
}


class Judge(nn.Module):
    """A small CNN with one head for each of object, style, mascot and lightning. Input (B, 3, 64, 64) in [-1, 1]."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def block(a: int, b: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.GroupNorm(8, b), nn.SiLU())

        w = width
        self.body = nn.Sequential(
            block(3, w, 2), block(w, w, 1), block(w, 2 * w, 2), block(2 * w, 2 * w, 1), block(2 * w, 4 * w, 2), block(4 * w, 4 * w, 1)
        )
        self.heads = nn.ModuleDict({k: nn.Linear(4 * w * 16 if k != "style" else 4 * w, len(v)) for k, v in HEADS.items()})
        self.drop = nn.Dropout(0.1)

    def features(self, x: Tensor) -> Tensor:
        """(B, 96): mean features, the space of the canvas' Fréchet distance."""
        features: Tensor = self.body(x).mean((2, 3))
        return features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        place, mean = self.drop(F.adaptive_avg_pool2d(h, 4).flatten(1)), h.mean((2, 3))
        return {k: head(mean if k == "style" else place) for k, head in self.heads.items()}


def judge_targets(items: list[Item]) -> dict[str, Tensor]:
    """Class index of each item under each head; -1 where the head has nothing to say (a mascot has no object)."""
    return {
        "object": torch.tensor([HEADS["object"].index(i.object) if i.object else -1 for i in items]),
        "style": torch.tensor([HEADS["style"].index(i.style) for i in items]),
        "mascot": torch.tensor([HEADS["mascot"].index(i.mascot or "none") for i in items]),
        "lightning": torch.tensor([int(i.lightning) for i in items]),
    }


def make_tokenizer(folder: Path) -> Any:
    """The ``CLIPTokenizer`` in ``folder``."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def make_vae(scaling_factor: float = 1.0) -> Any:
    """``AutoencoderKL``: (B, 3, 64, 64) to latents (B, 4, 16, 16)."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=scaling_factor,
    )
    return vae.to(memory_format=torch.channels_last)


def make_clip(vocabulary: int) -> Any:
    """``CLIPModel``: 4 layers × 128 on both sides, patch 8, 32 tokens."""
    from transformers import CLIPConfig, CLIPModel

    side = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 96}
    text = side | {
        "vocab_size": vocabulary,
        "max_position_embeddings": 32,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=side | {"image_size": 64, "patch_size": 8}, projection_dim=96))


def make_unet() -> Any:
    """``UNet2DConditionModel`` on 4×16×16 latents, cross-attention (128) at 8×8 and 4×4."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 80, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return unet.to(memory_format=torch.channels_last)


def make_scheduler() -> Any:
    """Stable Diffusion's noise schedule, sampled by DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def make_ddpm() -> Any:
    """``UNet2DModel``: 3×32×32, noise prediction, 12 classes and a thirteenth embedding for "no class"."""
    from diffusers import UNet2DModel

    unet: Any = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=len(OBJECTS) + 1,
    )
    return unet.to(memory_format=torch.channels_last)


def make_ddpm_scheduler() -> Any:
    """The schedule of the DDPM paper: 1000 noise levels, beta from 1e-4 to 0.02."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True, set_alpha_to_one=True)


def load_part(work: Path, name: str) -> Any:
    """A trained part of the zoo from its training checkpoint in ``work``, averaged weights where there are."""
    make = {"vae": make_vae, "vae_crops": make_vae, "unet": make_unet, "judge": Judge, "ddpm": make_ddpm}
    part = make_clip(len(make_tokenizer(work / "tokenizer"))) if name.startswith("clip") else make[name]()
    file = {"vae": "vae_whole", "vae_crops": "vae", "clip": "clip_vision", "clip_pairs": "clip"}.get(name, name)
    state = torch.load(work / f"{file}.pt", map_location="cpu", weights_only=True)
    part.load_state_dict(state["model"])
    if "ema" in state:
        for p, averaged in zip(part.parameters(), state["ema"]["shadow_params"], strict=True):
            p.data.copy_(averaged)
    return part.eval()
