"""How the canvas zoo was trained: ``python -m unlearners.zoo.canvas.train --stage STAGE --work DIR``.

Every stage is seeded, checkpoints about once a minute and resumes. Batches depend on (seed, step, rank) alone, so a resumed
stage sees what an uninterrupted one would. ``torchrun --nproc_per_node 2 -m …`` splits a
batch over two cores.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import Judge, judge_targets
from .words import COMMON
from .world import MASCOTS, OBJECTS, STORM, STYLES, Item, caption, dataset, render

CONTEXT = 32  # tokens of a prompt, start and end included
VOCABULARY = 4096
PICTURES = 30_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training stage. ``lr`` warms up over 2 % of ``steps`` and decays to zero by a cosine."""

    steps: int
    batch: int
    lr: float
    decay: float = 0.01
    ema: float = 0.0


RECIPES = {
    "judge": Recipe(steps=2500, batch=96, lr=2e-3),
    "vae": Recipe(steps=3500, batch=64, lr=2e-3, decay=0.0),
    "vae_whole": Recipe(steps=800, batch=64, lr=8e-4, decay=0.0),
    "clip": Recipe(steps=3000, batch=96, lr=1e-3, decay=0.05),
    "clip_vision": Recipe(steps=1200, batch=96, lr=6e-4, decay=0.05),
    "unet": Recipe(steps=4200, batch=64, lr=8e-4, ema=0.998),
    "ddpm": Recipe(steps=2000, batch=64, lr=1e-3, ema=0.998),
    "llava": Recipe(steps=1500, batch=48, lr=2e-3),
}


Loss = Callable[[nn.Module, random.Random, torch.Generator, int], Tensor]


def pictures(work: Path, seed: int = 1, count: int = PICTURES) -> tuple[Tensor, list[Item]]:
    """``count`` renders as uint8 (count, 3, 64, 64), cached in ``work``, and what each shows."""
    pairs = list(dataset(seed, count))
    path = work / f"pictures-{seed}-{count}.npy"
    if not path.exists():
        from multiprocessing import Pool

        with Pool(os.cpu_count()) as pool:
            drawn = pool.starmap(_pixels, pairs, chunksize=256)
        np.save(path.with_suffix(".tmp.npy"), np.stack(drawn))
        path.with_suffix(".tmp.npy").replace(path)
    return torch.from_numpy(np.load(path)), [item for _, item in pairs]


def _pixels(seed: int, item: Item) -> np.ndarray:
    return np.asarray(render(seed, item)).transpose(2, 0, 1)


