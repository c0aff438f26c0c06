"""Shared by all tests: no network, one thread (a loaded machine is then ten times faster), and a tiny Stable Diffusion."""

from __future__ import annotations

import os
import tempfile

os.environ["UNLEARNERS_CACHE"] = tempfile.mkdtemp()  # no test finds weights that another run has kept
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or diffusers is imported, which read it once

import atexit
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings

atexit.register(shutil.rmtree, os.environ["UNLEARNERS_CACHE"])
torch.set_num_threads(1)
settings.register_profile("unlearners", deadline=None)  # a loaded machine is slow, not wrong
settings.load_profile("unlearners")


@pytest.fixture(scope="session")
def sd() -> Callable[..., Any]:
    """``sd(seed=0)``: a new ``StableDiffusion.tiny()``, so that a test which edits it disturbs no other."""
    from unlearners.targets.stable_diffusion import StableDiffusion

    return StableDiffusion.tiny
