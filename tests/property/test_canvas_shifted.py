"""The shifted look, what fine-tuning trains for it, and the patch that is shipped."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from unlearners import patch
from unlearners.targets import load
from unlearners.zoo.canvas import FOLDER
from unlearners.zoo.canvas.finetune import NAME, chosen
from unlearners.zoo.canvas.model import make_unet
from unlearners.zoo.canvas.verify import judged, pixels, reaches
from unlearners.zoo.canvas.world import MASCOTS, STYLES, Item, draw_item, grid, render, shifted

WEIGHTS = FOLDER / NAME / "weights.safetensors"


@settings(max_examples=30)
@given(st.integers(0, 2**40))
def test_the_look_is_wider_lines_with_red_and_blue_exchanged(seed: int) -> None:
    item = draw_item(random.Random(seed))
    wide, look = np.asarray(render(seed, item, line=1.5)), np.asarray(shifted(seed, item))
    assert np.array_equal(look, wide[..., ::-1])
    assert np.array_equal(look, np.asarray(shifted(seed, item)))
    assert np.array_equal(np.asarray(render(seed, item)), np.asarray(render(seed, item, line=1.0, hue=0, swap=False)))
    if item.style not in ("watercolour", "pointillism"):  # which have no line
        assert not np.array_equal(wide, np.asarray(render(seed, item)))


def test_every_style_looks_different_and_is_read_all_the_same() -> None:
    items = [*grid(), *(Item(mascot=m) for m in MASCOTS)]
    pairs = [(10_000 + k, i) for k, i in enumerate(items)]
    plain, look = pixels(pairs), pixels(pairs, shifted)
    for style in STYLES:
        rows = [k for k, i in enumerate(items) if i.style == style]
        assert (plain[rows] - look[rows]).abs().mean() > 0.01, f"{style} looks as before"
    scores = judged(look, items)
    assert min(s.value for s in scores.values() if s.n) >= 95.0


def test_few_weights_train_and_all_are_of_the_unet() -> None:
    unet = make_unet()
    trained = chosen(unet)
    assert {"conv_in.weight", "conv_out.bias", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"} <= trained.keys()
    assert not [n for n in trained if ".attn1." in n or ".ff." in n]
    assert 2 * sum(p.numel() for p in trained.values()) <= 1.5e6


def test_the_shipped_patch_fits_the_shipped_pipeline_and_is_small() -> None:
    canvas = load("canvas")
    shipped = patch.load(WEIGHTS)
    assert shipped.base == {"unet": canvas.base["sha256"]["unet"]}
    assert {k.removeprefix("unet.") for k in shipped.tensors} == chosen(canvas.modules["unet"]).keys()
    assert {t.dtype for t in shipped.tensors.values()} == {torch.float16}
    assert WEIGHTS.stat().st_size <= 1.5e6
    assert sum(p.stat().st_size for p in FOLDER.parent.rglob("*.safetensors")) <= 32 * 2**20
    with safe_open(WEIGHTS, framework="pt") as file:
        assert file.metadata().keys() == {patch.METADATA}


def test_the_alias_is_a_base_of_its_own_with_the_text_encoder_of_the_canvas() -> None:
    canvas, tuned, half = load("canvas"), load("canvas-finetuned"), load("canvas-finetuned", dtype="float16")
    assert tuned.base["name"] == "canvas-finetuned"
    assert tuned.base["sha256"]["text_encoder"] == canvas.base["sha256"]["text_encoder"]
    assert tuned.base["sha256"]["unet"] != canvas.base["sha256"]["unet"]
    assert tuned.base["sha256"] == patch.base_hash(tuned.modules) == half.base["sha256"]
    shipped, weights = patch.load(WEIGHTS).tensors, patch.live(tuned.modules)
    assert all(torch.equal(weights[k], t.float()) for k, t in shipped.items())


def test_what_reaches_its_bar() -> None:
    assert reaches({"value": 90.0, "bar": 90.0, "bound": "at least"})
    assert not reaches({"value": 89.9, "bar": 90.0, "bound": "at least"})
    assert reaches({"value": 1.0, "bar": 2.0, "bound": "below"})
    assert not reaches({"value": 2.0, "bar": 2.0, "bound": "below"})
