"""UCE here against plain PyTorch in the order of the official code, at the real geometry of Stable Diffusion 1.4, random weights.

    python bench/perf/uce.py

Needs no download: the UNet and the text tower have SD 1.4's configuration and random weights, the tokenizer is the canvas'. There is no
VAE. Both sides encode each phrase once, edit the same 32 matrices for the same phrases and write them to a file. The last line is one
JSON object: ``ours_s`` and ``official_order_s`` are wall-clock seconds from the loaded model to the written file, ``*_cpu_s`` the
process' CPU seconds (take those on a machine with other work), ``encode_s`` the text encoder's share of ours, ``solve_s`` what ours spends
on the solution and the new matrices, ``patch_s`` what it spends on finding the changed tensors by their hashes and writing them.
``difference`` is the largest difference of the two sides' matrices, relative to the largest weight.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unlearners import closed_form, patch
from unlearners.base import Task
from unlearners.meter import Meter
from unlearners.methods.uce import UCE
from unlearners.targets import DTYPES
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.zoo import canvas

TEXT: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}


# --- the model ----------------------------------------------------------------------------------------------------
def random_weights(build: Callable[[], Any], dtype: torch.dtype, device: str) -> nn.Module:
    """A module whose matrices are normal with deviation 0.02 and whose norms are as they begin, made without a float32 copy."""
    with torch.device("meta"):
        module: nn.Module = build()
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for p in module.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02)
        else:
            nn.init.zeros_(p)
    for m in module.modules():
        if isinstance(m, nn.LayerNorm | nn.GroupNorm):
            nn.init.ones_(m.weight)
    for name, buffer in module.named_buffers():
        if not name.endswith("position_ids"):
            raise SystemExit(f"{name} would stay uninitialised")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module


def sd14(dtype: torch.dtype, device: str) -> StableDiffusion:
    """A target with SD 1.4's UNet and text tower, and nothing else."""
    tokenizer = CLIPTokenizer.from_pretrained(canvas.FOLDER / "sd" / "tokenizer")
    tokenizer.model_max_length = 77
    unet = random_weights(lambda: UNet2DConditionModel(**UNET), dtype, device)
    text = random_weights(lambda: CLIPTextModel(CLIPTextConfig(**TEXT)), dtype, device)
    parts = {"unet": unet, "text_encoder": text, "vae": nn.Identity(), "tokenizer": tokenizer, "scheduler": DDIMScheduler()}
    return StableDiffusion(SimpleNamespace(device=device, **parts), "sd14-geometry")


# --- the official order -------------------------------------------------------------------------------------------
@torch.no_grad()
def official(target: StableDiffusion, task: Task, method: UCE, path: Path) -> dict[str, Tensor]:
    """Matrix by matrix: both sums, phrase by phrase, from outer products of every position; an inverse in float32; then one file."""
    pairs, keep = closed_form.phrases(task, method.templates)
    texts = {p: (s.float(), i) for p, (s, i) in read_singly(target, [*(p for pair in pairs for p in pair), *keep]).items()}
    rows = []
    for concept, guide in pairs:
        (c, i), (g, j) = texts[concept], texts[guide]
        n = min(len(c) - i, len(g) - j)
        rows.append((method.erase_scale, c[i : i + n], g[j : j + n]))
    beta = method.preserve_scale or max(0.1, 1 / len(keep))
    rows += [(beta, texts[p][0], texts[p][0]) for p in keep]
    new = {}
    for name, matrix in target.select(method.params).items():
        W = matrix.float()
        left, right = method.lamb * W, method.lamb * torch.eye(W.shape[1], device=W.device)
        for weight, context, instead in rows:
            values = instead @ W.T  # (n, out)
            left = left + weight * (values[:, :, None] @ context[:, None, :]).sum(0)
            right = right + weight * (context[:, :, None] @ context[:, None, :]).sum(0)
        new[name] = (left @ torch.inverse(right)).to(matrix.dtype)
    torch.save({k: t.cpu() for k, t in new.items()}, path)
    return new


def read_singly(target: StableDiffusion, prompts: list[str]) -> dict[str, tuple[Tensor, int]]:
    return {p: closed_form.read(target, [p])[p] for p in dict.fromkeys(prompts)}


# --- measuring ----------------------------------------------------------------------------------------------------
def timed(what: Callable[[], Any], device: str) -> tuple[float, float, int, Any]:
    """Wall-clock seconds, CPU seconds, peak bytes, and what came back."""
    cpu = process_time()
    with Meter(torch.device(device)) as meter:
        found = what()
    return meter.seconds, process_time() - cpu, meter.peak, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preserve", type=int, default=0, help="preserved names, each in four phrases, beside the empty prompt")
    parser.add_argument("--repeats", type=int, default=3, help="of ours; the official order runs once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float16", choices=list(DTYPES), help="of the weights, and so of the patch")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(compare(args, Path(name))))


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    target = sd14(DTYPES[args.dtype], args.device)
    names = tuple(f"painter {chr(97 + i)}" for i in range(args.preserve))
    task, method = Task(name="perf", kind="style", concepts=("van gogh",), anchors=("art",), preserve=names), UCE()
    start = patch.fingerprint(target.modules)  # an erasure has it from loading on
    old = {n: p.clone() for n, p in target.select(method.params).items()}
    print(f"{len(old)} matrices, {sum(p.numel() for p in old.values()) / 1e6:.1f} M weights of {args.dtype}", flush=True)
    pairs, keep = closed_form.phrases(task, ())
    prompts = list(dict.fromkeys([*(p for pair in pairs for p in pair), *keep]))
    with torch.no_grad():
        encode = timed(lambda: closed_form.read(target, prompts), args.device)
    file, spent, size, patched = folder / "weights.safetensors", [], 0, []
    for i in range(args.repeats):

        def ours() -> None:
            method(target, task)
            began = perf_counter()
            tensors = patch.diff(start, target.modules)
            patch.save(patch.Patch(tensors=tensors, base={"unet": target.base["sha256"]["unet"]}), file)
            patched.append(perf_counter() - began)

        spent.append(timed(ours, args.device))
        size = file.stat().st_size
        new = {n: p.clone() for n, p in target.select(method.params).items()}
        for n, p in target.select(method.params).items():
            p.data.copy_(old[n])
        print(f"ours {i + 1}: {spent[-1][0]:.2f} s, {patched[-1]:.2f} s of them for the patch of {size / 1e6:.1f} MB", flush=True)
    wall, cpu, _, theirs = timed(lambda: official(target, task, method, folder / "official.pt"), args.device)
    print(f"official order: {wall:.1f} s", flush=True)
    ours_s, ours_cpu, patch_s = median(s[0] for s in spent), median(s[1] for s in spent), median(patched)
    return {
        "name": "uce", "ours_s": ours_s, "official_order_s": wall, "ratio": wall / ours_s,
        "peak_bytes": spent[0][2],  # of the process: the model, and the first of our runs
        "device": args.device, "patch_bytes": size, "ours_cpu_s": ours_cpu, "official_order_cpu_s": cpu, "cpu_ratio": cpu / ours_cpu,
        "encode_s": encode[0], "solve_s": ours_s - encode[0] - patch_s, "patch_s": patch_s, "encode_cpu_s": encode[1],
        "prompts": len(prompts), "matrices": len(old), "weights": sum(p.numel() for p in old.values()),
        "dtype": args.dtype, "threads": args.threads, "repeats": args.repeats, "seconds": [s[0] for s in spent],
        "difference": max(((new[n] - theirs[n]).abs().max() / old[n].abs().max()).item() for n in new),
    }  # fmt: skip


if __name__ == "__main__":
    main()
