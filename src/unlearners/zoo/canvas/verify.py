"""Recompute what the zoo card claims: the judge on held-out renders, the pipelines under the judge, CLIP zero-shot."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...base import Data, Score, rate
from ...metrics.fid import distance
from ...targets import load
from . import FOLDER, load_judge
from .model import HEADS, judge_targets
from .questions import UNKNOWN, WORDINGS
from .questions import asked as asks
from .world import MASCOTS, OBJECTS, Item, dataset, grid, official, render, shifted

HELD_OUT = 900_001  # a dataset seed no training stage uses
BARS = {
    "judge": 99.0,
    "pipeline": 95.0,
    "clip": 95.0,
    "classifier": 95.0,
    "ddpm": 95.0,
    "finetuned": 90.0,
    "llava": 95.0,
    "llava yes or no": 90.0,
}
SEEDS = (188, 288, 588, 688, 888)
LABELS = {"name": "mascot", "object": "object", "style": "style", "check": "yes or no"}  # of the LLaVA's rows


def pixels(pairs: list[tuple[int, Item]], draw: Callable[[int, Item], Any] = render) -> Tensor:
    """Renders (B, 3, 64, 64) in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(draw(s, i)).transpose(2, 0, 1) for s, i in pairs])).float() / 255


@torch.no_grad()
def judged(images: Tensor, items: list[Item]) -> dict[str, Score]:
    """The judge's agreement with what ``items`` say, by head."""
    judge = load_judge()
    parts = [judge(x * 2 - 1) for x in images.split(250)]
    targets = judge_targets(items)
    hits = {k: torch.cat([p[k] for p in parts]).argmax(1) == targets[k] for k in HEADS}
    return {k: rate(hits[k][targets[k] >= 0].tolist()) for k in HEADS}


@torch.no_grad()
def zero_shot(images: Tensor, items: list[Item]) -> dict[str, Score]:
    """CLIP zero-shot accuracy: the nearest of the 96 official prompts says object and style, the nearest of the 8 names the mascot."""
    from transformers import CLIPModel

    from .model import make_tokenizer

    clip, tokenizer = CLIPModel.from_pretrained(FOLDER / "clip").float().eval(), make_tokenizer(FOLDER / "clip")
    pictures = torch.cat([_norm(_features(clip.get_image_features(pixel_values=x * 2 - 1))) for x in images.split(250)])

    def text(prompts: list[str]) -> Tensor:
        ids = tokenizer(prompts, padding="max_length", max_length=32, truncation=True, return_tensors="pt")["input_ids"]
        return _norm(_features(clip.get_text_features(input_ids=ids)))

    def nearest(candidates: list[Item], rows: list[int]) -> list[tuple[Item, Item]]:
        found = (pictures[rows] @ text([official(c) for c in candidates]).T).argmax(1).tolist()
        return [(candidates[k], items[i]) for k, i in zip(found, rows, strict=True)]

    cells = nearest(list(grid()), [k for k, i in enumerate(items) if i.object and not i.weather])
    mascots = nearest([Item(mascot=m) for m in MASCOTS], [k for k, i in enumerate(items) if i.mascot])
    return {
        "object": rate([said.object == true.object for said, true in cells]),
        "style": rate([said.style == true.style for said, true in cells]),
        "mascot": rate([said.mascot == true.mascot for said, true in mascots]),
    }


def _features(out: Any) -> Tensor:
    """Projected features: a tensor in transformers 4, an output object in transformers 5."""
    features: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return features


def _norm(x: Tensor) -> Tensor:
    unit: Tensor = x / x.norm(dim=-1, keepdim=True)
    return unit


def classes_drawn(classifier: Any, seeds: int = 20) -> dict[str, Score]:
    """How often the classifier and the judge find the class that the DDPM was asked for: ``seeds`` pictures of each."""
    ddpm: Any = load("canvas-ddpm")
    asked = [c for c in ddpm.classes for _ in range(seeds)]
    drawn = ddpm.sample(asked, range(len(asked)))
    with torch.no_grad():
        found = [classifier.classes[i] for i in classifier.logits(drawn).argmax(1).tolist()]
    large = torch.nn.functional.interpolate(drawn, scale_factor=2.0, mode="bilinear")
    judge = judged(large, [Item(object=c) for c in asked])["object"]
    return {"object by classifier": rate([a == b for a, b in zip(asked, found, strict=True)]), "object by judge": judge}


def answered(images: Tensor, items: list[Item]) -> dict[str, Score]:
    """How often the LLaVA names the object, the style and the mascot, abstains where there is no mascot, and says rightly yes or no."""
    llava: Any = load("canvas-llava")
    rng = random.Random(HELD_OUT)
    asked = [(k, asks(rng, i, kind)) for k, i in enumerate(items) for kind in WORDINGS]
    said = llava.answer(images[[k for k, _ in asked]], [q.text for _, q in asked], batch=200)
    found: dict[str, list[bool]] = {}
    for (_, q), s in zip(asked, said, strict=True):
        found.setdefault("abstention" if q.answer == UNKNOWN else LABELS[q.kind], []).append(s == q.answer)
    return {k: rate(found[k]) for k in sorted(found)}


