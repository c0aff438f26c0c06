"""One noise process for training, inversion and attacks, whatever sampler a model is saved with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from unlearners import diffusion, noise_process, pool, run, schedulers, tasks
from unlearners.diffusion import Cond
from unlearners.errors import UnlearnError, UsageError
from unlearners.methods import esd
from unlearners.noise_process import VariancePreserving
from unlearners.targets.base import Denoiser
from unlearners.targets.ddpm import DDPM
from unlearners.targets.stable_diffusion import StableDiffusion

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EIGHT = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
TIMES = torch.tensor([0.0, 10.0, 500.0, 999.0])


def tiny(scheduler: str = "", prediction: str = "epsilon", **how: Any) -> StableDiffusion:
    """A tiny Stable Diffusion that is drawn with ``scheduler`` as diffusers makes it, without the keys that DDIM has."""
    target = StableDiffusion.tiny(prediction=prediction, **how)
    if scheduler:
        target.pipe.scheduler = getattr(diffusers, scheduler)(**SD, prediction_type=prediction)
        target = StableDiffusion(target.pipe, "tiny")
    return target


def abar() -> Tensor:
    """The products of Stable Diffusion's schedule in float64."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def close(found: Tensor, right: Tensor, within: float = 1e-6) -> bool:
    return bool((found.double() - right).abs().max() / right.abs().max() <= within)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", EIGHT)
def test_noise_and_goal_do_not_depend_on_the_sampler(scheduler: str, prediction: str) -> None:
    target = tiny(scheduler, prediction)
    x, e = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    a = abar()[TIMES.long()].view(-1, 1, 1, 1)
    x_t, v = a.sqrt() * x + (1 - a).sqrt() * e, a.sqrt() * e - (1 - a).sqrt() * x
    for t in (TIMES, TIMES.long()):
        assert close(target.add_noise(x.float(), e.float(), t), x_t)  # in float32, as the schedule itself
        assert close(target.goal(x.float(), e.float(), t), v if prediction == "v_prediction" else e)
    process = noise_process.VariancePreserving(abar(), prediction=target.process.prediction)
    assert close(process.noised(x.float(), e.float(), TIMES), x_t) and close(process.noised(x, e, TIMES), x_t, 1e-14)
    assert close(process.goal(x, e, TIMES), v if prediction == "v_prediction" else e, 1e-14)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_clean_and_noise_undo_the_goal_and_invert_undoes_a_step(prediction: Any) -> None:
    process = VariancePreserving(abar(), prediction=prediction)
    x, e = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    t, to = torch.tensor([3.0, 100.5, 501.0, 999.0]), torch.tensor([0.0 if prediction == "sample" else -1.0, 80.0, 499.25, 979.0])
    x_t, out = process.noised(x, e, t), process.goal(x, e, t)
    assert torch.allclose(process.clean(x_t, out, t), x) and torch.allclose(process.noise(x_t, out, t), e)
    stepped = process.step(x_t, out, t, to)
    assert torch.allclose(stepped, process.noised(x, e, to)), "a step along a right prediction stays on the path"
    assert torch.allclose(process.invert(stepped, out, t, to), x_t)


