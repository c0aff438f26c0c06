"""Make an image generator or a classifier forget, attack the result, measure it and look at it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adopt import adopt as adopt
    from .bench import bench as bench
    from .exports import export as export
    from .registry import names as names
    from .report import report as report
    from .run import attack as attack
    from .run import erase as erase
    from .run import evaluate as evaluate
    from .targets import load as load
    from .train import train as train

__version__ = "0.1.0"
__all__ = ["__version__", "adopt", "attack", "bench", "erase", "evaluate", "export", "load", "names", "report", "train"]

_HOME = {
    "adopt": "adopt", "attack": "run", "bench": "bench", "erase": "run", "evaluate": "run", "export": "exports",
    "load": "targets", "names": "registry", "report": "report", "train": "train",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Looked up when first used, so that "import unlearners" does not import torch.
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package. ``bench``, ``report`` and ``train`` are functions here, even after the modules of these names have been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