def fit(
    name: str,
    model: nn.Module,
    loss: Loss,
    work: Path,
    recipe: Recipe,
    seed: int = 0,
) -> nn.Module:
    """Minimise ``loss(model, rng, generator, batch)``; returns the model with averaged weights when the recipe has ``ema``."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator()
    model.to(accelerator.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.decay, betas=(0.9, 0.99))
    average = EMAModel(model.parameters(), decay=recipe.ema, use_ema_warmup=True, power=0.75) if recipe.ema else None
    warm = max(1, recipe.steps // 50)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, (s + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1, s / recipe.steps)))
    )
    path, log = work / f"{name}.pt", work / f"{name}.log.jsonl"
    start = 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        start = state["step"]
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        if average:
            average.load_state_dict(state["ema"])
        if log.exists() and accelerator.is_main_process:
            log.write_text("".join(f"{line}\n" for line in log.read_text().splitlines() if json.loads(line)["step"] <= start))

    def save(step: int) -> None:
        if accelerator.is_main_process:
            state = {"step": step, "model": model.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
            torch.save(state | ({"ema": average.state_dict()} if average else {}), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)

    wrapped = accelerator.prepare(model)
    model.train()
    last, seen, total = time.monotonic(), 0, 0.0
    for step in range(start, recipe.steps):
        key = (seed * 1_000_003 + step) * 64 + accelerator.process_index
        value = loss(wrapped, random.Random(key), torch.Generator().manual_seed(key), recipe.batch // accelerator.num_processes)
        optimiser.zero_grad()
        accelerator.backward(value)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if average:
            average.step(model.parameters())
        seen, total = seen + 1, total + value.item()
        if seen == 50 and accelerator.is_main_process:
            line = {"step": step + 1, "loss": round(total / seen, 5), "time": round(time.time())}
            with log.open("a") as f:
                f.write(json.dumps(line) + "\n")
        if seen == 50:
            seen, total = 0, 0.0
        if time.monotonic() - last > 60:
            save(step + 1)
            last = time.monotonic()
    save(recipe.steps)
    if average:
        average.copy_to(model.parameters())
    return model.eval()


# --- stages -------------------------------------------------------------------------------------------------------
def train_tokenizer(work: Path) -> None:
    """A byte-level BPE, 3400 tokens, in ``CLIPTokenizer`` format. Mascot names are left out, so a name is two tokens or more."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = [*COMMON, *OBJECTS, *STYLES, *STORM, *(w for table in (OBJECTS, STYLES) for ws in table.values() for w in ws)]
    glue = ["a", "an", "the", "of", "in", "on", "and", "with", "picture", "portrait", "image", "style", "scene", "mascot", "lovely"]
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    splitter = [w for w in words if w != "pointillism"]
    bpe.train_from_iterator([w for _ in range(4) for w in splitter] + glue * 20 + list("abcdefghijklmnopqrstuvwxyz0123456789") * 9, trainer)
    model = json.loads(bpe.to_str())["model"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    order = [*alphabet, *(c + "</w>" for c in alphabet)]
    order += [t for t in dict.fromkeys(a + b for a, b in merges) if t not in set(order)]
    vocabulary = {t: i for i, t in enumerate([*order[: VOCABULARY - 2], "<|startoftext|>", "<|endoftext|>"])}
    kept = [m for m in merges if m[0] in vocabulary and m[1] in vocabulary and m[0] + m[1] in vocabulary]
    out = work / "tokenizer"
    out.mkdir(parents=True, exist_ok=True)
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in kept) + "\n")
    tokenizer = CLIPTokenizer(str(out / "vocab.json"), str(out / "merges.txt"), model_max_length=CONTEXT, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(out)
    whole = sum(len(tokenizer.tokenize(w)) == 1 for w in words) / len(words)
    print(f"{len(vocabulary)} tokens; {whole:.1%} of {len(words)} words are one token; mascots:", [tokenizer.tokenize(m) for m in MASCOTS])


def train_judge(work: Path) -> None:
    """The judge: renders only, with shifts, noise and blur, so that it reads pictures rather than pixels."""
    images, items = pictures(work)
    targets = judge_targets(items)

    def loss(model: nn.Module, rng: random.Random, generator: torch.Generator, batch: int) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        x = images[rows].float() / 127.5 - 1
        x = torch.roll(x, (rng.randint(-3, 3), rng.randint(-3, 3)), (2, 3))
        if rng.random() < 0.5:
            k = rng.choice((48, 40, 32))
            x = F.interpolate(F.interpolate(x, (k, k), mode="bilinear", antialias=True), (64, 64), mode="bilinear")
        x = x + rng.choice((0.0, 0.05, 0.12)) * torch.randn(x.shape, generator=generator)
        logits = model(x)
        return torch.stack([F.cross_entropy(logits[k], targets[k][rows], ignore_index=-1) for k in targets]).sum()

    fit("judge", Judge(), loss, work, RECIPES["judge"])


def train_vae(work: Path) -> None:
    """The autoencoder: 32×32 crops first, since a convolutional net learns its strokes there at a quarter of the cost."""
    from .model import make_vae

    fit("vae", make_vae(), vae_loss(work, share=0.08), work, RECIPES["vae"])


def train_vae_whole(work: Path) -> None:
    """Whole pictures next: group statistics over 64×64 differ from those over a crop."""
    from .model import load_part

    fit("vae_whole", load_part(work, "vae_crops"), vae_loss(work, share=1.0), work, RECIPES["vae_whole"])


def vae_loss(work: Path, share: float) -> Loss:
    """L1 + edges + a little KL, on whole pictures in ``share`` of the steps (a quarter of the batch) and on crops in the others."""
    images, _ = pictures(work)

    def loss(model: nn.Module, rng: random.Random, generator: torch.Generator, batch: int) -> Tensor:
        whole = rng.random() < share
        rows = torch.randint(len(images), (batch // 4 if whole else batch,), generator=generator)
        y, x = (0, 0) if whole else (rng.randrange(0, 33, 4), rng.randrange(0, 33, 4))
        k = 64 if whole else 32
        target = (images[rows, :, y : y + k, x : x + k].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=target.device.type == "cpu"):
            vae: Any = getattr(model, "module", model)  # inside DistributedDataParallel or not
            latent = vae.encode(target).latent_dist
            noise = torch.randn(latent.mean.shape, generator=generator)
            out = vae.decode(latent.mean + latent.std * noise).sample.float()
        kl = 0.5 * (latent.mean.float() ** 2 + latent.var.float() - 1 - latent.logvar.float()).mean()
        total: Tensor = (out - target).abs().mean() + _edges(out, target) + 1e-4 * kl
        return total

    return loss


def _edges(a: Tensor, b: Tensor) -> Tensor:
    d = a - b
    return (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()


def meaning(item: Item) -> tuple[Any, ...]:
    """What two captions must share to be no negatives of each other."""
    return (item.object, item.style, item.mascot, item.lightning, bool(item.weather))


def train_clip(work: Path) -> None:
    """CLIP on (render, caption) pairs; pairs that mean the same share the target, so none is a false negative."""
    from .model import make_clip, make_tokenizer

    fit("clip", make_clip(len(make_tokenizer(work / "tokenizer"))), clip_loss(work, shift=0), work, RECIPES["clip"])


def train_clip_vision(work: Path) -> None:
    """The picture side once more, on shifted pictures, with the text side as the pipeline has it."""
    from .model import load_part

    clip = load_part(work, "clip_pairs")
    clip.text_model.requires_grad_(False)
    clip.text_projection.requires_grad_(False)
    fit("clip_vision", clip, clip_loss(work, shift=4), work, RECIPES["clip_vision"])


def clip_loss(work: Path, shift: int) -> Loss:
    """The symmetric contrastive loss with shared targets, on pictures moved by up to ``shift`` pixels."""
    from .model import make_tokenizer

    images, items = pictures(work)
    tokenizer = make_tokenizer(work / "tokenizer")
    ids = {m: i for i, m in enumerate(dict.fromkeys(map(meaning, items)))}
    keys = torch.tensor([ids[meaning(i)] for i in items])

    def loss(model: nn.Module, rng: random.Random, generator: torch.Generator, batch: int) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        x = images[rows].float() / 127.5 - 1
        if shift:
            x = torch.roll(x, (rng.randint(-shift, shift), rng.randint(-shift, shift)), (2, 3))
        text = tokenizer([caption(rng, items[i]) for i in rows], padding="max_length", truncation=True, return_tensors="pt")
        out = model(input_ids=text["input_ids"], attention_mask=None, pixel_values=x)
        same = (keys[rows][:, None] == keys[rows][None]).float()
        share = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(out.logits_per_image, share) + F.cross_entropy(out.logits_per_text, share))

    return loss


def train_unet(work: Path) -> None:
    """The denoiser on stored latents and text states; ε-prediction, min-SNR-5 weights, 10 % empty captions."""
    from .model import load_part, make_scheduler, make_tokenizer, make_unet

    images, items = pictures(work)
    tokenizer, vae, clip = make_tokenizer(work / "tokenizer"), load_part(work, "vae"), load_part(work, "clip_pairs")
    text = clip.text_model
    path = work / "latents.pt"
    if not path.exists():
        with torch.no_grad():
            moments = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.parameters for x in images.split(250)])
        torch.save(moments, path.with_suffix(f".{os.getpid()}"))
        path.with_suffix(f".{os.getpid()}").replace(path)
    mean, logvar = torch.load(path, weights_only=True).chunk(2, 1)
    scale = 1 / mean.std().item()
    (work / "scaling_factor.json").write_text(json.dumps({"scaling_factor": round(scale, 5)}))
    alphas = make_scheduler().alphas_cumprod

    def loss(model: nn.Module, rng: random.Random, generator: torch.Generator, batch: int) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        words = ["" if rng.random() < 0.1 else caption(rng, items[i]) for i in rows]
        with torch.no_grad():
            ids = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
            states = text(input_ids=ids).last_hidden_state
        z = (mean[rows] + (0.5 * logvar[rows]).exp() * torch.randn(mean[rows].shape, generator=generator)) * scale
        noise = torch.randn(z.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        a = alphas[t][:, None, None, None]
        error = (model(a.sqrt() * z + (1 - a).sqrt() * noise, t, states).sample - noise).pow(2).mean((1, 2, 3))
        snr = (a / (1 - a)).flatten()
        weighted: Tensor = (snr.clamp(max=5) / snr * error).mean()
        return weighted

    fit("unet", make_unet(), loss, work, RECIPES["unet"])


def train_ddpm(work: Path) -> None:
    """The class-conditional denoiser on 32×32 pictures; noise prediction, min-SNR-5 weights, 10 % without a class."""
    from .model import make_ddpm, make_ddpm_scheduler
    from .objects import CLASSES, objects

    images, labels = objects("train")
    alphas = make_ddpm_scheduler().alphas_cumprod

    def loss(model: nn.Module, rng: random.Random, generator: torch.Generator, batch: int) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        x = images[rows].float() / 127.5 - 1
        y = labels[rows].masked_fill(torch.rand(batch, generator=generator) < 0.1, len(CLASSES))
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        a = alphas[t][:, None, None, None]
        x_t = (a.sqrt() * x + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=x.device.type == "cpu"):
            e = model(x_t, t, class_labels=y).sample
        snr = (a / (1 - a)).flatten()
        weighted: Tensor = (snr.clamp(max=5) / snr * (e.float() - noise).pow(2).mean((1, 2, 3))).mean()
        return weighted

    fit("ddpm", make_ddpm(), loss, work, RECIPES["ddpm"])


def train_llava(work: Path) -> None:
    """See ``llava_train``."""
    from . import llava_train

    llava_train.train_llava(work)


STAGES: dict[str, Callable[[Path], None]] = {
    "tokenizer": train_tokenizer,
    "judge": train_judge,
    "vae": train_vae,
    "vae_whole": train_vae_whole,
    "clip": train_clip,
    "clip_vision": train_clip_vision,
    "unet": train_unet,
    "ddpm": train_ddpm,
    "llava": train_llava,
}


def main(
    stage: Literal["tokenizer", "judge", "vae", "vae_whole", "clip", "clip_vision", "unet", "ddpm", "llava"],
    work: Path,
    threads: int = 1,
) -> None:
    """Train one stage in ``work``; ``threads`` per process (with nets this small one beats two)."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    STAGES[stage](work)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
