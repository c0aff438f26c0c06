"""Plug-and-play: the erasure of another run, or of somebody else, put into this target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from .. import config, imports, registry
from .. import patch as patching
from ..base import Method, Row, Target, Task
from ..errors import RefusedError, UsageError
from ..patch import Patch
from ..targets import family_of, is_run, read_run
from ..targets.stable_diffusion import StableDiffusion


@dataclass(frozen=True, kw_only=True)
class Plug(Method):
    """Plug-and-play (AdvUnlearn, Zhang et al., NeurIPS 2024, §5): a text encoder that forgot on one model replaces another's.

    Idea: models that were fine-tuned from one base often share its text encoder, so what it forgot once is forgotten in all of them.

        theta_text <- theta_text',      where theta_text' was trained on the base and theta_unet, theta_vae stay the target's own

    Nothing is trained. The row that results is an ordinary run, so attacks and metrics say how much of the erasure came along. A
    component can be plugged in where the target holds the very weights that the patch was made for; an edit of the UNet therefore does
    not fit a fine-tuned model, nor a text encoder one that has its own or has forgotten something already: both are refused unless
    ``unshared`` is set. A CLIP's towers are components of the same names as a pipeline's text encoder and a LLaVA's vision tower, so
    an erasure made on the CLIP can be put into either.

    Logged: ``tensors`` is how many were plugged in; ``change`` is ||W - W_old|| / ||W_old|| over them.

    Deviations from the authors' code:
    1. They load a whole text encoder in place of the old one and check nothing; here the changed weights are put into one that is
       known to be the same.
    2. Any component of any kind of model can be plugged in, not the text encoder alone.
    3. A checkpoint of others, such as their released text encoders, does not say what it was made for and so needs ``unshared``. It may
       also be a whole model in a folder: those of its components count that differ from the target's, compared at float16.
    """

    paper: ClassVar[str] = "control"
    needs: ClassVar[type[Target]] = Target  # type: ignore[type-abstract]

    patch: str = ""
    """run folder, patch, checkpoint or whole model folder with the erasure; empty plugs nothing in: the row of the target before"""
    components: tuple[str, ...] = ()
    """which of the patch's components to take, such as text_encoder; empty takes all"""
    unshared: bool = False
    """plug in also where the target's component is not the one that the patch was made for"""
    params: str = ".*"
    """has no effect; the patch says what it changes"""
    digest: str = config.later("")
    """SHA-256 of the patch (imports.digest), so that a changed file is noticed; empty takes the file as it is"""

    def __post_init__(self) -> None:
        if self.patch:  # the run's record must name the same file wherever it is read
            object.__setattr__(self, "patch", str(Path(self.patch).resolve()))

    def run(self, target: Target, task: Task) -> Iterator[Row]:
        if self.digest and self.patch and imports.digest(Path(self.patch)) != self.digest:
            raise RefusedError(f"{self.patch} is not the file that this run was asked for (their hashes differ); give the command again")
        if alone := bool(self.patch) and self.patch == target.base["name"]:
            said = "nobody said what this model was before the erasure, so its own pictures stand for those before; name it with --base"
            target.warnings = [*target.warnings, said]
        parts = [self.part(target)] if self.patch and not alone else []
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

    def part(self, target: Target) -> Patch:
        """What is to be plugged in: the chosen components of the patch."""
        path = Path(self.patch)
        if is_run(path) and (status := read_run(path)["status"]) != "done":
            raise UsageError(f"the erasure in {path} is {status}; run the same 'unlearn erase' again to finish it first")
        file = path / "weights.safetensors" if is_run(path) else path
        if is_run(path) and not file.is_file():
            raise RefusedError(f"the run in {path} changed no weight, so there is nothing to plug in; give a run that did")
        theirs = whole(path) or not patching.is_patch(imports.held(file)[0])
        if theirs and not self.unshared:
            raise RefusedError(f"{path} was not written by unlearners and does not say what it was made for; set unshared to plug it in")
        given = _model(path, target, self.components) if whole(path) else imports.read(file, target.modules, target.base["sha256"])
        if lost := [c for c in self.components if c not in given.components]:
            raise UsageError(f"{path} has no '{lost[0]}'; its components are {', '.join(sorted(given.components))}")
        wanted = set(self.components) or given.components
        part = replace(given, tensors={k: t for k, t in given.tensors.items() if k.partition(".")[0] in wanted})
        if theirs and not _differs(part, target):
            raise RefusedError(f"{path} holds the very weights of the model it is compared with, so nothing was erased; check both names")
        return part

    def check(self, target: Target, part: Patch) -> None:
        """Raise ``RefusedError`` unless the target holds the weights that ``part`` was made for, or ``unshared`` is set."""
        if lost := sorted(part.components - set(target.modules)):
            raise RefusedError(f"{self.patch} changes the '{lost[0]}', which this model lacks; use a model of the family it was made for")
        if self.unshared:
            return
        ours = patching.base_hash({c: target.modules[c] for c in part.components})
        if wrong := sorted(c for c in part.components if ours[c] != part.base[c]):
            tower = wrong[0].startswith(("text_encoder", "vision_tower"))
            mend = "use a model that shares it" if tower else "train the erasure in the text encoder (--params text_encoder)"
            raise RefusedError(f"this model does not share the '{wrong[0]}' that {self.patch} was made for; {mend}, or set unshared")


