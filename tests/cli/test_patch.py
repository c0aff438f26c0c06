"""unlearn patch: what it says and writes, exit codes, and that what was stacked comes apart again bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearners import patch, run, targets
from unlearners.base import Task
from unlearners.cli import main
from unlearners.methods.esd import ESD
from unlearners.methods.uce import UCE

Say = Callable[..., tuple[int, Any]]


def task(concept: str) -> Task:
    return Task(name=concept, kind="style", concepts=(concept,), anchors=("art",), preserve=("ink",))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two patches for two concepts that change the same matrices, and one that changes the text encoder, all on one base."""
    at = tmp_path_factory.mktemp("patches")
    text = ESD(params="text_encoder", steps=1, sampler_steps=2, lr=1e-3)
    wanted: dict[str, Any] = {"zq": UCE(), "xw": UCE(), "text": text}
    return {name: str(run.erase(method, "tiny", task(name), runs=at)) for name, method in wanted.items()}


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """``say("show", FILE)``: exit code and the one JSON object."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, Any]:
        capsys.readouterr()
        code = main(["patch", *words, "--json"])
        return code, json.loads(capsys.readouterr()[0])

    return call


def weights(*patches: str) -> dict[str, torch.Tensor]:
    return patch.live(targets.load("tiny", patches=patches).modules)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_show(say: Say, made: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, told = say("show", made["zq"])
    assert code == 0
    assert (told["kind"], told["made by"]["method"]) == ("value", "uce")
    assert told["tensors"] == run.read_run(made["zq"])["weights"]["tensors"]
    assert told["base"].keys() == {"unet"}
    assert main(["patch", "show", made["zq"]]) == 0
    assert "kind: value" in capsys.readouterr()[0]


def test_two_erasures_act_together_and_one_can_be_taken_out(say: Say, made: dict[str, str]) -> None:
    """Both patches change the same weights; what is left without one is the other, bit for bit."""
    one, other, both = weights(made["zq"]), weights(made["xw"]), weights(made["zq"], made["xw"])
    base = weights()
    k = next(k for k in both if not torch.equal(one[k], base[k]))
    torch.testing.assert_close(both[k] - base[k], (one[k] - base[k]) + (other[k] - base[k]), rtol=1e-4, atol=1e-6)
    assert same(both, weights(made["xw"], made["zq"]))
    code, told = say("stack", made["zq"], made["xw"], "--target", "tiny", "--out", "both.safetensors")
    assert (code, told["kind"]) == (0, "delta")
    for t, u in zip(weights("both.safetensors").values(), both.values(), strict=True):
        torch.testing.assert_close(t, u)
    for part, left in (("zq", other), ("xw", one)):
        assert say("subtract", "both.safetensors", made[part], "--target", "tiny", "--out", f"{part}.safetensors")[0] == 0
        assert same(weights(f"{part}.safetensors"), left)


def test_patches_of_different_weights_need_no_base(say: Say, made: dict[str, str]) -> None:
    assert say("stack", made["zq"], made["text"], "--out", "both.safetensors")[1]["kind"] == "value"
    assert same(weights("both.safetensors"), weights(made["zq"], made["text"]))
    assert say("subtract", "both.safetensors", made["text"], "--out", "left.safetensors")[1]["kind"] == "value"
    assert same(weights("left.safetensors"), weights(made["zq"]))


def test_scale(say: Say, made: dict[str, str]) -> None:
    assert say("scale", made["zq"], "0.5", "--target", "tiny", "--out", "half.safetensors")[0] == 0
    assert say("scale", "half.safetensors", "2", "--out", "whole.safetensors")[0] == 0
    assert same(weights("whole.safetensors"), weights(made["zq"]))
    base, half, whole = weights(), weights("half.safetensors"), weights(made["zq"])
    for k in base:
        torch.testing.assert_close(half[k], (base[k] + whole[k]) / 2)


def test_apply_writes_a_pipeline(say: Say, made: dict[str, str]) -> None:
    code, told = say("apply", made["zq"], made["text"], "--target", "tiny", "--out", "model")
    assert (code, told["patches"]) == (0, 2)
    assert same(patch.live(targets.load("./model").modules), weights(made["zq"], made["text"]))
    assert say("apply", made["zq"], "--target", "tiny", "--strength", "0", "--out", "same")[0] == 0
    assert same(patch.live(targets.load("./same").modules), weights())


def test_a_text_encoder_that_base_and_patch_do_not_share(say: Say, made: dict[str, str]) -> None:
    from unlearners.targets.stable_diffusion import StableDiffusion

    StableDiffusion.tiny(seed=9).pipe.save_pretrained("other")
    code, told = say("apply", made["text"], "--target", "./other", "--out", "model")
    assert code == 1
    assert "another 'text_encoder'" in told["error"]
    assert not Path("model").exists()
    assert say("apply", made["text"], "--target", "./other", "--out", "model", "--force")[0] == 0


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("show", "takes 1"),
        ("show {zq} {xw}", "takes 1, not 2"),
        ("shew {zq}", "show"),
        ("apply {zq} --out x", "--target"),
        ("apply {zq} --target tiny", "--out"),
        ("apply {zq} --target tiny-classifier --out x", "diffusers folders"),
        ("scale {zq} --out x", "takes 2"),
        ("scale {zq} much --out x", "is no factor"),
        ("scale {zq} nan --out x", "is no factor"),
        ("scale {zq} 2 --out x", "--target"),
        ("stack {zq} {xw} --out x", "--target"),
        ("subtract {zq} --out x", "takes 2"),
        ("subtract {zq} {xw} --out x", "--target"),
    ],
)
def test_a_wrong_request_exits_2(say: Say, made: dict[str, str], words: str, hint: str) -> None:
    code, told = say(*words.format(**made).split())
    assert code == 2
    assert hint in told["error"]
    assert "\n" not in told["error"]
    assert not Path("x").exists()


def test_what_cannot_be_read_or_taken_apart(say: Say, made: dict[str, str]) -> None:
    Path("noise.safetensors").write_bytes(b"\0" * 100)
    for words in (("show", "none.safetensors"), ("show", "noise.safetensors"), ("subtract", made["zq"], made["text"], "--out", "x")):
        code, told = say(*words)
        assert code == 1
        assert "\n" not in told["error"]


def test_a_dry_run_writes_nothing(say: Say, made: dict[str, str]) -> None:
    assert say("apply", made["zq"], "--target", "tiny", "--out", "model", "--dry-run")[1]["dry_run"]
    assert not list(Path().iterdir())