def test_between_two_times_the_noise_grows_as_in_euler_samplers() -> None:
    euler = diffusers.EulerDiscreteScheduler(**SD)
    euler.set_timesteps(7)
    process = noise_process.of_scheduler(euler)
    a, s = process.scale(euler.timesteps, torch.zeros(7, 1))
    assert torch.allclose((s / a)[:, 0], euler.sigmas[:-1], rtol=1e-4)
    assert torch.allclose(a**2 + s**2, torch.ones(7, 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("offset, clean_end", [(1, False), (0, True)])
def test_following_the_process_is_ddim_to_the_bit(prediction: str, offset: int, clean_end: bool) -> None:
    target = tiny(prediction=prediction)
    ddim = diffusers.DDIMScheduler(**SD, clip_sample=False, prediction_type=prediction, steps_offset=offset, set_alpha_to_one=clean_end)
    target.process = noise_process.of_scheduler(ddim)
    x, cond, null = torch.randn(2, 4, 8, 8), target.encode(["cup", "cat"]), target.null(2)
    ours = diffusion.denoise(target, x, cond, null, steps=7, guidance=3.0)
    theirs = diffusion.denoise(target, x, cond, null, steps=7, guidance=3.0, scheduler=ddim)
    for (t, ours_x), (u, theirs_x) in zip(ours, theirs, strict=True):
        assert t == u and torch.equal(ours_x, theirs_x)


def test_trailing_times_start_at_pure_noise_as_zero_snr_models_need() -> None:
    ddim = diffusers.DDIMScheduler(**SD, timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ddim.set_timesteps(5)
    process = noise_process.of_scheduler(ddim)
    assert process.times(5)[:-1].tolist() == ddim.timesteps.tolist() and process.times(5)[0] == 999
    x = torch.randn(1, 4, 8, 8)
    assert torch.isfinite(process.step(x, x, 999.0, 799.0)).all()


def test_states_of_latents_are_never_clipped() -> None:
    target = tiny("DPMSolverMultistepScheduler")  # its config says nothing of clip_sample, which DDIM takes for True
    with torch.no_grad():
        for p in target.modules["unet"].parameters():
            p.zero_()  # predicts no noise at all, so the estimate of x_0 is x_t / a, far outside of [-1, 1]
    x = 3 * torch.randn(2, 4, 8, 8)
    states = diffusion.denoise(target, x, target.encode(["a", "b"]), target.null(2), steps=5, guidance=1.0)
    assert states[-1][1].std() > 3 * states[0][1].std(), "a clipped x_0 would have shrunk them below 1"
    ddpm = DDPM.tiny()
    assert ddpm.process.clip == 1.0, "pixels do have a range"


def test_untouched_canvas_has_the_same_denoising_loss_under_every_sampler() -> None:
    target = StableDiffusion.load("canvas")
    pictures = target.sample(["a neon cup", "a watercolor tree"], [1, 2], steps=4)
    losses = []
    for scheduler in EIGHT:
        target.pipe.scheduler = getattr(diffusers, scheduler)(**SD)
        model = StableDiffusion(target.pipe, "canvas")
        torch.manual_seed(0)
        losses.append(model.loss({"image": pictures, "prompt": ["a neon cup", "a watercolor tree"]}).item())
    assert len(set(losses)) == 1 and 0 < losses[0] < 0.2


@pytest.mark.parametrize(
    "scheduler", ["EulerAncestralDiscreteScheduler", "LCMScheduler", "DDPMScheduler", "KDPM2AncestralDiscreteScheduler"]
)
def test_a_picture_depends_on_its_seed_alone(scheduler: str) -> None:
    target = tiny(scheduler)
    prompts, seeds = [f"cup {i}" for i in range(16)], list(range(16))
    torch.manual_seed(1)
    together = target.sample(prompts, seeds, steps=4, guidance=2.0, batch=16)
    torch.manual_seed(2)
    apart = target.sample(prompts, seeds, steps=4, guidance=2.0, batch=1)
    assert (together - apart).abs().max() < 1e-4


def test_a_stochastic_sampler_draws_what_diffusers_draws() -> None:
    target = tiny("EulerAncestralDiscreteScheduler")
    own = target.sample(["cup"], [7], steps=4, guidance=2.0)
    generator = torch.Generator().manual_seed(7)
    theirs = target.pipe("cup", num_inference_steps=4, guidance_scale=2.0, generator=generator, output_type="pt").images
    assert (own - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", list(schedulers.NAMES))
def test_every_named_scheduler_draws(name: str) -> None:
    target = tiny(xl=True)
    assert torch.isfinite(target.sample(["cup"], [1], steps=3, scheduler=name)).all()


def test_a_named_scheduler_is_unknown_or_cannot_carry_the_prediction() -> None:
    with pytest.raises(UsageError, match="did you mean lms"):
        tiny().sample(["cup"], [1], scheduler="lmz")
    with pytest.raises(UsageError, match="'euler_a' cannot draw with a model that predicts 'sample'"):
        schedulers.make("euler_a", diffusers.DDIMScheduler(**SD, prediction_type="sample"))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "IPNDMScheduler"])
def test_a_schedule_that_is_no_such_process_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        noise_process.of_scheduler(getattr(diffusers, name)())


def test_attack_and_evaluate_replay_a_published_sampler(tmp_path: Path) -> None:
    from unlearners import registry

    folder = run.erase("uce", "tiny", tasks.from_concept("zq", "style"), runs=tmp_path)
    attack = registry.make("attacks", "random_tokens", tries=1)
    file = run.attack(attack, folder, prompts=1, steps=3, scheduler="lms", suite="canvas/neon")
    record = json.loads(file.read_text())
    assert record["sampler"]["scheduler"] == "lms" and record["asked"]["scheduler"] == "lms"
    run.evaluate(folder, metrics=["ua"], seeds=[1], steps=3, scheduler="lms", suite="canvas/neon")
    asked = json.loads(next((folder / "suites").glob("*-evaluate.json")).read_text())
    assert asked["sampler"]["scheduler"] == "lms"
    with pytest.raises(UsageError, match="did you mean euler"):
        run.attack(attack, folder, prompts=1, scheduler="eulre", suite="canvas/neon")


# --- the pool ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps, kept", [(50, 50), (50, 34), (7, 5), (3, 2)])
def test_every_row_of_a_pool_is_written_once(steps: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny()
    size = 4 * 8 * 8 * 4
    rows = []
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype=torch.float32: torch.full(shape, torch.nan, dtype=dtype))
    for seed in range(4):
        torch.manual_seed(seed)
        recipe = pool.Recipe(steps=steps, guidance=2.0, trajectories=5, gb=(kept + 0.5) * size * (2 * 9 + 5) / 1e9)
        made = pool._built(target, ["cup"], ["a", "b", "c", "d"], recipe)
        rows.append(made["t"])
        assert len(made["t"]) == 9 * kept and all(torch.isfinite(made[n]).all() for n in ("x", "t", "e_c", "e_0"))
        assert all(len(set(own.tolist())) == kept for own in made["t"].view(9, kept))
    assert kept == steps or not torch.equal(rows[0], rows[1])


def test_a_pool_may_meet_all_times_of_the_schedule() -> None:
    target = tiny()
    torch.manual_seed(0)
    grid, bucket = (
        pool._built(target, ["cup"], ["a"], pool.Recipe(steps=10, guidance=1.0, trajectories=40, told=told))["t"]
        for told in ("grid", "bucket")
    )
    assert len(set(grid.tolist())) == 10 and len(set(bucket.tolist())) > 200
    inner = (grid > 50) & (grid < 950)
    assert (bucket - grid).abs().max() <= 50 and abs((bucket - grid)[inner].mean()) < 4, "half of the times are noisier, half cleaner"


def test_esd_is_told_the_time_of_the_state_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    true: list[Tensor] = []
    told: list[Tensor] = []

    def see(*parts: Any, **how: Any) -> Any:
        found = diffusion.states(*parts, **how)
        true.append(found[1].float())
        return found

    class Listening(StableDiffusion):
        def eps(self, x_t: Tensor, t: Any, cond: Cond) -> Tensor:
            if torch.is_grad_enabled():  # the student
                told.append(t.float())
            return super().eps(x_t, t, cond)

    monkeypatch.setattr(esd, "states", see)
    target = Listening(StableDiffusion.tiny().pipe, "tiny")
    method = esd.ESD(params="full", steps=60, batch=8, pool=4, refresh=100, sampler_steps=10)
    method(target, tasks.from_concept("cup", "object"), seed=0)
    t, off = torch.cat(true), torch.cat(told) - torch.cat(true)
    inner = (t > 50) & (t < 900)
    assert off.abs().max() <= 50
    assert abs(off[inner].mean()) < 6, "uniform from x_t's own time on would be 50 too noisy"


# --- pictures ----------------------------------------------------------------------------------------------------------
def test_a_vae_that_overflows_in_half_precision_is_not_used_in_it(tmp_path: Path) -> None:
    target = StableDiffusion.tiny(xl=True)
    with torch.no_grad():
        target.vae.post_quant_conv.weight.mul_(0).add_(torch.eye(4)[:, :, None, None] * 3e5 / 4)
        target.vae.decoder.conv_in.weight.mul_(1e-3)
    target.vae.register_to_config(force_upcast=True)
    wide = target.sample(["cat"], [1], steps=2)
    target.pipe.save_pretrained(tmp_path / "xl")
    half = StableDiffusion.load(str(tmp_path / "xl"), dtype=torch.float16)
    assert half.vae.dtype == torch.float32 and half.dtype == torch.float16
    assert (half.sample(["cat"], [1], steps=2) - wide).abs().mean() < 0.1
    assert torch.isfinite(half.latents(wide)).all()


@pytest.mark.parametrize("target", [StableDiffusion.tiny(), DDPM.tiny()], ids=["sd", "ddpm"])
def test_pictures_that_are_not_finite_raise(target: Denoiser) -> None:
    with torch.no_grad():
        next(iter(target.modules["unet"].parameters())).fill_(torch.nan)
    with pytest.raises(UnlearnError, match="seed 3 is not finite"):
        target.sample(["a"], [3], steps=2)


def test_what_is_subtracted_on_sdxl_is_what_guidance_subtracts() -> None:
    target = StableDiffusion.tiny(xl=True)
    assert target.null().states.abs().max() == 0, "inference uses zeros"
    assert not [n for n in target.select("noxattn") if "add_embedding" in n or "time_embedding" in n]
    first = StableDiffusion.tiny()
    assert torch.equal(first.null().states, first.encode([""]).states), "elsewhere it is the empty prompt"


def test_a_pool_is_found_again_under_another_sampler_of_the_same_schedule() -> None:
    one, other, third = tiny("DDIMScheduler"), tiny("EulerDiscreteScheduler"), tiny("DDIMScheduler", "v_prediction")
    recipe = pool.Recipe(steps=4, guidance=1.0, trajectories=2)
    keys = [pool._key(t, ["cup"], [], recipe) for t in (one, other, third)]
    assert keys[0] == keys[1] != keys[2]