def whole(path: Path) -> bool:
    """Whether a folder holds a whole model and not weights alone."""
    return path.is_dir() and not is_run(path) and ((path / "model_index.json").is_file() or family_of(str(path)) != "stable_diffusion")


def _model(path: Path, target: Target, wanted: Sequence[str]) -> Patch:
    """What differs between the model in ``path`` and ``target``, component by component, or the components ``wanted`` as they are.

    Raises ``RefusedError`` where a component is of another architecture, or where the networks are meant for another kind of noise.
    """
    kind: type[Target] = registry.get("targets", family_of(str(path)))
    dtype = next(t.dtype for t in patching.live(target.modules).values() if t.is_floating_point())
    model = kind.load(str(path), dtype=dtype)
    ours, theirs = patching.base_hash(target.modules), patching.base_hash(model.modules)
    moved = {c: m for c, m in model.modules.items() if (c in wanted if wanted else ours.get(c) != theirs[c])}
    for c in moved.keys() & target.modules.keys():
        a, b = ({k: t.shape for k, t in patching.live({c: m[c]}).items()} for m in (moved, target.modules))
        if odd := sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)):
            raise RefusedError(f"the {c} in {path} is of another architecture ('{odd[0]}'); name the base that it was made of")
    if isinstance(model, StableDiffusion) and isinstance(target, StableDiffusion) and not wanted:
        _beside(path, model, target)
    return Patch(tensors=patching.live(moved), base={c: target.base["sha256"].get(c, "") for c in moved}, meta={"foreign": path.name})


def _beside(path: Path, model: StableDiffusion, target: StableDiffusion) -> None:
    """What a pipeline holds beside its components: the noise it is meant for must be the target's; another VAE is left out and noted."""
    if (kind := model.process.prediction) != (own := target.process.prediction):
        raise RefusedError(f"{path} predicts '{kind}' and the model it is compared with '{own}'; name the base it was made of")
    if patching.base_hash({"vae": model.vae}) != patching.base_hash({"vae": target.vae}):
        said = f"{path} has another VAE than the model it is compared with, and pictures are drawn with that model's"
        target.warnings = [*target.warnings, said]


def _differs(part: Patch, target: Target) -> bool:
    """Whether ``part`` changes a weight of ``target`` by more than what float16 rounds away; also where the target lacks it."""
    live = patching.live(target.modules)
    if part.kind == "delta":
        return any(bool(t.any()) for t in part.tensors.values())
    return any(k not in live or not torch.equal(t.half().cpu(), live[k].half().cpu()) for k, t in part.tensors.items())
