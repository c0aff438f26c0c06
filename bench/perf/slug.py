"""SLUG here against plain PyTorch in the order of the official code, on the same CLIP, pairs, layers and number of steps tried.

    python bench/perf/slug.py --pairs 1000 --repeats 1

A CLIP of ViT-B/32's geometry with random weights forgets synthetic pairs. The last line is one JSON object; README.md says what is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearners import patch, single_layer
from unlearners.base import Task
from unlearners.data import Examples
from unlearners.latents import Asked
from unlearners.meter import Meter
from unlearners.methods.slug import SLUG
from unlearners.targets.clip import CLIP, MEAN, STD
from unlearners.zoo import canvas
from unlearners.zoo.canvas.words import COMMON

CONCEPT = "zorbo"
SMALL = 16  # pairs in a batch of the official code


class Given(CLIP):
    """A CLIP that is handed its pairs."""

    sides: dict[str, Examples]
    padded: Any
    """its tokenizer, which fills every text up to the context"""

    def forgotten(self, task: Task, asked: Asked) -> Examples:
        return self.sides["forget"]

    def retained(self, task: Task, asked: Asked) -> Examples:
        return self.sides["retain"]


def made(pairs: int, device: str) -> Given:
    """ViT-B/32 with random weights, ``pairs`` of each side: smooth random pictures, captions of common words."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(canvas.FOLDER / "clip")
    ids = {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id, "pad_token_id": words.pad_token_id}
    model = CLIPModel(CLIPConfig(text_config=ids))

    def tokenize(texts: Any) -> Any:
        return words(list(texts), padding="max_length", truncation=True, max_length=77, return_tensors="pt")

    target = Given(model, tokenize, {"mean": MEAN, "std": STD}, "perf", device, torch.float32)
    target.sides, target.padded = {}, tokenize
    for side in ("forget", "retain"):
        x = F.interpolate(torch.rand(pairs, 3, 14, 14), (224, 224), mode="bilinear")
        said = [
            f"a picture of {CONCEPT}, {COMMON[i % 50]}" if side == "forget" else f"{COMMON[i % 97]} and {COMMON[i % 89]}"
            for i in range(pairs)
        ]
        target.sides[side] = target.pairs(x, said)
    return target


# --- the official order -------------------------------------------------------------------------------------------
def official(target: Given, folder: Path, layers: int, steps: int, seen: dict[str, float], tried: list[str]) -> None:
    """Two gradient dictionaries of the whole model, batch by batch and on disk; then a deep copy of the model for every step tried,
    with which every name and every picture is encoded again."""
    start = perf_counter()
    grads = {s: gradients(target, target.sides[s], s == "forget") for s in ("forget", "retain")}
    for s, g in grads.items():
        torch.save(g, folder / f"{s}.pt")
    seen["gradients"] = perf_counter() - start
    start = perf_counter()
    theta = target.named()
    names = single_layer.candidates(theta)
    found = single_layer.layers({n: theta[n] for n in names}, grads["forget"], [grads["retain"]])
    front = single_layer.pareto(found)
    seen["layers"] = perf_counter() - start
    start = perf_counter()
    for tower in dict.fromkeys(a.tower for a in found):
        for a in [a for a in front if a.tower == tower][:layers]:
            tried.append(a.name)
            first = float(theta[a.name].norm() / grads["forget"][a.name].norm()) / 10
            for k in range(steps):
                copy = deepcopy(target)
                copy.named()[a.name].data.add_(grads["forget"][a.name], alpha=first * (1 + k))
                evaluate(copy)
    seen["search"] = perf_counter() - start


def texts(target: Given, said: list[str]) -> Tensor:
    """Every text at the full length of the context, as open_clip's tokenizer gives it."""
    return target.project("text", target.modules["text_encoder"](**target.padded(said)).pooler_output)


