"""Erasures come together and apart: two patches on one pipeline erase both concepts, and taking one off brings its concept back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unlearners import judges, load, patch, run, tasks
from unlearners.base import Target
from unlearners.methods.slug import SLUG

SEEDS = list(range(8))


def shown(target: Target, name: str) -> float:
    """The share of pictures of a concept's own prompts that show it."""
    task = tasks.load(name)
    prompts = [p.prompt for p in task.probes if task.names_concept(p)][: len(SEEDS)]
    pictures = target.sample(prompts, SEEDS[: len(prompts)])  # type: ignore[attr-defined]
    found = judges.load(task.judge).shows(pictures, task)
    return sum(found) / len(found)


def test_two_stacked_erasures_erase_both_and_one_comes_off(tmp_path: Path) -> None:
    neon, fish = (run.erase("uce", "canvas", f"canvas/{c}", runs=tmp_path) for c in ("neon", "fish"))
    both = load("canvas", patches=[str(neon), str(fish)])
    assert shown(both, "canvas/neon") <= 0.25
    assert shown(both, "canvas/fish") <= 0.25

    base = load("canvas")
    first, second = (patch.to_delta(patch.load(f / "weights.safetensors"), base.modules) for f in (neon, fish))
    patch.subtract(both.modules, base.base["sha256"], second, force=True)
    assert shown(both, "canvas/neon") <= 0.25
    assert shown(both, "canvas/fish") >= 0.75

    stacked = patch.stack([first, second], base.modules)
    patch.apply(base.modules, base.base["sha256"], patch.without(stacked, first, base.modules))
    assert shown(base, "canvas/fish") <= 0.25
    assert shown(base, "canvas/neon") >= 0.75
    alone = load("canvas", patches=[str(fish)])
    for name, weight in patch.live(base.modules).items():
        torch.testing.assert_close(weight, patch.live(alone.modules)[name], atol=1e-6, rtol=1e-5)


def named(target: Target, mascot: str) -> float:
    """The share of test pictures of a mascot that CLIP names right, among all mascots."""
    clip: Any = target
    found = clip.open(replace(tasks.load(f"clip/{mascot}").holdout, rows=f"class={mascot}"))
    logits, y = clip.predict(found)
    return float((logits.argmax(1) == y).float().mean())


def test_taking_off_one_of_three_edits_of_a_clip_brings_back_its_concept_alone(tmp_path: Path) -> None:
    mascots = ("zorbo", "pimlu", "fenwin")
    slug = SLUG(params="vision", pairs=128, top=1, top_names=1, evaluations=6, at_once=3, tolerance=5.0)
    base = load("canvas-clip")
    edits = {}
    for m in mascots:
        folder = run.erase(slug, "canvas-clip", f"clip/{m}", runs=tmp_path)
        edits[m] = patch.to_delta(patch.load(folder / "weights.safetensors"), base.modules)
    assert min(named(base, m) for m in mascots) >= 0.9
    stacked = patch.stack(list(edits.values()), base.modules)
    patch.apply(base.modules, base.base["sha256"], stacked)
    assert max(named(base, m) for m in mascots) <= 0.25
    for m in mascots:
        without = load("canvas-clip")
        patch.apply(without.modules, without.base["sha256"], patch.without(stacked, edits[m], without.modules))
        assert named(without, m) >= 0.75
        assert max(named(without, o) for o in mascots if o != m) <= 0.25
