"""How the fine-tuned canvas was made: ``python -m unlearners.zoo.canvas.finetune --work DIR`` (seeded, resumes, then packs).

The UNet of ``sd`` learns the shifted look (``world.shifted``: another palette, wider lines) on 6,000 renders of it. The text encoder,
the VAE and the scheduler stay as they are, so an erasure trained in the text encoder of ``sd`` can be plugged in. Only the layers at
full latent resolution, the cross-attention and the norms train: a palette and a line width need no more, and the patch stays small.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import patch
from . import FOLDER
from .train import Loss, Recipe, fit
from .world import Item, caption, dataset, shifted

NAME = "sd-finetuned"
RECIPE = Recipe(steps=240, batch=64, lr=1e-3, ema=0.995)
SEED, PICTURES = 2, 6_000  # a dataset seed of its own
TRAINED = r"(conv_in|conv_norm_out|conv_out|time_embedding|down_blocks\.0|up_blocks\.2)\.|.*(\.attn2\.|\.proj_(in|out)\.|norm\d?\.)"


def chosen(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that train, by name in ``unet``."""
    return {n: p for n, p in unet.named_parameters() if re.match(TRAINED, n)}


def _pixels(seed: int, item: Item) -> np.ndarray:
    return np.asarray(shifted(seed, item)).transpose(2, 0, 1)


@torch.no_grad()
def material(pipe: Any, work: Path) -> dict[str, Tensor]:
    """What training reads, cached in ``work``: "moments" (N, 8, 16, 16) of the VAE, "states" (N, 32, 128) of one caption each, "null"."""
    path = work / f"shifted-{SEED}-{PICTURES}.pt"
    if not path.exists():
        from multiprocessing import Pool

        pairs = list(dataset(SEED, PICTURES))
        with Pool(os.cpu_count()) as pool:
            images = torch.from_numpy(np.stack(pool.starmap(_pixels, pairs, chunksize=256)))
        words = [caption(random.Random(seed), item) for seed, item in pairs]
        kept = {
            "moments": torch.cat([pipe.vae.encode(x.float() / 127.5 - 1).latent_dist.parameters for x in images.split(250)]),
            "states": torch.cat([text_states(pipe, words[k : k + 250]).half() for k in range(0, len(words), 250)]),
            "null": text_states(pipe, [""]),
        }
        torch.save(kept, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    found: dict[str, Tensor] = torch.load(path, weights_only=True, mmap=True)
    return found


def text_states(pipe: Any, words: list[str]) -> Tensor:
    """What the UNet is told (B, 32, 128)."""
    ids = pipe.tokenizer(words, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    states: Tensor = pipe.text_encoder(ids).last_hidden_state
    return states


def shifted_loss(pipe: Any, known: Mapping[str, Tensor]) -> Loss:
    """Noise prediction with min-SNR-5 weights and 10 % empty captions, as ``sd`` was trained."""
    mean, logvar = known["moments"].chunk(2, 1)
    scale, alphas = pipe.vae.config.scaling_factor, pipe.scheduler.alphas_cumprod

    def loss(unet: nn.Module, rng: random.Random, generator: torch.Generator, batch: int) -> Tensor:
        rows = torch.randint(len(mean), (batch,), generator=generator)
        silent = torch.rand(batch, generator=generator)[:, None, None] < 0.1
        states = torch.where(silent, known["null"], known["states"][rows].float())
        z = (mean[rows] + (0.5 * logvar[rows]).exp() * torch.randn(mean[rows].shape, generator=generator)) * scale
        noise = torch.randn(z.shape, generator=generator)
        t = torch.randint(len(alphas), (batch,), generator=generator)
        a = alphas[t][:, None, None, None]
        z_t = (a.sqrt() * z + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        error = (unet(z_t, t, states).sample - noise).pow(2).mean((1, 2, 3))
        snr = (a / (1 - a)).flatten()
        weighted: Tensor = (snr.clamp(max=5) / snr * error).mean()
        return weighted

    return loss


def finetune(work: Path, folder: Path = FOLDER, threads: int = 1) -> None:
    """Train in ``work`` and write ``sd-finetuned/weights.safetensors`` (a patch on ``sd``, float16) and its log below ``folder``."""
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"dtype": torch.float32, "safety_checker": None, "requires_safety_checker": False}
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder / "sd", **options)
    unet: Any = pipe.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    base = patch.base_hash({"unet": unet})
    for p in chosen(unet).values():
        p.requires_grad_()
    trained = fit(NAME, unet, shifted_loss(pipe, material(pipe, work)), work, RECIPE)
    tensors = {f"unet.{n}": p.detach().half().contiguous() for n, p in chosen(trained).items()}
    made = patch.Patch(tensors=tensors, base=base, meta={"method": "finetune", "look": "red and blue exchanged, line 1.5"})
    patch.save(made, folder / NAME / "weights.safetensors")
    shutil.copy(work / f"{NAME}.log.jsonl", folder / "logs" / f"{NAME}.jsonl")


if __name__ == "__main__":
    import tyro

    tyro.cli(finetune)