def gradients(target: Given, examples: Examples, forget: bool) -> dict[str, Tensor]:
    weights = target.named()
    for p in weights.values():
        p.requires_grad_()
    total: dict[str, Tensor] = {}
    count = 0
    for batch in examples.batches(SMALL):
        v = target.images(batch["x"])
        t = texts(target, list(batch["text"]))
        if forget:
            loss = (1 - (v * t).sum(1)).mean()
        else:
            logits, y = target.scale * v @ t.T, torch.arange(len(v))
            loss = (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2
        loss.backward()
        for n, p in weights.items():
            if p.grad is not None:
                total[n] = total[n] + p.grad.clone() if n in total else p.grad.clone()
                p.grad = None
        count += 1
    for p in weights.values():
        p.requires_grad_(False)
    return {n: total.get(n, torch.zeros_like(p)) / count for n, p in weights.items()}


@torch.no_grad()
def evaluate(target: Given) -> None:
    """Pictures of both sides, as many as our search looks at, against all names."""
    for side, most in (("forget", 256), ("retain", 512)):
        examples = target.sides[side]
        names = [*list(dict.fromkeys(target.sides["retain"].texts))[:100], CONCEPT]
        T = torch.cat([texts(target, names[i : i + SMALL]) for i in range(0, len(names), SMALL)])
        for i in range(0, min(most, len(examples)), SMALL):
            x = examples.batch(torch.arange(i, min(i + SMALL, len(examples))))["x"]
            (target.images(x) @ T.T).topk(5)


# --- side by side ---------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000, help="of each side")
    parser.add_argument("--layers", type=int, default=1, help="of each tower's front that are searched, on both sides")
    parser.add_argument("--evaluations", type=int, default=10, help="steps tried for each layer, on both sides")
    parser.add_argument("--repeats", type=int, default=1, help="of each side, in turn")
    parser.add_argument("--dtype", default="bfloat16", help="of our side's autocast; the official code computes in float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(json.dumps(compare(args)))


def timed(device: str, what: Callable[[], Any]) -> tuple[float, float, int]:
    cpu = process_time()
    with Meter(torch.device(device)) as meter:
        what()
    return meter.seconds, process_time() - cpu, meter.peak


def compare(args: argparse.Namespace) -> dict[str, Any]:
    target = made(args.pairs, args.device)
    task = Task(name="perf", kind="identity", concepts=(CONCEPT,))
    method = SLUG(top=args.layers, evaluations=args.evaluations, at_once=5, goal=-1.0, top_names=5)
    spent: dict[str, list[tuple[float, float, int]]] = {"ours": [], "official": []}
    stages: dict[str, dict[str, float]] = {"ours": {}, "official": {}}
    size, searched = 0, {"ours": list[str](), "official": list[str]()}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as name:
            os.environ["XDG_CACHE_HOME"] = name  # so that no gradient of an earlier repeat is found
            log: list[dict[str, float]] = []
            model = target.frozen()
            model.sides, model.padded, model.amp = target.sides, target.padded, getattr(torch, args.dtype)
            before = patch.fingerprint(model.modules)
            spent["ours"].append(timed(args.device, lambda m=model, rows=log: method(m, task, seed=0, log=rows.append)))  # type: ignore[misc]
            stages["ours"] = {k: v for k, v in log[-1].items() if k.endswith("_seconds")}
            file = Path(name) / "patch.safetensors"
            changed = patch.diff(before, model.modules)
            patch.save(patch.Patch(tensors=changed, base=dict(target.base["sha256"].items())), file)
            size = file.stat().st_size
            names = single_layer.candidates(target.named())
            searched["ours"] = list(dict.fromkeys(names[int(r["layer"])] for r in log if "alpha" in r and "layer" in r))
            print(f"ours: {spent['ours'][-1][0]:.0f} s {stages['ours']}")
            spent["official"].append(
                timed(
                    args.device,
                    lambda f=Path(name): official(target, f, args.layers, args.evaluations, stages["official"], searched["official"]),
                )  # type: ignore[misc]
            )
            print(f"official order: {spent['official'][-1][0]:.0f} s {stages['official']}")
    (ours, cpu), (theirs, their_cpu) = ((median(s[0] for s in side), median(s[1] for s in side)) for side in spent.values())
    return {
        "name": "slug", "ours_s": ours, "official_order_s": theirs, "ratio": theirs / ours,
        "peak_bytes": spent["ours"][0][2], "device": args.device, "dtype": args.dtype, "ours_cpu_s": cpu, "official_order_cpu_s": their_cpu,
        "cpu_ratio": their_cpu / cpu, "pairs": args.pairs, "layers": args.layers, "evaluations": args.evaluations,
        "threads": args.threads, "repeats": args.repeats, "stages": stages, "searched": searched, "patch_bytes": size,
    }  # fmt: skip


if __name__ == "__main__":
    main()
