"""Put trained parts into hub layout (fp16 safetensors): ``python -m unlearners.zoo.canvas.pack large --work DIR``; ``small``, ``llava``."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import FOLDER
from .model import load_part, make_ddpm_scheduler, make_scheduler, make_tokenizer
from .objects import CLASSES


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


def pack_small(work: Path, folder: Path = FOLDER) -> None:
    """Write ``ddpm`` (DDIMPipeline) and ``classifier`` (config.json, model.safetensors), the models of 32×32 pictures."""
    from diffusers import DDIMPipeline

    for part in ("ddpm", "classifier"):
        shutil.rmtree(folder / part, ignore_errors=True)
    pipe: Any = DDIMPipeline(unet=load_part(work, "ddpm"), scheduler=make_ddpm_scheduler())
    pipe.to(torch.float16).save_pretrained(folder / "ddpm", safe_serialization=True)
    trained_on = json.loads((work / "classifier" / "config.json").read_text())["trained_on"]
    about = {
        "id2label": {str(i): c for i, c in enumerate(CLASSES)},
        "sampler": {"steps": 20, "guidance": 2.0},
        "trained_on": trained_on,
    }
    (folder / "ddpm" / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / "classifier").mkdir()
    shutil.copy(work / "classifier" / "config.json", folder / "classifier")
    state = load_file(work / "classifier" / "model.safetensors")
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, folder / "classifier" / "model.safetensors", {"format": "pt"})
    shutil.copy(work / "ddpm.log.jsonl", folder / "logs" / "ddpm.jsonl")
    rows = [json.loads(line) for line in (work / "classifier" / "log.jsonl").read_text().splitlines()]
    (folder / "logs" / "classifier.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[49::50]))


def pack_llava(work: Path, folder: Path = FOLDER) -> None:
    """Write ``llava`` (LlavaForConditionalGeneration with processor) from its checkpoint in ``work`` and the vision tower of ``clip``."""
    from .llava_train import make_llava, make_processor

    model = make_llava(folder / "clip")
    model.load_state_dict(torch.load(work / "llava.pt", map_location="cpu", weights_only=True)["model"])
    shutil.rmtree(folder / "llava", ignore_errors=True)
    model.half().save_pretrained(folder / "llava", safe_serialization=True)
    processor = make_processor()
    processor.save_pretrained(folder / "llava")
    processor.image_processor.save_pretrained(folder / "llava")  # transformers 4 looks for it in a file of its own
    words = folder / "llava" / "tokenizer_config.json"
    words.write_text(json.dumps(json.loads(words.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    shutil.copy(work / "llava.log.jsonl", folder / "logs" / "llava.jsonl")


if __name__ == "__main__":
    import tyro

    (FOLDER / "logs").mkdir(exist_ok=True)
    tyro.extras.subcommand_cli_from_dict({"large": pack, "small": pack_small, "llava": pack_llava})
