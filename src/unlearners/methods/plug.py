"""Plug-and-play: the erasure of another run, put into this target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from .. import imports
from .. import patch as patching
from ..base import Method, Row, Task
from ..errors import RefusedError, UsageError
from ..patch import Patch
from ..targets import is_run, read_run
from ..targets.base import TextToImage


@dataclass(frozen=True, kw_only=True)
class Plug(Method):
    """Plug-and-play (AdvUnlearn, Zhang et al., NeurIPS 2024, §5): a text encoder that forgot on one model replaces another's.

    Idea: models that were fine-tuned from one base often share its text encoder, so what it forgot once is forgotten in all of them.

        theta_text <- theta_text',      where theta_text' was trained on the base and theta_unet, theta_vae stay the target's own

    Nothing is trained. The row that results is an ordinary run, so attacks and metrics say how much of the erasure came along. A
    component can be plugged in where the target holds the very weights that the patch was made for; an edit of the UNet therefore does
    not fit a fine-tuned model, nor a text encoder one that has its own or has forgotten something already: both are refused unless
    ``unshared`` is set.

    Logged: ``tensors`` is how many were plugged in; ``change`` is ||W - W_old|| / ||W_old|| over them.

    Deviations from the authors' code:
    1. They load a whole text encoder in place of the old one and check nothing; here the changed weights are put into one that is
       known to be the same.
    2. Any component can be plugged in, not the text encoder alone.
    3. A checkpoint of others, such as their released text encoders, does not say what it was made for and so needs ``unshared``.
    """

    paper: ClassVar[str] = "control"
    needs: ClassVar[type] = TextToImage

    patch: str = ""
    """run folder, patch or checkpoint with the erasure; empty plugs nothing in, which gives the row of the target before"""
    components: tuple[str, ...] = ()
    """which of the patch's components to take, such as text_encoder; empty takes all"""
    unshared: bool = False
    """plug in also where the target's component is not the one that the patch was made for"""
    params: str = ".*"
    """has no effect; the patch says what it changes"""

    def __post_init__(self) -> None:
        if self.patch:  # the run's record must name the same file wherever it is read
            object.__setattr__(self, "patch", str(Path(self.patch).resolve()))

    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        parts = [self.part(target)] if self.patch else []
        for part in parts:
            self.check(target, part)
        for _ in target.steps(1):
            theta = patching.live(target.modules)
            W_old = {n: theta[n].double() for part in parts for n in part.tensors}
            for part in parts:
                patching.apply(target.modules, part.base, part, force=True)  # ``check`` has said whether it may
            moved = sum(float((theta[n].double() - w).square().sum()) for n, w in W_old.items())
            size = sum(float(w.square().sum()) for w in W_old.values())
            yield {"tensors": len(W_old), "change": (moved / size) ** 0.5 if size else 0.0}

    def part(self, target: TextToImage) -> Patch:
        """What is to be plugged in: the chosen components of the patch."""
        path = Path(self.patch)
        if is_run(path) and (status := read_run(path)["status"]) != "done":
            raise UsageError(f"the erasure in {path} is {status}; run the same 'unlearn erase' again to finish it first")
        file = path / "weights.safetensors" if path.is_dir() else path
        if is_run(path) and not file.is_file():
            raise RefusedError(f"the run in {path} changed no weight, so there is nothing to plug in; give a run that did")
        if self.unshared and not patching.is_patch(file):
            whole = imports.read(file, target.modules, target.base["sha256"])
        else:
            whole = patching.load(file)
        if lost := [c for c in self.components if c not in whole.components]:
            raise UsageError(f"{path} has no '{lost[0]}'; its components are {', '.join(sorted(whole.components))}")
        wanted = set(self.components) or whole.components
        return replace(whole, tensors={k: t for k, t in whole.tensors.items() if k.partition(".")[0] in wanted})

    def check(self, target: TextToImage, part: Patch) -> None:
        """Raise ``RefusedError`` unless the target holds the weights that ``part`` was made for, or ``unshared`` is set."""
        if lost := sorted(part.components - set(target.modules)):
            raise RefusedError(f"{self.patch} changes the '{lost[0]}', which this model lacks; use a model of the family it was made for")
        if self.unshared:
            return
        ours = patching.base_hash({c: target.modules[c] for c in part.components})
        if wrong := sorted(c for c in part.components if ours[c] != part.base[c]):
            text = wrong[0].startswith("text_encoder")
            mend = "use a model that shares it" if text else "train the erasure in the text encoder (--params text_encoder)"
            raise RefusedError(f"this model does not share the '{wrong[0]}' that {self.patch} was made for; {mend}, or set unshared")
