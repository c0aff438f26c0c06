"""The progress of a running method, kept in its folder: log, checkpoints, resuming, the last good state."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from . import __version__
from .base import Row, Stateful, Target
from .errors import NonFiniteError, RefusedError, UnlearnError
from .files import replacing, sentence, write_text

CHECKPOINT_SECONDS = 60.0
Progress = Callable[[str, int, int, Row], None]


def environment(device: str) -> dict[str, str]:
    """Versions, device and commit: what a result depends on beside its configuration."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return ""

    names = ("torch", "diffusers", "transformers", "safetensors", "numpy")
    here = Path(__file__).resolve().parent
    git = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {
        "python": platform.python_version(),
        "unlearners": __version__,
        **{n: of(n) for n in names},
        "device": device,
        "hardware": gpu,
        "git": git,
    }


class FolderSession:
    """Progress of a running method, kept in its folder: log, checkpoints about once a minute, resuming, the last good state."""

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        self.folder, self.progress = folder, progress
        self.path, self.log = folder / "checkpoint.pt", folder / "log.jsonl"
        self.lines, self.saved, self.row = 0, time.monotonic(), Row()
        self.good: dict[str, Tensor] = {}
        for left in folder.glob(".*.tmp"):  # drafts of a killed process
            left.unlink()
        if not self.path.exists():
            write_text(self.log, "")

    def restore(self, target: Target, states: Sequence[Stateful]) -> int:
        trained = _state(target)
        start = 0
        if self.path.exists():
            try:
                state = torch.load(self.path, map_location=target.device, weights_only=True)
            except Exception as error:  # a damaged pickle can raise anything
                raise RefusedError(f"{self.path} is damaged; delete it to start again") from error
            if set(state["weights"]) != set(trained):
                raise RefusedError(f"{self.path} is a checkpoint of other weights; delete it to start again")
            for name, p in trained.items():
                p.data.copy_(state["weights"][name])
            for one, saved in zip(states, state["states"], strict=True):
                one.load_state_dict(saved)
            torch.set_rng_state(state["rng"].cpu())
            if target.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"].cpu(), target.device)
            start, self.lines = int(state["step"]), int(state["lines"])
            kept = self.log.read_text().splitlines()[: self.lines]
            write_text(self.log, "".join(f"{line}\n" for line in kept))
        self.good = {n: p.detach().clone() for n, p in trained.items()}
        return start

    def tick(self, target: Target, states: Sequence[Stateful], done: int, total: int) -> None:
        if self.progress:
            self.progress("erasing", done, total, self.row)
        if time.monotonic() - self.saved < CHECKPOINT_SECONDS and done < total:
            return
        named = _state(target)
        if bad := [n for n in self.good if not torch.isfinite(named[n]).all()]:
            self.undo(target)
            raise NonFiniteError(f"'{bad[0]}' is no longer finite and training stopped; the last good state is kept: try a lower lr")
        if done == total:
            return
        self.good = {n: named[n].detach().clone() for n in self.good}
        state = {
            "step": done,
            "lines": self.lines,
            "weights": self.good,
            "states": [s.state_dict() for s in states],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(target.device) if target.device.type == "cuda" else None,
        }
        with replacing(self.path) as draft:
            torch.save(state, draft)
        self.saved = time.monotonic()

    def undo(self, target: Target) -> None:
        named = _state(target)
        for name, value in self.good.items():
            named[name].data.copy_(value)

    def write(self, row: Row) -> None:
        self.lines, self.row = self.lines + 1, row
        try:
            with self.log.open("a") as f:
                f.write(json.dumps({"step": self.lines, **row}) + "\n")
        except OSError as error:
            raise UnlearnError(f"{self.log} could not be written ({sentence(error)}); free some space and run the same command") from error


def _state(target: Target) -> dict[str, Tensor]:
    """What a checkpoint holds: the weights in training and every buffer, since batch normalisation's statistics move too."""
    trained: dict[str, Tensor] = {n: p for n, p in target.named().items() if p.requires_grad}
    return trained | {f"{c}.{n}": b for c, m in target.modules.items() for n, b in m.named_buffers()}
