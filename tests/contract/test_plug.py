"""Plug-and-play: an erasure of one model put into another, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unlearners import load, patch, run, tasks
from unlearners.errors import RefusedError, UsageError
from unlearners.methods.esd import ESD
from unlearners.methods.original import Original
from unlearners.methods.plug import Plug
from unlearners.methods.uce import UCE
from unlearners.tasks import from_concept

TASK = from_concept("zq", "style")


def edited(target: Any, pattern: str, path: Path) -> str:
    """A patch file that adds 1 to what matches ``pattern`` on ``target``, which it leaves as it was."""
    chosen = {patch.hub_key(n): p.detach() + 1 for n, p in target.select(pattern).items()}
    touched = {n.partition(".")[0] for n in chosen}
    patch.save(patch.Patch(tensors=chosen, base={c: h for c, h in target.base["sha256"].items() if c in touched}), path)
    return str(path)


def cousin(make: Callable[..., Any], **how: Any) -> Any:
    """A tiny pipeline whose UNet alone was tuned further."""
    target = make(**how)
    with torch.no_grad():
        for p in target.select("full").values():
            p.mul_(1.5)
    return target


def weights(target: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in patch.live(target.modules).items()}


@pytest.mark.parametrize("how", [{}, {"xl": True}, {"prediction": "v_prediction"}])
def test_a_text_encoder_fits_a_model_whose_unet_was_tuned(how: dict[str, Any], sd: Callable[..., Any], tmp_path: Path) -> None:
    file, target = edited(sd(**how), "text_encoder", tmp_path / "te.safetensors"), cousin(sd, **how)
    before, rows = weights(target), list[dict[str, float]]()
    Plug(patch=file)(target, TASK, log=rows.append)
    after, given = weights(target), patch.load(file).tensors
    assert all(torch.equal(after[n], given[n]) for n in given)
    assert all(torch.equal(after[n], before[n]) for n in before.keys() - given.keys())
    moved = torch.cat([(after[n] - before[n]).flatten() for n in given]).norm() / torch.cat([before[n].flatten() for n in given]).norm()
    assert rows == [{"tensors": len(given), "change": pytest.approx(float(moved), rel=1e-4)}]


@pytest.mark.parametrize(("pattern", "mend"), [("xattn", "train the erasure in the text encoder"), (r"text_encoder\.", "that shares it")])
def test_what_is_not_shared_is_refused_unless_wanted(pattern: str, mend: str, sd: Callable[..., Any], tmp_path: Path) -> None:
    file, target = edited(sd(), pattern, tmp_path / "p.safetensors"), sd(seed=1)
    before = weights(target)
    with pytest.raises(RefusedError, match=mend) as refused:
        Plug(patch=file)(target, TASK)
    assert str(refused.value).count(". ") == 0
    assert all(torch.equal(t, before[n]) for n, t in weights(target).items())
    Plug(patch=file, unshared=True)(target, TASK)
    given = patch.load(file).tensors
    assert all(torch.equal(weights(target)[n], given[n]) for n in given)


def test_a_text_encoder_that_has_forgotten_already_is_not_shared(sd: Callable[..., Any], tmp_path: Path) -> None:
    file, target = edited(sd(), "text_encoder", tmp_path / "te.safetensors"), sd()
    Plug(patch=file)(target, TASK)
    with pytest.raises(RefusedError, match="does not share the 'text_encoder'"):
        Plug(patch=file)(target, TASK)


def test_components_choose_what_is_taken(sd: Callable[..., Any], tmp_path: Path) -> None:
    file, target = edited(sd(), r"unet\.conv_in\.|text_encoder\..*final_layer_norm\.", tmp_path / "both.safetensors"), cousin(sd)
    with pytest.raises(RefusedError, match="does not share the 'unet'"):
        Plug(patch=file)(target, TASK)
    rows: list[dict[str, float]] = []
    Plug(patch=file, components=("text_encoder",))(target, TASK, log=rows.append)
    assert rows[0]["tensors"] == 2
    with pytest.raises(UsageError, match="has no 'vae'; its components are text_encoder, unet"):
        Plug(patch=file, components=("vae",))(sd(), TASK)


def test_a_component_the_model_lacks(sd: Callable[..., Any], tmp_path: Path) -> None:
    file = edited(sd(xl=True), r"text_encoder_2\..*final_layer_norm\.", tmp_path / "second.safetensors")
    for unshared in (False, True):
        with pytest.raises(RefusedError, match="'text_encoder_2', which this model lacks"):
            Plug(patch=file, unshared=unshared)(sd(), TASK)


def test_a_checkpoint_of_others_needs_leave(sd: Callable[..., Any], tmp_path: Path) -> None:
    file, target = tmp_path / "text.safetensors", sd()
    save_file({"text_model.final_layer_norm.bias": torch.full((16,), 3.0)}, file)
    with pytest.raises(RefusedError, match="does not say what it was made for"):
        Plug(patch=str(file))(target, TASK)
    Plug(patch=str(file), unshared=True)(target, TASK)
    assert torch.equal(weights(target)["text_encoder.text_model.final_layer_norm.bias"], torch.full((16,), 3.0))


def test_no_patch_is_the_row_of_the_target_before(sd: Callable[..., Any]) -> None:
    target, rows = sd(), list[dict[str, float]]()
    before = weights(target)
    Plug()(target, TASK, log=rows.append)
    assert rows == [{"tensors": 0, "change": 0.0}]
    assert all(torch.equal(t, before[n]) for n, t in weights(target).items())


def test_files_and_runs_that_hold_no_erasure(sd: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Plug(patch="a/b").patch == str(tmp_path / "a" / "b")
    with pytest.raises(RefusedError, match="cannot be read"):
        Plug(patch="a/b")(sd(), TASK)
    still = run.erase(Original(), "tiny", TASK, out="still")
    with pytest.raises(RefusedError, match="changed no weight"):
        Plug(patch=str(still))(sd(), TASK)
    record = json.loads((still / "run.json").read_text())
    (still / "run.json").write_text(json.dumps(record | {"status": "stopped"}))
    with pytest.raises(UsageError, match="is stopped"):
        Plug(patch=str(still))(sd(), TASK)


# --- the canvas and its fine-tuned variant ------------------------------------------------------------------------
def test_a_transferred_erasure_is_an_ordinary_run(tmp_path: Path) -> None:
    neon = tasks.load("canvas/neon")
    few = [p for p in neon.probes if p.truth["object"] == "cup" and p.truth["style"] in ("neon", "photo")]
    task = replace(neon, probes=tuple(few), seeds=(1,), suite=("ua", "ira", "fid"))
    made = run.erase(ESD(params="text_encoder", steps=2, sampler_steps=2, batch=2, pool=2, lr=1e-4), "canvas", task, out=tmp_path / "made")
    moved = run.erase(Plug(patch=str(made)), "canvas-finetuned", task, out=tmp_path / "moved")
    record = run.read_run(moved)
    assert record["status"] == "done"
    assert record["base"]["name"] == "canvas-finetuned"
    assert record["weights"]["tensors"] == run.read_run(made)["weights"]["tensors"]
    assert record["weights"]["outside"] == 0
    one, two, tuned = load(str(made)), load(str(moved)), load("canvas-finetuned")
    assert patch.base_hash(two.modules) == {
        "unet": tuned.base["sha256"]["unet"], "text_encoder": patch.base_hash(one.modules)["text_encoder"],
    }  # fmt: skip
    run.attack("random_tokens", moved, tries=1)
    run.evaluate(moved, metrics=["ua", "ira", "asr"])
    assert {"ua", "ira", "asr/random_tokens"} <= {r["metric"] for r in run.results(moved)}


def test_an_edited_unet_does_not_fit_the_fine_tuned_one(tmp_path: Path) -> None:
    made = run.erase(UCE(), "canvas", "canvas/neon", out=tmp_path / "made")
    with pytest.raises(RefusedError, match="was made for another 'unet'"):
        load("canvas-finetuned", patches=[str(made)])
    with pytest.raises(RefusedError, match="does not share the 'unet'"):
        run.erase(Plug(patch=str(made)), "canvas-finetuned", "canvas/neon", out=tmp_path / "moved")
    forced = run.erase(Plug(patch=str(made), unshared=True), "canvas-finetuned", "canvas/neon", out=tmp_path / "forced")
    assert run.read_run(forced)["weights"]["outside"] == 0
