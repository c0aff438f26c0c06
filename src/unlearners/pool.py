"""States of sampled trajectories with the frozen model's predictions at each: built once, kept on disk, read by memory map."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import config, diffusion, keep, patch
from .diffusion import Cond
from .errors import UsageError

VERSION = 2  # raised when the meaning of a pool's file changes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a pool is sampled."""

    steps: int
    """of a whole trajectory along the noise process (DDIM)"""
    guidance: float
    """of classifier-free guidance while sampling"""
    trajectories: int
    """of the concept prompts together"""
    each: int = 1
    """trajectories of every other prompt"""
    gb: float = 2.0
    """size it may have; fewer states of each trajectory are kept when all would be larger"""
    told: Literal["grid", "bucket", "late"] = "grid"
    """the time that the network is told of a state: its own; uniform within half a sampler step around it, so that all times of the
    schedule are met and not only ``steps`` of them; or some two sampler steps noisier, as the code of ESD and AdvUnlearn does"""


class States(NamedTuple):
    """Rows of a pool: x (B, C, h, w), t (B,), the frozen model's e_c = eps(x, t, its prompt) and, of the concepts' rows, eps(x, t, "").

    The predictions are float32 or wider, also where the pool holds half precision.
    """

    x: Tensor
    t: Tensor
    e_c: Tensor
    e_0: Tensor


