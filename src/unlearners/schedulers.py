"""Samplers by name: the diffusers schedulers that pictures can be drawn with in place of a model's own."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch

from .errors import UsageError, unknown

NAMES: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++_single": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "lcm": "LCMScheduler",
}


def named(target: Any, name: str | None = None) -> Any:
    """The scheduler that ``target`` is to draw with: ``name``, else the one its ``sampler`` names, else its own.

    It is built on the noise schedule of the model and predicts what the model predicts. Models of latents are never clipped.
    Raises ``UsageError`` for an unknown name and for a sampler that cannot carry the model's kind of prediction.
    """
    name = name or target.sampler.get("scheduler")
    scheduler = target.scheduler if name is None else make(name, target.scheduler)
    bounds = [k for k in ("clip_sample", "thresholding") if scheduler.config.get(k)]
    if bounds and target.process.clip is None:
        scheduler = type(scheduler).from_config(scheduler.config, **dict.fromkeys(bounds, False))
    return scheduler


def make(name: str, like: Any) -> Any:
    """The sampler ``name``, a key of ``NAMES`` or a class of diffusers, on the schedule of the scheduler ``like``."""
    import diffusers

    kind = NAMES.get(name.lower(), name)
    if kind not in NAMES.values():
        raise unknown("scheduler", name, NAMES)
    # PNDM's Runge-Kutta start is left out, as all Stable Diffusion configs do: it takes more network evaluations than steps.
    more = {"skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    made = getattr(diffusers, kind).from_config(like.config, **more)
    prediction = like.config.get("prediction_type", "epsilon")
    if not _carries(made, prediction):
        raise UsageError(
            f"the scheduler '{name}' cannot draw with a model that predicts '{prediction}'; use ddim, or leave --scheduler out"
        )
    return made


def _carries(scheduler: Any, prediction: str) -> bool:
    """Whether ``scheduler`` can take a step with a model of that kind of prediction."""
    if prediction != "epsilon" and "prediction_type" not in signature(type(scheduler).__init__).parameters:
        return False
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 1, 2, 2)
    try:
        scheduler.step(scheduler.scale_model_input(x, scheduler.timesteps[0]), scheduler.timesteps[0], x)
    except (NotImplementedError, ValueError):
        return False
    return True
