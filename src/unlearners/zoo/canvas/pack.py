"""Put trained parts into hub layout: ``python -m unlearners.zoo.canvas.pack --work DIR`` (fp16 safetensors, a few megabytes)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import FOLDER
from .model import load_part, make_scheduler, make_tokenizer


def pack(work: Path, folder: Path = FOLDER) -> None:
    """Write ``sd`` (StableDiffusionPipeline), ``clip`` (CLIPModel with processor) and ``judge`` from the checkpoints in ``work``."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTextModel

    tokenizer = make_tokenizer(work / "tokenizer")
    clip, vae, unet, judge = (load_part(work, n) for n in ("clip", "vae", "unet", "judge"))
    vae.register_to_config(scaling_factor=json.loads((work / "scaling_factor.json").read_text())["scaling_factor"])
    text = CLIPTextModel(clip.config.text_config)
    text.load_state_dict({k.removeprefix("text_model."): v for k, v in clip.text_model.state_dict().items()})
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for part in ("sd", "clip", "judge"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(folder / "sd", safe_serialization=True)
    clip.half().save_pretrained(folder / "clip", safe_serialization=True)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, **half)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder / "clip")
    (folder / "judge").mkdir()
    save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, folder / "judge" / "model.safetensors", {"format": "pt"})
    for stage in ("judge", "vae", "vae_whole", "clip", "unet"):
        shutil.copy(work / f"{stage}.log.jsonl", folder / "logs" / f"{stage}.jsonl")


if __name__ == "__main__":
    import tyro

    (FOLDER / "logs").mkdir(exist_ok=True)
    tyro.cli(pack)
