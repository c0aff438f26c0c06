"""SPM's gate: what it computes, when it is open and when it is shut, and its run folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unlearners import cli, grids, targets
from unlearners.base import Item, Probe, Task
from unlearners.errors import RefusedError, UsageError
from unlearners.exports import export
from unlearners.flags import flags
from unlearners.methods.esd import ESD
from unlearners.methods.leco import LECO
from unlearners.methods.spm import SPM
from unlearners.methods.spm_gate import SPMGate, thin
from unlearners.run import attack, erase
from unlearners.targets import read_run
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.testing import check_method

TASK = Task(name="t", kind="style", concepts=("zq", "ink"), probes=(Probe(prompt="a zq sky", truth={"style": "zq"}),), seeds=(1,))
QUICK = SPM(steps=3, lr=0.1, sampler_steps=3, warmup=0.0, params=r"unet\..*(attentions\.|conv1)")  # linear and convolution layers
PROMPTS, SEEDS = ["a zq sky", "cup", "ink", "zq"], [1, 2, 3, 4]


def draw(target: Any, prompts: list[str] = PROMPTS, seeds: list[int] = SEEDS, **how: Any) -> Tensor:
    pictures: Tensor = target.sample(prompts, seeds, **{"steps": 5, "guidance": 3.0, **how})
    return pictures


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(erase(QUICK, "tiny", TASK, runs=tmp_path_factory.mktemp("spm")))


def gated(folder: str, **fields: Any) -> StableDiffusion:
    made: StableDiffusion = SPMGate(patch=folder, **fields)(StableDiffusion.tiny(), TASK)
    return made


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_shut_it_is_the_original_and_open_it_is_spm(spm: str, guidance: float) -> None:
    """By shared tokens, which the tiny tokenizer has as letters: "cup" shares none, the others name a concept in full."""
    got, full, original = (draw(t, guidance=guidance) for t in (gated(spm, similarity="tokens"), targets.load(spm), StableDiffusion.tiny()))
    assert torch.equal(got[1], original[1])
    assert (full[1] - original[1]).abs().max() > 1e-3  # ungated SPM changes it
    for i in (0, 2, 3):
        assert torch.allclose(got[i], full[i], atol=2e-5)
        assert (full[i] - original[i]).abs().max() > 1e-3


def test_between_them_the_adapters_are_scaled(spm: str) -> None:
    """A prompt with one of two tokens gets half of the change of every weight; each row of a batch its own gamma."""
    target = gated(spm, similarity="tokens")
    half, plain = targets.load(spm), StableDiffusion.tiny()
    with torch.no_grad():
        for n, p in half.named().items():
            p.copy_((p + plain.named()[n]) / 2)
    prompts = ["q", "cup", "zq"]  # "q" is the last letter of "zq"
    got = draw(target, prompts, [1, 2, 3])
    assert torch.allclose(got[0], draw(half, prompts, [1, 2, 3])[0], atol=2e-5)
    alone = torch.cat([draw(target, [p], [s]) for p, s in zip(prompts, [1, 2, 3], strict=True)])
    assert torch.allclose(got, alone, atol=1e-4)
    squared = SPMGate(similarity="tokens", power=2)
    c = target.encode(["zq"])
    assert squared.gamma(target, target.encode(["q"]), c).item() == 0.25


def test_gamma_is_the_larger_similarity(spm: str) -> None:
    target = StableDiffusion.tiny()
    prompts, said = ["a zq sky", "cup", "", "ink ink", "k n"], ["zq", "ink"]
    p, c = target.encode(prompts), target.encode(said)
    for method in (SPMGate(), SPMGate(similarity="text"), SPMGate(similarity="tokens")):
        for i, prompt in enumerate(prompts):
            found = []
            for j, concept in enumerate(said):
                words = [set(target.tokens([w])[0].tolist()) - target.special for w in (prompt, concept)]
                a, b = p.states[i].flatten().double(), c.states[j].flatten().double()
                found.append((float(a @ b / a.norm() / b.norm()), len(words[0] & words[1]) / len(words[1])))
            both = {"text": max(t for t, _ in found), "tokens": max(t for _, t in found), "both": max(max(t) for t in found)}
            assert method.gamma(target, p, c)[i].item() == pytest.approx(both[method.similarity], abs=1e-5)
    assert SPMGate().gamma(target, p, c)[[0, 3]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_the_adapters_are_read_back_from_the_weights(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = torch.randn(6, 2, generator=generator).double(), torch.randn(2, *shape[1:], generator=generator).double()
    change = (B @ A.flatten(1)).view(shape)
    down, up = thin(change, 2)
    assert down.shape == (2, *shape[1:]) and up.shape[:2] == (6, 2)
    assert torch.allclose((up.flatten(1) @ down.flatten(1)).view(shape), change)


def test_the_contract(spm: str) -> None:
    check_method(SPMGate(patch=spm), [StableDiffusion.tiny()])


def test_run_folders(spm: str, tmp_path: Path) -> None:
    folder = erase(SPMGate(patch=spm), "tiny", TASK, runs=tmp_path)
    record, row = read_run(folder), json.loads((folder / "log.jsonl").read_text())
    assert record["guide"] == "spm_gate" and not (folder / "weights.safetensors").exists()
    assert row["rank"] == 1 and row["change"] > 0 and 0 <= row["empty"] <= 1
    assert torch.equal(draw(targets.load(str(folder))), draw(gated(spm)))
    assert flags(folder) == ["The method spm_gate acts at generation time and is bypassed by whoever holds the weights."]
    with pytest.raises(UsageError, match="nothing to export"):
        export("diffusers", folder)


def test_white_box_attacks_go_through_the_gate(spm: str, tmp_path: Path) -> None:
    """The gradient of a prompt that names the concept is that of the ungated run, whose weights the gate puts in."""
    target, full = gated(spm), targets.load(spm)
    x = torch.randn(1, *target.latent_shape, generator=torch.Generator().manual_seed(0))
    grads = []
    for model in (target, full):
        p = model.encode(["a zq sky"])  # type: ignore[attr-defined]
        p.states.requires_grad_() if p.states.is_leaf else p.states.retain_grad()
        step = model.late_guide(model) if model.late_guide else None
        e = step(x, torch.tensor(500), p, model.null(), 3.0) if step else _guided(model, x, p)  # type: ignore[attr-defined]
        grads.append(torch.autograd.grad(e.square().sum(), p.states)[0])
    assert grads[0].abs().max() > 0
    assert torch.allclose(grads[0], grads[1], atol=1e-3 * float(grads[0].abs().max()))
    folder = erase(SPMGate(patch=spm), "tiny", "canvas/neon", runs=tmp_path)
    told = json.loads(attack("unlearndiffatk", folder, prompts=1, steps=1, timesteps=1, iterations=1).read_text())
    assert told["access"] == "white" and len(told["verdicts"]) == 1


def _guided(model: Any, x: Tensor, p: Any) -> Tensor:
    from unlearners.diffusion import guided

    return guided(model, x, torch.tensor(500), p, model.null(), 3.0)


def test_a_gate_needs_a_finished_run_of_adapters_on_the_same_model(spm: str, tmp_path: Path, sd: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="set patch to the folder of a run of spm"):
        SPMGate()(sd(), TASK)
    with pytest.raises(UsageError, match="is no run folder"):
        SPMGate(patch=str(tmp_path / "nowhere"))(sd(), TASK)
    other = erase(ESD(steps=1, sampler_steps=2), "tiny", TASK, runs=tmp_path)
    with pytest.raises(UsageError, match="a run of esd, which trains no adapters"):
        SPMGate(patch=str(other))(sd(), TASK)
    with pytest.raises(RefusedError, match="was not made on this model"):
        SPMGate(patch=spm)(sd(seed=1), TASK)
    with pytest.raises(UsageError, match="at least 1"):
        SPMGate(power=0)
    with pytest.raises(UsageError, match="set similarity to text"):
        target = sd()
        bare = target.encode(["zq"]).detach()
        SPMGate().gamma(target, type(bare)(bare.states), bare)


def test_lecos_adapters_can_be_gated_too(tmp_path: Path) -> None:
    leco = erase(LECO(steps=2, lr=0.1, sampler_steps=3), "tiny", TASK, runs=tmp_path)
    got, full = draw(gated(str(leco), similarity="tokens")), draw(targets.load(str(leco)))
    assert torch.allclose(got[[0, 2, 3]], full[[0, 2, 3]], atol=5e-5)
    assert torch.equal(got[1], draw(StableDiffusion.tiny())[1])


def test_token_ids_follow_the_rows_of_a_conditioning(sd: Callable[..., Any]) -> None:
    for target in (sd(), sd(xl=True)):
        ids = target.tokens(["zq", "cup"])
        cond = target.encode(["zq", "cup"])
        assert torch.equal(cond.ids, ids)
        assert torch.equal(cond[1].ids, ids[1:]) and torch.equal(cond.repeat(2).ids, ids.repeat(2, 1))
        assert torch.equal(type(cond).cat([cond, cond[0]]).ids, torch.cat([ids, ids[:1]]))
        assert type(cond).cat([cond, type(cond)(cond.states, cond.pooled, cond.time_ids)]).ids is None
        assert torch.equal(target.encode(ids).ids, ids)


def test_items_are_attacked_by_gated_pictures(spm: str) -> None:
    from unlearners.attacks.random_tokens import RandomTokens
    from unlearners.testing import FakeJudge

    target = gated(spm)
    target.sampler = {"steps": 5, "guidance": 3.0}
    wanted = draw(target, ["a zq sky"], [1])
    shown = FakeJudge(lambda x: [torch.equal(p, wanted[0]) for p in x])
    assert RandomTokens(tries=1)(target, TASK, shown, [Item(prompt="a zq sky", seed=1)])[0].before


def test_it_can_be_rehearsed_and_stands_in_a_grid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--dry-run makes adapters of the tiny model; a grid names the row whose adapters are gated."""
    assert cli.main(["erase", "spm_gate", "canvas", "canvas/neon", "--patch", "runs/spm", "--dry-run"]) == 0, capsys.readouterr().err
    grid = "target: tiny\ntasks: [canvas/neon]\nmethods:\n  - {name: spm}\n  - {name: spm_gate, of: spm}\n"
    (tmp_path / "gated.yaml").write_text(grid)
    assert [p.label for p in grids.cells(grids.read(tmp_path / "gated.yaml"))] == ["spm", "spm_gate"]
    (tmp_path / "gated.yaml").write_text(grid.replace(", of: spm", ""))
    with pytest.raises(UsageError, match="names the run that plug or spm_gate takes"):
        grids.read(tmp_path / "gated.yaml")
