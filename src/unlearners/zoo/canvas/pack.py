"""Put trained parts into hub layout: ``python -m unlearners.zoo.canvas.pack --work DIR`` (fp16 safetensors, a few megabytes)."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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
    pipe: Any = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for part in ("sd", "clip", "judge"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(folder / "sd", safe_serialization=True)
    encoder = folder / "sd" / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(encoder).items()}
    save_file(weights, encoder, {"format": "pt"})  # the hub's spelling, which every version of transformers reads
    clip.half().save_pretrained(folder / "clip", safe_serialization=True)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder / "clip")
    for name, where in itertools.product(("vocab.json", "merges.txt"), ("sd/tokenizer", "clip")):
        shutil.copy(work / "tokenizer" / name, folder / where / name)
    (folder / "judge").mkdir()
    save_file({k: v.half().contiguous() for k, v in judge.state_dict().items()}, folder / "judge" / "model.safetensors", {"format": "pt"})
    for stage in ("judge", "vae", "vae_whole", "clip", "clip_vision", "unet"):
        shutil.copy(work / f"{stage}.log.jsonl", folder / "logs" / f"{stage}.jsonl")


if __name__ == "__main__":
    import tyro

    (FOLDER / "logs").mkdir(exist_ok=True)
    tyro.cli(pack)
