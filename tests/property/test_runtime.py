"""Methods that act at generation time: what they compute, that they change no weight, and that their run folders carry them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unlearners import targets
from unlearners.attacks._guided import Victim, victim
from unlearners.attacks._search import soft, tables
from unlearners.attacks.p4d import P4D
from unlearners.attacks.random_tokens import RandomTokens
from unlearners.attacks.unlearndiffatk import UnlearnDiffAtk
from unlearners.base import Item, Judge, Probe, Task
from unlearners.errors import RefusedError, UsageError
from unlearners.exports import export, left_behind
from unlearners.flags import flags
from unlearners.methods._guide import TEXTS
from unlearners.methods.esd import ESD
from unlearners.methods.negative_prompt import NegativePrompt
from unlearners.methods.sld import SLD
from unlearners.registry import get, make, names
from unlearners.run import _original_folder, attack, erase, read_run
from unlearners.targets.ddpm import DDPM
from unlearners.testing import FakeJudge

TASK = Task(name="t", kind="style", concepts=("zq", "ink"), seeds=(1,), judge="fake")
STRONG = SLD(scale=3000.0, warmup=2, threshold=0.02, momentum=0.5, beta=0.7)
METHODS = [STRONG, NegativePrompt()]
PROBED = replace(TASK, probes=(Probe(prompt="a zq sky", truth={"style": "zq"}),))
MODELS: list[dict[str, Any]] = [{}, {"xl": True}, {"prediction": "v_prediction"}]
PROMPTS, SEEDS = ["a zq sky", "cup", ""], [1, 2, 3]
ESD_QUICK = ESD(steps=2, sampler_steps=3, lr=1e-2)


def draw(target: Any, prompts: list[str] = PROMPTS, seeds: list[int] = SEEDS, **how: Any) -> Tensor:
    pictures: Tensor = target.sample(prompts, seeds, **{"steps": 5, "guidance": 3.0, **how})
    return pictures


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows in each call of the UNet."""
    from unlearners.targets.stable_diffusion import StableDiffusion

    rows: list[int] = []
    eps = StableDiffusion.eps

    def count(self: Any, x: Tensor, t: Any, cond: Any) -> Tensor:
        rows.append(len(x))
        return eps(self, x, t, cond)

    monkeypatch.setattr(StableDiffusion, "eps", count)
    return rows


# --- the formulas, a second time -------------------------------------------------------------------------------------
@torch.no_grad()
def safe_latents(target: Any, prompt: str, unsafe: str, x: Tensor, method: SLD, g: float, steps: int) -> Tensor:
    """SLD with DDIM in the noise itself, number by number where it decides, each prediction in a call of its own."""
    acp, v = target.scheduler.alphas_cumprod.double(), target.scheduler.config.prediction_type == "v_prediction"
    stride = 1000 // steps
    momentum = torch.zeros_like(x)
    for i, t in enumerate(1 + stride * k for k in reversed(range(steps))):
        a, b = acp[t], acp[t - stride] if t >= stride else acp[0]

        def noise_in(cond: Any, x: Tensor = x, t: int = t, a: Tensor = a) -> Tensor:
            out: Tensor = target.eps(x, torch.tensor(t), cond)
            return a.sqrt() * out + (1 - a).sqrt() * x if v else out

        none, said, bad = noise_in(target.null()), noise_in(target.encode([prompt])), noise_in(target.encode([unsafe]))
        safety = torch.zeros_like(x)
        for j in range(x.numel()):
            apart = (said - bad).flatten()[j]
            mu = min(1.0, method.scale * abs(float(apart))) if apart < method.threshold else 0.0
            safety.view(-1)[j] = mu * (bad - none).flatten()[j]
        safety = safety + method.momentum * momentum
        momentum = method.beta * momentum + (1 - method.beta) * safety
        towards = said - none
        if i >= method.warmup:
            towards = towards - safety
        e = none + g * towards
        x = b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e
    return x


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("method", [STRONG, SLD(**SLD.presets["max"]), SLD(scale=2.0, warmup=0, threshold=0.0, momentum=0.0)])
@pytest.mark.parametrize("g", [3.0, 1.0])
def test_sld_is_the_papers_formula(sd: Callable[..., Any], which: dict[str, Any], method: SLD, g: float) -> None:
    from unlearners.diffusion import denoise

    target = sd(**which)
    for module in target.modules.values():
        module.double()
    method(target, TASK)
    x = torch.randn(1, *target.latent_shape, generator=torch.Generator().manual_seed(0)).double()
    cond, null = target.encode(["a zq sky"]), target.null()
    how = {"scheduler": target.scheduler, "steps": 5, "guidance": g}
    ours = denoise(target, x, cond, null, guide=target.guide, **how)[-1][1]
    theirs = safe_latents(target, "a zq sky", "zq, ink", x, method, g, 5)
    plain = denoise(target, x, cond, null, **how)[-1][1]
    assert torch.allclose(ours, theirs, atol=2e-6)  # the scheduler computes in float32
    assert (ours - plain).abs().max() > 20 * (ours - theirs).abs().max()