class Pool:
    """The states of P concept prompts, then those of the others; e_0 is kept for the concepts only.

    ``draw`` picks states of given prompts with the global generator; ``deal`` says which other prompts come next, every one once
    before any comes again. What is left to deal is the state that ``Target.steps`` checkpoints.
    """

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self.x, self.t, self.e_c, self.e_0, self.first = (tensors[n] for n in ("x", "t", "e_c", "e_0", "first"))
        self.device = device
        self.left: list[int] = []

    def draw(self, prompts: Sequence[int]) -> States:
        """One random state for each of ``prompts``, numbered concepts first."""
        p = torch.tensor(prompts)
        low, high = self.first[p], self.first[p + 1]
        rows = low + (torch.rand(len(p), dtype=torch.float64) * (high - low)).long()
        e_0 = self.e_0[rows[rows < len(self.e_0)]]
        x, t, e_c, e_0 = (part.to(self.device) for part in (self.x[rows], self.t[rows], self.e_c[rows], e_0))
        wide = torch.promote_types(e_c.dtype, torch.float32)
        return States(x, t, e_c.to(wide), e_0.to(wide))

    def deal(self, n: int, among: range) -> list[int]:
        """The next ``n`` prompts of ``among``."""
        while len(self.left) < n:
            self.left += [among[i] for i in torch.randperm(len(among)).tolist()]
        dealt, self.left = self.left[:n], self.left[n:]
        return dealt

    def state_dict(self) -> dict[str, Any]:
        return {"left": list(self.left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = list(state["left"])


class Spent(NamedTuple):
    """Seconds: this run's own, and those of the run that built the pool it found."""

    here: float
    before: float

    @property
    def row(self) -> dict[str, float]:
        """What the first row of a log says of it."""
        return {"pool_seconds": self.here + self.before, **({"cached_seconds": self.before} if self.before else {})}


def opened(target: Any, concepts: Sequence[str], others: Sequence[str], recipe: Recipe, *, cache: bool = True) -> tuple[Pool, Spent]:
    """The pool of ``target`` as it is now: from the cache folder when the same was built before, else built and put there.

    The file is named by the weights, prompts, recipe, seed, sizes and dtype. One that is damaged, or of anything else, is built anew.
    Raises ``UsageError`` when not one state of each trajectory fits into ``recipe.gb``.
    """
    start = time.perf_counter()
    key = _key(target, concepts, others, recipe)
    path = keep.place("pools", key)
    if cache and (found := keep.read(path, key)):
        tensors, about = found
        return Pool(tensors, target.device), Spent(time.perf_counter() - start, float(about["seconds"]))
    tensors = _built(target, concepts, others, recipe)
    if cache:
        keep.write(path, key, tensors, seconds=str(time.perf_counter() - start))
        tensors, _ = keep.read(path, key) or (tensors, {})  # mapped, so that the copy in memory can go
    return Pool(tensors, target.device), Spent(time.perf_counter() - start, 0.0)


def _key(target: Any, concepts: Sequence[str], others: Sequence[str], recipe: Recipe) -> str:
    everything = [*concepts, *others]
    about = {
        "version": VERSION,
        "weights": patch.fingerprint(target.modules),  # of the weights as they are: patches may have been applied
        "concepts": len(concepts),
        "prompts": everything,
        "ids": target.tokens(everything).tolist(),
        "recipe": asdict(recipe),
        "process": target.process.about(),
        "seed": torch.initial_seed(),
        "shape": list(target.latent_shape),
    }
    return config.content_hash(about)


@torch.no_grad()
def _built(target: Any, concepts: Sequence[str], others: Sequence[str], recipe: Recipe) -> dict[str, Tensor]:
    """Sample every trajectory and keep, of each, states spread evenly over its steps. Uses no global random numbers."""
    many = math.ceil(recipe.trajectories / len(concepts))
    prompt = [i for i in range(len(concepts)) for _ in range(many)]
    prompt += [len(concepts) + i for i in range(len(others)) for _ in range(recipe.each)]
    C, M, shape = len(concepts) * many, len(prompt), target.latent_shape  # trajectories of concepts, and in all
    null = target.null()
    dtype, numel = next(iter(target.modules["unet"].parameters())).dtype, math.prod(shape)
    S = min(recipe.steps, int(recipe.gb * 1e9 / (numel * dtype.itemsize * (2 * M + C))))  # states kept of each trajectory
    if S < 1:
        raise UsageError(f"pool_gb is {recipe.gb}, too little for one state of each of {M} trajectories; raise it or sample fewer")
    kept = torch.zeros(recipe.steps, M, dtype=torch.bool)
    luck = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    # One offset for each trajectory, so that its S steps lie steps / S >= 1 apart and no two of them coincide.
    spread = ((torch.arange(S)[:, None] + torch.rand(M, generator=luck, dtype=torch.float64)) * recipe.steps / S).long()  # (S, M)
    kept.scatter_(0, spread.clamp(max=recipe.steps - 1), True)
    place = torch.arange(M) * S + kept.long().cumsum(0) - 1  # (steps, M): the row of a kept state

    x_all, e_all = torch.empty(M * S, *shape, dtype=dtype), torch.empty(M * S, *shape, dtype=dtype)
    e_0_all, t_all = torch.empty(C * S, *shape, dtype=dtype), torch.empty(M * S)
    times = target.process.times(recipe.steps, target.device)
    width, last = max(1, target.train_steps // recipe.steps), float(target.train_steps - 1)
    for part in diffusion.batches(M, max(1, min(128, 2**18 // numel))):
        m = torch.arange(M)[part]
        cond = target.encode([[*concepts, *others][prompt[i]] for i in m.tolist()])
        both = Cond.cat([null.repeat(len(m)), cond])
        seeds = [(torch.initial_seed() + 1_000_003 * i) % 2**63 for i in m.tolist()]
        x = diffusion.noise(diffusion.generators(seeds), shape, target.device, null.states.dtype)
        for s, (t, to) in enumerate(pairwise(times)):
            e_0, e_c = target.eps(torch.cat([x, x]), t, both).chunk(2)
            keep = kept[s, m]
            rows, here = place[s, m][keep], keep.to(target.device)
            told, f_0, f_c = t.expand(int(keep.sum())), e_0[here], e_c[here]
            if recipe.told != "grid" and len(rows):
                shift = torch.randint(width, (len(rows),), generator=luck) + (2 * width - 1 if recipe.told == "late" else -(width // 2))
                told = (told.cpu() + shift).clamp(0, last).to(target.device)
                two = Cond.cat([null.repeat(len(rows)), cond[here]])
                f_0, f_c = target.eps(x[here].repeat(2, 1, 1, 1), told.repeat(2), two).chunk(2)
            x_all[rows], e_all[rows], t_all[rows] = x[here].to("cpu", dtype), f_c.to("cpu", dtype), told.float().cpu()
            own = rows < len(e_0_all)
            e_0_all[rows[own]] = f_0.to("cpu", dtype)[own]
            x = target.process.step(x, e_0 + recipe.guidance * (e_c - e_0), t, to)
    first = torch.tensor([prompt.index(p) * S for p in range(len(concepts) + len(others))] + [M * S])
    return {"x": x_all, "t": t_all, "e_c": e_all, "e_0": e_0_all, "first": first}
