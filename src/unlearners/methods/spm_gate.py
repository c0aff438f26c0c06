"""SPM's gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import config
from .. import patch as patching
from ..base import Method, Row, Task
from ..diffusion import Cond, Step, guided
from ..errors import RefusedError, UsageError
from ..targets import read_run
from ..targets.base import TextToImage

Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class SPMGate(Method):
    """Facilitated transport, the gate of SPM (Lyu et al., CVPR 2024): adapters act as far as a prompt is about the concept.

    Equation: every adapted layer computes W x + gamma(p) B A x, with W of the model before ``spm`` and B A of the run in ``patch``, and
        gamma(p) = max over phrases c that ``spm`` was trained on of max(cos(E(p), E(c)), |T(p) & T(c)| / |T(c)|)
    where E are the text encoder's states of all positions as one vector, and T the tokens without start, end and padding. A prompt that
    names the concept in full has gamma = 1 and gives the image of ungated SPM. Each image of a batch has its own gamma, in both halves of
    classifier-free guidance.

    Use: run ``spm`` first, then this method on the same target with ``patch`` set to that run folder. No weight of the target changes:
    the gate acts at generation time, is applied again when the run folder is loaded (``patch`` must still be there), and is bypassed by
    whoever holds the weights. P4D, UnlearnDiffAtk, PH2P and CCE differentiate through it, gamma included.

    Logged: ``rank`` of the adapters; ``change`` is ||B A|| / ||W||; ``empty`` is gamma of the empty prompt, which says how far the adapters
    act on everything.

    Deviations from the authors' code:
    1. Their program multiplies A and B by gamma each, so that B A is scaled by gamma^2. Here it is gamma, as in the paper (``power``;
       preset ``release`` has 2).
    2. A and B are read from the difference of the weights, by a singular value decomposition truncated at the rank they were trained at.
    3. One run of ``spm`` (or ``leco``) with any number of phrases. Theirs adds up several, each with its own gamma.
    """

    paper: ClassVar[str] = "arXiv:2312.16145"
    needs: ClassVar[type] = TextToImage
    runtime: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "release": {"power": 2}}

    patch: str = ""
    """run folder of ``spm``, made on this target"""
    similarity: Literal["both", "text", "tokens"] = "both"
    """what gamma is: the larger of both, or one of them: text is the cosine of the states, tokens the shared tokens"""
    power: int = 1
    """exponent of gamma; larger values spare prompts of other concepts"""

    def __post_init__(self) -> None:
        if self.power < 1:
            raise UsageError(f"power is {self.power} but must be at least 1")
        if self.patch:  # the run's record must name the same folder wherever it is read
            object.__setattr__(self, "patch", str(Path(self.patch).resolve()))

    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        factors, rank, said, change = self.adapters(target)
        for _ in target.steps(1):
            target.guide = target.late_guide = partial(self.steer, factors, said)  # it has neither warm-up nor memory
            with torch.no_grad():
                empty = self.gamma(target, target.encode([""]), target.encode(list(said)))
            yield {"rank": float(rank), "change": change, "empty": float(empty)}

    def adapters(self, target: TextToImage) -> tuple[dict[str, tuple[Tensor, Tensor]], int, tuple[str, ...], float]:
        """{layer of the UNet: (A, B)} of the run in ``patch``, their rank, the phrases it was trained on, and ||B A|| / ||W||."""
        if not self.patch:
            raise UsageError("the gate has nothing to act on; set patch to the folder of a run of spm on this model")
        record = read_run(self.patch)
        method = record["run"]["method"]
        if record["status"] != "done":
            raise UsageError(f"the erasure in {self.patch} is {record['status']}; run the same 'unlearn erase' again to finish it first")
        if "rank" not in method:
            raise UsageError(f"{self.patch} is a run of {method['name']}, which trains no adapters; set patch to a run of spm")
        if record["start"] != config.content_hash(patching.fingerprint(target.modules)):
            raise RefusedError(f"{self.patch} was not made on this model; use its target, {record['run']['target']}, with its dtype")
        file, live = Path(self.patch) / "weights.safetensors", patching.live(target.modules)
        theirs = patching.load(file).tensors if file.is_file() else {}
        change = {k: t.to(live[k].device).double() - live[k].double() for k, t in theirs.items()}
        rank, norm = int(method["rank"]), sum(float(d.square().sum()) for d in change.values()) ** 0.5
        size = sum(float(live[k].double().square().sum()) for k in change) ** 0.5
        found = {k.removeprefix("unet.").removesuffix(".weight"): thin(d, rank) for k, d in change.items()}
        dtype = {k: live[f"unet.{k}.weight"].dtype for k in found}
        factors = {k: (a.to(dtype[k]), b.to(dtype[k])) for k, (a, b) in found.items()}
        return factors, rank, config.build(Task, record["run"]["task"]).said, norm / size if size else 0.0

    def steer(self, factors: Factors, said: tuple[str, ...], target: TextToImage) -> Step:
        """The guide: plain guidance, with the adapters in every call of the UNet."""
        with torch.no_grad():
            c = target.encode(list(said))
        layers = dict(target.modules["unet"].named_modules())

        def step(x: Tensor, t: Any, p: Cond, null: Cond, g: float) -> Tensor:
            gamma = self.gamma(target, p, c)
            with ExitStack() as hooks:
                for name, pair in factors.items():
                    hooks.callback(layers[name].register_forward_hook(partial(adapted, gamma, pair)).remove)
                return guided(target, x, t, p, null, g)

        return step

    def gamma(self, target: TextToImage, p: Cond, c: Cond) -> Tensor:
        """How far the prompts ``p`` (B rows) are about the phrases ``c``, to the power of ``power``: (B,) in [0, 1]."""
        found = []
        if self.similarity != "tokens":
            found.append(F.cosine_similarity(p.states.flatten(1)[:, None].float(), c.states.flatten(1)[None].float(), dim=2))  # (B, C)
        if self.similarity != "text":
            if p.ids is None or c.ids is None:
                raise UsageError("the tokens of these prompts are not known, so they cannot be compared; set similarity to text")
            special = torch.tensor(sorted(target.special), device=c.ids.device)
            for row in c.ids:
                own = row[~torch.isin(row, special)].unique()
                found.append((p.ids[:, :, None] == own).any(1).float().mean(1, keepdim=True))  # (B, 1)
        return torch.cat(found, 1).amax(1).clamp(0, 1) ** self.power


def thin(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in[, k, k]) and B (out, rank[, 1, 1]) with B A = ``change`` (out, in[, k, k]), which is of that rank up to rounding."""
    flat = change.flatten(1)
    u, s, v = torch.svd_lowrank(flat, min(rank, *flat.shape), niter=4)
    up, down = u * s, v.T
    return (down.view(-1, *change.shape[1:]), up[:, :, None, None]) if change.dim() == 4 else (down, up)


def adapted(gamma: Tensor, pair: tuple[Tensor, Tensor], layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """A layer's output with gamma B A x added; the rows of ``inputs`` are those of ``gamma`` (B,), once or several times."""
    (x, *_), (down, up) = inputs, pair
    if isinstance(layer, nn.Conv2d):
        low = F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up)
    else:
        low = F.linear(F.linear(x, down), up)
    return out + gamma.repeat(len(x) // len(gamma)).view(-1, *[1] * (out.dim() - 1)).to(low.dtype) * low
