"""What exports share: the erased pipeline of a run, its weights in the hub's spelling, and folders that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import patch
from ..errors import UsageError
from ..targets import DTYPES, load, read_run, root
from ..targets.stable_diffusion import StableDiffusion


def erased(folder: Path) -> StableDiffusion:
    """The pipeline of a run, at the run's own precision, or its patch would not fit; ``UsageError`` for another family's run."""
    return _pipeline(load(str(folder)), folder)


def original(folder: Path) -> StableDiffusion:
    """The model at the root of a run, without any patch."""
    base, _, family, _ = root(str(folder))
    return _pipeline(load(base, family=family, dtype=read_run(folder)["run"]["dtype"]), folder)


def _pipeline(target: Any, folder: Path) -> StableDiffusion:
    if not isinstance(target, StableDiffusion):
        raise UsageError(
            f"{folder} holds a {type(target).__name__}, and this export takes a StableDiffusion pipeline; share its patch instead"
        )
    return target


def state(component: str, module: torch.nn.Module, dtype: str) -> dict[str, Tensor]:
    """A component's weights, without its name before them, spelled as on the hub."""
    found = patch.live({component: module})
    return {k.partition(".")[2]: converted(t, dtype) for k, t in found.items()}


def converted(tensor: Tensor, dtype: str) -> Tensor:
    """``tensor`` at ``dtype`` if it is of real numbers, on the CPU, in memory of its own."""
    tensor = tensor.detach().cpu()
    return (tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor).contiguous().clone()


def save(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(sorted(tensors.items())), path, {"format": "pt", **(about or {})})
    return path


def save_pipeline(target: StableDiffusion, out: Path, dtype: str) -> Path:
    """A diffusers folder that ``from_pretrained`` loads. Changes the precision of ``target``."""
    target.pipe.to(dtype=DTYPES[dtype])
    target.pipe.save_pretrained(out, safe_serialization=True)
    for component in ("text_encoder", "text_encoder_2"):
        respell(out / component, component)
    return out


def respell(folder: Path, component: str) -> None:
    """Put a saved text encoder at the hub's spelling: transformers 5 saves CLIP text models in one that version 4 cannot read."""
    for path in folder.glob("*.safetensors"):
        weights = {patch.hub_key(f"{component}.{k}").partition(".")[2]: v for k, v in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})