def fidelity(drawn: Tensor, items: list[Item]) -> float:
    """FID, in the judge's features, of pictures (B, 3, 64, 64) in [0, 1] to shifted renders of the same ``items``."""
    real = pixels([(HELD_OUT * 10_000_019 + k, i) for k, i in enumerate(items)], shifted)
    return distance("canvas_judge", drawn.split(250), real.split(250))


def verify(
    *, pictures: int = 4000, progress: Callable[[str, int, int, dict[str, float]], None] | None = None, write: bool = False
) -> dict[str, Any]:
    """Measure the zoo. Returns {"rows", "short", "bytes", "seconds"}: ``short`` names what misses its bar. ``write`` rewrites the card."""
    torch.set_num_threads(1)  # nets this small gain nothing from a second thread, and two such processes would fight
    started = time.monotonic()
    pairs = list(dataset(HELD_OUT, pictures))
    images, items = pixels(pairs), [i for _, i in pairs]
    rows: list[dict[str, Any]] = []

    def add(part: str, scores: dict[str, Score]) -> None:
        for name, s in scores.items():
            if s.n:
                row = {"part": part, "what": name, "value": s.value, "n": s.n, "low": s.low, "high": s.high}
                rows.append(row | {"bound": "at least", "bar": BARS.get(f"{part} {name}", BARS[part])})

    add("judge", judged(images, items))
    add("clip", zero_shot(images, items))
    add("llava", answered(images[:1000], items[:1000]))
    asked = [*grid(), *(Item(mascot=m) for m in MASCOTS), *(Item(object=o, weather="storm", lightning=True) for o in OBJECTS)]
    wanted = [(i, s) for i in asked for s in SEEDS]
    target: Any = load("canvas")
    small: Any = load("canvas-classifier")
    logits, labels = small.predict(small.open(Data(source="canvas", split="test")))
    add("classifier", {"object": rate((logits.argmax(1) == labels).tolist())})
    done = [0]

    def tick(n: int) -> None:
        done[0] += n
        if progress:
            progress("drawing the grid", done[0], 2 * len(wanted), {})

    prompts, seeds = [official(i) for i, _ in wanted], [s for _, s in wanted]
    drawn = target.sample(prompts, seeds, progress=tick)
    cells = [k for k, (i, _) in enumerate(wanted) if i.object and not i.weather]
    on_grid = judged(drawn[cells], [wanted[k][0] for k in cells])
    add("pipeline", {k: on_grid[k] for k in ("object", "style")})
    named = [k for k, (i, _) in enumerate(wanted) if i.mascot]
    add("pipeline", {"mascot": judged(drawn[named], [wanted[k][0] for k in named])["mascot"]})
    storms = [k for k, (i, _) in enumerate(wanted) if i.weather]
    add("pipeline", {"lightning": judged(drawn[storms], [wanted[k][0] for k in storms])["lightning"]})
    tuned: Any = load("canvas-finetuned")
    again = tuned.sample(prompts, seeds, progress=tick)
    add("finetuned", {k: v for k, v in judged(again[cells], [wanted[k][0] for k in cells]).items() if k in ("object", "style")})
    subjects = [i for i, _ in wanted]
    ours, below = fidelity(again, subjects), fidelity(drawn, subjects)
    fid = {"part": "finetuned", "what": "FID to shifted renders, not %", "value": ours, "n": len(again)}
    rows.append(fid | {"low": None, "high": None, "bound": "below", "bar": below})
    add("ddpm", classes_drawn(small))
    size = sum(p.stat().st_size for p in FOLDER.parent.rglob("*.safetensors"))
    short = [f"{r['part']} {r['what']} {r['value']:.1f} is not {r['bound']} {r['bar']:.1f}" for r in rows if not reaches(r)]
    if size > 32 * 2**20:
        short.append(f"weights {size / 2**20:.1f} MB > 32 MB")
    result = {"rows": rows, "short": short, "bytes": size, "seconds": time.monotonic() - started}
    if write:
        card(result)
    return result


def reaches(row: dict[str, Any]) -> bool:
    """Whether a measured value is where its bar wants it."""
    return bool(row["value"] < row["bar"] if row["bound"] == "below" else row["value"] >= row["bar"])


def card(result: dict[str, Any]) -> None:
    """Rewrite ``card.json`` and the table of the zoo card from a measurement."""
    (FOLDER / "card.json").write_text(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=1) + "\n")
    lines = ["| part | what | agreement % | 95 % interval | n | bar |", "|---|---|---|---|---|---|"]
    for r in result["rows"]:
        within = "–" if r["low"] is None else f"{r['low']:.1f}–{r['high']:.1f}"
        bar = f"{r['bar']:.0f}" if r["bound"] == "at least" else f"{r['bound']} {r['bar']:.1f}"
        lines.append(f"| {r['part']} | {r['what']} | {r['value']:.1f} | {within} | {r['n']} | {bar} |")
    path = Path(FOLDER / "README.md")
    head, _, rest = path.read_text().partition("<!-- measured -->")
    tail = rest.partition("<!-- end -->")[2]
    path.write_text(f"{head}<!-- measured -->\n" + "\n".join(lines) + f"\n\nWeights: {result['bytes'] / 2**20:.1f} MB.\n<!-- end -->{tail}")
