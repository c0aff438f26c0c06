"""Erasures come together and apart: two patches on one pipeline erase both concepts, and taking one off brings its concept back."""

from __future__ import annotations

from pathlib import Path

import torch

from unlearners import judges, load, patch, run, tasks
from unlearners.base import Target

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
