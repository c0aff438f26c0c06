"""The canvas: the embedded default world, its trained models and how they were made."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@lru_cache(maxsize=1)
def load_judge() -> Any:
    """The trained judge, in evaluation mode (see ``model.Judge``)."""
    from safetensors.torch import load_file

    from .model import Judge

    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(FOLDER / "judge" / "model.safetensors").items()})
    return judge.requires_grad_(False).eval()