def test_a_negative_prompt_takes_the_place_of_the_empty_one(sd: Callable[..., Any]) -> None:
    target, plain = sd(), sd()
    NegativePrompt(negative="murky")(target, TASK)
    plain.null = lambda n=1: plain.encode(["murky"]).repeat(n)
    assert torch.equal(draw(target), draw(plain))
    assert not torch.equal(draw(target), draw(sd()))
    assert torch.equal(draw(target, guidance=1.0), draw(sd(), guidance=1.0))


def test_one_call_of_the_unet_for_each_step(sd: Callable[..., Any], calls: list[int]) -> None:
    for method, rows in ((STRONG, 9), (NegativePrompt(), 6)):
        target = method(sd(), TASK)
        calls.clear()
        draw(target)
        assert calls == [rows] * 5


@pytest.mark.parametrize("method", [SLD(scale=0.0), SLD(unsafe=" "), NegativePrompt(negative=" ")])
@pytest.mark.parametrize("which", MODELS)
def test_nothing_to_steer_away_from_is_plain_sampling_bit_for_bit(sd: Callable[..., Any], method: Any, which: dict[str, Any]) -> None:
    assert torch.equal(draw(method(sd(**which), TASK)), draw(sd(**which)))


def test_during_the_warm_up_nothing_changes(sd: Callable[..., Any]) -> None:
    late = draw(SLD(**{**SLD.presets["max"], "warmup": 5})(sd(), TASK))
    assert torch.allclose(late, draw(sd()), atol=1e-5)  # three rows in a call round otherwise than two
    assert not torch.allclose(draw(SLD(**SLD.presets["max"])(sd(), TASK)), draw(sd()), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", MODELS)
def test_pictures_do_not_depend_on_the_batch_or_on_what_was_drawn_before(
    sd: Callable[..., Any], method: Any, which: dict[str, Any]
) -> None:
    target = method(sd(**which), TASK)
    together = draw(target)
    assert torch.equal(together, draw(target))  # a sampling starts without momentum
    alone = torch.cat([draw(target, [p], [s]) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together, draw(target, batch=2), atol=1e-4)


def test_what_to_steer_away_from(sd: Callable[..., Any]) -> None:
    said = Task(name="t", concepts=("x",), prompts=("zq", "ink"))
    for cls, name in ((SLD, "unsafe"), (NegativePrompt, "negative")):
        one, two, other = (m(sd(), said) for m in (cls(), cls(**{name: "zq, ink"}), cls(**{name: "ink"})))
        how = {"steps": 12}
        assert torch.equal(draw(one, **how), draw(two, **how))
        assert not torch.equal(draw(one, **how), draw(other, **how))
    assert all(len(set(text.split(", "))) == 20 for text in TEXTS.values())
    named = [m(sd(), said) for m in (SLD(unsafe="i2p"), SLD(unsafe=TEXTS["i2p"]), SLD(unsafe="i2p-ours"))]
    a, b, c = (draw(t, **how) for t in named)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_slds_published_settings() -> None:
    """The authors' text begins as their pipeline's does; weak is offered with both published strengths."""
    i2p = make("methods", "sld", preset="i2p")
    assert TEXTS[i2p.unsafe].startswith(
        "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity"
    )
    assert TEXTS[i2p.unsafe].endswith("weapons, child abuse, brutality, cruelty")
    weak, strong = (make("methods", "sld", preset=p) for p in ("weak", "weak-200"))
    assert (weak.scale, strong.scale) == (20.0, 200.0)
    assert weak == replace(strong, scale=20.0)


def test_a_text_that_is_cut_off_is_said(sd: Callable[..., Any]) -> None:
    rows: list[dict[str, float]] = []
    target = SLD(unsafe="abc")(sd(), TASK, log=rows.append)
    assert rows == [{"tokens": 3.0}]  # the tiny tokenizer reads letters
    assert not target.warnings
    target = SLD(unsafe="i2p")(sd(), TASK, log=rows.append)
    assert rows[-1] == {"tokens": 22.0}
    assert "fewer concepts" in target.warnings[0]


@pytest.mark.parametrize("field", ["scale", "warmup", "momentum", "beta"])
def test_impossible_settings_are_refused(field: str) -> None:
    with pytest.raises(UsageError, match="at least 0"):
        SLD(**{field: -1})


# --- guide and weights -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_edited_without_the_guide(sd: Callable[..., Any], method: Any) -> None:
    bare, guarded = sd(), method(sd(), TASK)
    seen: list[Any] = []
    eps = type(guarded).eps

    def look(self: Any, *parts: Any) -> Tensor:
        seen.append(self.guide)
        return eps(self, *parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(guarded), "eps", look)
        ESD_QUICK(guarded, TASK, seed=1)
    ESD_QUICK(bare, TASK, seed=1)
    assert seen and not any(seen)
    assert all(torch.equal(p, guarded.named()[n]) for n, p in bare.named().items())
    assert guarded.guide and not bare.guide  # it is back
    assert not torch.equal(draw(guarded), draw(bare))


def test_the_guide_is_back_after_a_failure(sd: Callable[..., Any]) -> None:
    target = STRONG(sd(), TASK)
    guide = target.guide
    with pytest.raises(UsageError, match="no weight"):
        ESD(params="nothing")(target, TASK)
    assert target.guide is guide


def test_a_second_guide_is_refused(sd: Callable[..., Any]) -> None:
    target = STRONG(sd(), TASK)
    with pytest.raises(UsageError, match="already has a guide"):
        NegativePrompt()(target, TASK)


def test_they_are_for_text_to_image() -> None:
    with pytest.raises(UsageError, match="needs a text-to-image pipeline"):
        STRONG(DDPM.tiny(), TASK)


def test_class_conditional_pictures_are_drawn_with_a_guide_too() -> None:
    from functools import partial

    from unlearners.diffusion import guided

    target, told = DDPM.tiny(), []

    def guide(model: Any) -> Any:
        told.append(model)
        return partial(guided, model)

    plain = target.sample(["a"], [1], steps=2)
    target.guide = guide
    assert torch.equal(target.sample(["a"], [1], steps=2), plain)
    assert told == [target]


# --- run folders -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_run_folder_carries_the_guide_and_no_weights(tmp_path: Path, sd: Callable[..., Any], method: Any) -> None:
    folder = erase(method, "tiny", TASK, runs=tmp_path)
    record = read_run(folder)
    name = record["run"]["method"]["name"]
    assert record["guide"] == name
    assert record["weights"] == {
        "file": "weights.safetensors", "sha256": "", "bytes": 0, "tensors": 0, "changed": [], "outside": 0,
    }  # fmt: skip
    assert not (folder / "weights.safetensors").exists()
    again, direct = targets.load(str(folder)), method(sd(), TASK)
    assert torch.equal(draw(again), draw(direct))
    assert not torch.equal(draw(again), draw(targets.load("tiny")))
    assert flags(folder) == [f"The method {name} acts at generation time and is bypassed by whoever holds the weights."]
    with pytest.raises(UsageError, match="nothing to export"):
        export("diffusers", folder)
    with pytest.raises(RefusedError, match="give the folder as the target"):
        erase(ESD_QUICK, "tiny", TASK, runs=tmp_path, patches=[str(folder)])
    with pytest.raises(UsageError, match="already has a guide"):
        erase(STRONG, str(folder), Task(name="other", concepts=("b",)), runs=tmp_path)


def test_runs_on_top_and_below(tmp_path: Path) -> None:
    """Weights edited on a guarded model are those edited on the bare one, and the guide acts on them; so in the other order."""
    guarded = erase(STRONG, "tiny", TASK, runs=tmp_path)
    above = erase(ESD_QUICK, str(guarded), TASK, runs=tmp_path)
    bare = erase(ESD_QUICK, "tiny", TASK, runs=tmp_path)
    below = erase(STRONG, str(bare), TASK, runs=tmp_path)
    assert (above / "weights.safetensors").is_file() and not (below / "weights.safetensors").exists()
    models = {f: targets.load(str(f)) for f in (guarded, above, bare, below)}
    pictures = {f: draw(m) for f, m in models.items()}
    assert torch.equal(pictures[above], pictures[below])
    assert not any(torch.equal(pictures[above], pictures[f]) for f in (guarded, bare))
    assert models[bare].guide is None
    assert read_run(above)["guide"] == "sld" and read_run(bare)["guide"] == ""
    assert "sld acts while pictures are drawn" in left_behind(above) and not left_behind(bare)
    assert len(flags(above)) == 1 and "bypassed" in flags(above)[0]
    originals = [_original_folder(f, read_run(f)) for f in (guarded, above, bare, below)]
    assert originals[0] == originals[2] and len(set(originals)) == 3  # bare; guarded; ESD's


def test_a_guide_reads_its_text_with_the_weights_it_acts_on(sd: Callable[..., Any], tmp_path: Path) -> None:
    edit = ESD(params="text_encoder", steps=1, sampler_steps=2, lr=1e-2)
    above = erase(edit, str(erase(NegativePrompt(), "tiny", TASK, runs=tmp_path)), TASK, runs=tmp_path)
    here = NegativePrompt()(sd(), TASK)
    edit(here, TASK, seed=0)
    assert torch.equal(draw(targets.load(str(above))), draw(here))


def test_an_older_record_has_no_guide(tmp_path: Path) -> None:
    folder = erase(ESD_QUICK, "tiny", TASK, runs=tmp_path)
    record = read_run(folder)
    del record["guide"]
    (folder / "run.json").write_text(json.dumps(record))
    assert targets.load(str(folder)).guide is None
    assert flags(folder) == []


def test_attacks_are_judged_by_guarded_pictures(sd: Callable[..., Any]) -> None:
    target, plain = STRONG(sd(), TASK), sd()
    for model in (target, plain):
        model.sampler = {"steps": 5, "guidance": 3.0}
    wanted = draw(target, ["a zq sky"], [1])
    shown = FakeJudge(lambda x: [torch.equal(p, wanted[0]) for p in x])
    items = [Item(prompt="a zq sky", seed=1)]
    assert [RandomTokens(tries=1)(m, TASK, shown, items)[0].before for m in (target, plain)] == [True, False]


WHITE = [n for n in names("attacks") if get("attacks", n).access == "white"]
THROUGH = ("cce", "p4d", "ph2p", "unlearndiffatk")


def test_which_gradients_go_through_a_guide() -> None:
    assert [n for n in WHITE if make("attacks", n).through] == ["cce", "ensemble", "p4d", "ph2p", "unlearndiffatk"]
    assert not make("attacks", "ensemble", members=("unlearndiffatk:fast", "tina")).through


@pytest.mark.parametrize("name", WHITE)
def test_gradients_that_cannot_go_through_a_guide_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is written; prompts found in the weights alone can be tried through the guide, when that is asked for."""
    monkeypatch.setattr("unlearners.base.Target.late_guide", property(lambda _: None, lambda _, guide: None))
    folder = erase(NegativePrompt(), "tiny", PROBED, runs=tmp_path)
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"{name} follows gradients of the weights and cannot go through negative_prompt") as told:
        attack(name, folder, prompts=1)
    assert sorted(tmp_path.rglob("*")) == there
    assert ("set transfer" in str(told.value)) == (name in THROUGH)


def test_tina_is_refused_where_a_guide_acts(tmp_path: Path) -> None:
    folder = erase(NegativePrompt(), "tiny", PROBED, runs=tmp_path)
    with pytest.raises(UsageError, match="tina follows gradients of the weights and cannot go through negative_prompt"):
        attack("tina", folder, prompts=1)


LATE = [SLD(scale=30.0, warmup=7, threshold=0.5, momentum=0.5, beta=0.7), NegativePrompt()]


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("method", LATE)
def test_the_gradient_through_a_guide_is_that_of_finite_differences(sd: Callable[..., Any], which: dict[str, Any], method: Any) -> None:
    """Of the guided prediction, two prompts of different t and different guidance, with respect to their token embeddings."""
    target = method(sd(seed=2, **which), TASK)
    for module in target.modules.values():
        module.double()
    g = torch.Generator().manual_seed(0)
    x, weigh = (torch.randn(2, *target.latent_shape, generator=g).double() for _ in range(2))
    t, at = torch.tensor([301.0, 801.0]), torch.tensor([[1, 2], [2, 4]])
    ids, e = target.tokens(["a zq sky", "cup"]), tables(target)[torch.tensor([[5, 6], [7, 8]])]
    model = victim(P4D(), target, [Item(prompt="a", seed=0), Item(prompt="b", seed=0, guidance=2.5)])

    def loss(e: Tensor) -> Tensor:
        return (weigh * model.eps(x, t, target.encode(ids, soft(target, e, at)), [0, 1])).sum()

    slope = torch.autograd.grad(loss(e.requires_grad_()), e)[0]
    with torch.no_grad():
        for _ in range(4):
            step = torch.randn(e.shape, generator=g).double()
            wanted = (loss(e + 1e-6 * step) - loss(e - 1e-6 * step)) / 2e-6
            assert (slope * step).sum().item() == pytest.approx(wanted.item(), rel=1e-5)
        bare = Victim(target, None, model.scales)
        alone = [target.late_guide(target)(x[i : i + 1], t[i], target.encode(ids, soft(target, e, at))[i], target.null(), s)
                 for i, s in enumerate(model.scales)]  # fmt: skip
        both = model.eps(x, t, target.encode(ids, soft(target, e, at)), [0, 1])
        assert torch.allclose(both, torch.cat(alone), atol=1e-6)
        assert not torch.allclose(both, bare.eps(x, t, target.encode(ids, soft(target, e, at)), [0, 1]), atol=1e-3)


def test_a_late_step_of_sld_is_the_step_after_the_warm_up_without_momentum(sd: Callable[..., Any]) -> None:
    target = SLD(scale=30.0, warmup=2, threshold=0.5, momentum=0.0)(sd(), TASK)
    x, null, cond = torch.randn(1, *target.latent_shape), target.null(), target.encode(["a zq sky"])
    step, late, t = target.guide(target), target.late_guide(target), torch.tensor(500.0)
    with torch.no_grad():
        early = [step(x, t, cond, null, 3.0) for _ in range(3)]
        assert torch.equal(early[0], early[1]) and not torch.equal(early[1], early[2])
        assert torch.equal(late(x, t, cond, null, 3.0), early[2]) and torch.equal(late(x, t, cond, null, 3.0), early[2])


@dataclass(frozen=True, kw_only=True)
class Blind(Judge):
    """Recognises nothing."""

    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        return [""] * len(images)


QUICK_ATTACKS: dict[str, dict[str, Any]] = {
    "unlearndiffatk": {"timesteps": 2, "iterations": 1},
    "p4d": {"n": 3, "iterations": 2, "check": 1},
    "ph2p": {"k": 3, "iterations": 2, "inner": 2, "accumulate": 1, "checks": 2, "rank": "loss"},
    "cce": {"iterations": 2, "rows": 2, "accumulate": 1, "pictures": 2, "checks": 2},
}


@pytest.mark.parametrize("name", THROUGH)
@pytest.mark.parametrize("method", LATE)
def test_attacks_go_through_a_guide_from_a_run_folder(tmp_path: Path, name: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = erase(method, "tiny", replace(PROBED, judge="canvas"), runs=tmp_path)
    seen: list[Any] = []
    real = Victim.eps

    def look(self: Any, x: Tensor, *parts: Any) -> Tensor:
        seen.append(self.step)
        out = real(self, x, *parts)
        assert out.requires_grad
        return out

    monkeypatch.setattr(Victim, "eps", look)
    monkeypatch.setattr("unlearners.judges.load", lambda name: Blind())
    told = json.loads(attack(name, folder, prompts=1, steps=1, **QUICK_ATTACKS[name]).read_text())
    assert seen and all(seen) and "transfer" not in told["attack"] and told["verdicts"][0]["queries"] >= 1
    seen.clear()
    attack(name, folder, prompts=1, steps=1, transfer=True, **QUICK_ATTACKS[name])
    assert seen and not any(seen)


def test_a_guide_without_a_late_form_is_refused_by_the_attack_itself(sd: Callable[..., Any]) -> None:
    target = sd()
    target.guide = lambda model: None
    with pytest.raises(UsageError, match="unlearndiffatk cannot differentiate through what defends this model"):
        victim(UnlearnDiffAtk(), target)
    assert victim(UnlearnDiffAtk(transfer=True), target).step is None


def test_prompts_found_in_the_weights_are_tried_through_the_guide(tmp_path: Path) -> None:
    folder = erase(NegativePrompt(), "tiny", "canvas/neon", runs=tmp_path)
    told = json.loads(attack("unlearndiffatk", folder, prompts=1, steps=1, timesteps=2, iterations=1, transfer=True).read_text())
    assert told["attack"]["transfer"] and told["access"] == "white"
    assert [v["queries"] for v in told["verdicts"]] == [0 if told["verdicts"][0]["before"] else 2]
