"""What every diffusion method shares: conditioning in batches, guidance, denoising with any scheduler, trajectory pools."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """Text conditioning of a batch: ``states`` (B, L, D); for SDXL also ``pooled`` (B, P) and ``time_ids`` (B, 6).

    ``ids`` (B, L) are the token ids that the states were read from, where they were read from any.
    """

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Cond:
        pooled, time_ids, ids = (None if x is None else f(x) for x in (self.pooled, self.time_ids, self.ids))
        return Cond(f(self.states), pooled, time_ids, ids)

    def __getitem__(self, rows: Any) -> Cond:
        """Rows by slice, list or index tensor; an integer gives a batch of one."""
        rows = [rows] if isinstance(rows, int) else rows
        return self._map(lambda x: x[rows])

    def repeat(self, n: int) -> Cond:
        """The whole batch ``n`` times."""
        return self._map(lambda x: x.repeat(n, *[1] * (x.dim() - 1)))

    def detach(self) -> Cond:
        return self._map(lambda x: x.detach())

    @staticmethod
    def cat(parts: Sequence[Cond]) -> Cond:
        """Batches one after another."""
        pooled = [p.pooled for p in parts if p.pooled is not None]
        time_ids = [p.time_ids for p in parts if p.time_ids is not None]
        ids = [p.ids for p in parts if p.ids is not None]
        states = torch.cat([p.states for p in parts])
        read = torch.cat(ids) if len(ids) == len(parts) else None
        return Cond(states, torch.cat(pooled) if pooled else None, torch.cat(time_ids) if time_ids else None, read)


@dataclass(frozen=True)
class Soft:
    """Token embeddings to put in place of the looked-up ones: (B, k, D) at slots ``at`` … ``at + k - 1``.

    ``embeddings`` is one tensor, or a tuple with one for each text encoder. ``at`` may be the slots themselves, (B, k) integers, so
    that one batch mixes prompts; where it is -1 nothing is put, so a row of -1 is a plain prompt.
    """

    embeddings: Tensor | tuple[Tensor, ...]
    at: int | Tensor = 1

    @classmethod
    def of(cls, e: Tensor, at: int | Tensor, width: int) -> Soft:
        """Embeddings (B, k, D) of a first text encoder of ``width``, with those of a second side by side where D is larger."""
        return cls(e if e.shape[-1] == width else (e[..., :width], e[..., width:]), at)

    def put(self, out: Tensor, tower: int = 0) -> Tensor:
        """Looked-up embeddings ``out`` (B, L, D) of text encoder ``tower`` with these in their slots; differentiable in both."""
        values = (self.embeddings[tower] if isinstance(self.embeddings, tuple) else self.embeddings).to(out.dtype)
        if isinstance(self.at, int):
            return torch.cat([out[:, : self.at], values, out[:, self.at + values.shape[1] :]], 1)
        slots = self.at.clamp(min=0)[..., None].expand_as(values)  # (B, k, D); slot 0 is written back as it was where nothing is put
        return out.scatter(1, slots, torch.where(self.at[..., None] < 0, out.gather(1, slots), values))


Step = Callable[[Tensor, Any, Cond, Cond, float], Tensor]


class Guide(Protocol):
    """A defence at generation time: called with the target at the start of each sampling, it gives what takes ``guided``'s place.

    That is step(x, t, cond, null, guidance) -> e, called once for each step in order; it may keep state, one row for each picture.
    The guide itself keeps none: copies of a target share it, and it encodes its text with the weights of the one it is called with.
    """

    def __call__(self, target: Any) -> Step: ...


def guided(target: Any, x: Tensor, t: Any, cond: Cond, null: Cond, guidance: float) -> Tensor:
    """Classifier-free guidance in one batched call: eps_0 + g (eps_c - eps_0) (Ho & Salimans 2022, eq. 6)."""
    e: Tensor
    if guidance == 1:
        e = target.eps(x, t, cond)
        return e
    e_0, e_c = target.eps(torch.cat([x, x]), tiled(t, 2), Cond.cat([null, cond])).chunk(2)
    e = e_0 + guidance * (e_c - e_0)
    return e


def tiled(t: Any, n: int) -> Any:
    """The times of a batch that stands ``n`` times in one call: ``t`` itself where all rows share it."""
    return t.repeat(n) if isinstance(t, Tensor) and t.dim() else t


@torch.no_grad()
def denoise(
    target: Any,
    x: Tensor,
    cond: Cond,
    null: Cond,
    *,
    steps: int,
    guidance: float,
    scheduler: Any = None,
    stop: int | None = None,
    guide: Guide | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Denoise ``x`` (B, 4, h, w), unit Gaussian noise, in ``steps``: the states [(t, x_t)] before each step, then (0, x_0).

    Without ``scheduler``, the target's own noise process is followed, step by step and without fresh noise (DDIM). Else ``scheduler`` is
    any diffusers scheduler; it is copied, since multi-step ones keep state, and takes the noise that it draws itself from ``generators``,
    one for each row, so that a picture does not depend on its batch. With ``stop``, only that many steps are run and the last state is
    (t, x_t) where the next would begin. Without ``guide``, the weights alone draw: a target's own guide is used where pictures are drawn
    (``sample``), not where a method makes states to train on.
    """
    step, states = guide(target) if guide else partial(guided, target), []
    if scheduler is None:
        times = target.process.times(steps, x.device)
        for i, (t, to) in enumerate(pairwise(times)):
            states.append((t, x))
            if i == stop:
                return states
            x = target.process.step(x, step(x, t, cond, null, guidance), t, to)
        return [*states, (torch.zeros((), device=x.device), x)]
    scheduler = deepcopy(scheduler)
    draws = generators is not None and "generator" in signature(scheduler.step).parameters
    own: dict[str, Any] = {"generator": list(generators or ())} if draws else {}
    scheduler.set_timesteps(steps, device=x.device)
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x, t)
        states.append((t, x_in))
        if i == stop:
            return states
        x = scheduler.step(step(x_in, t, cond, null, guidance), t, x, **own).prev_sample
    return [*states, (torch.zeros((), device=x.device), x)]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """A random stream for each picture: its start noise first, then whatever its sampler draws."""
    return [torch.Generator().manual_seed(s) for s in seeds]


def noise(rows: Sequence[torch.Generator], shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Unit Gaussian noise (len(rows), *shape), each row from its own generator and the same on every device."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in rows]).to(device, dtype)


class TrajectoryPool:
    """Sampled trajectories whose every state feeds updates: M trajectories × S states instead of one state for each sampling.

    ``draw(n)`` gives x_t (n, 4, h, w), t (n,) and the index of the prompt each belongs to. Drawing uses the global generator.
    """

    def __init__(self) -> None:
        self.x = self.t = self.prompt = torch.empty(0)
        self.age = 0

    def fill(self, target: Any, cond: Cond, null: Cond, prompt: Tensor, *, steps: int, guidance: float, scheduler: Any = None) -> None:
        """Sample one trajectory for each row of ``cond`` (M rows); ``prompt`` (M,) says which prompt a row is of."""
        x = torch.randn(len(cond), *target.latent_shape).to(target.device, cond.states.dtype)
        states = denoise(target, x, cond, null, scheduler=scheduler, steps=steps, guidance=guidance)[:-1]
        self.x, self.t, self.prompt, self.age = torch.stack([s for _, s in states]), torch.stack([t for t, _ in states]), prompt, 0

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        self.age += 1
        s, m = torch.randint(len(self.t), (n,)), torch.randint(len(self.prompt), (n,))
        return self.x[s, m], self.t[s], self.prompt[m]

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x, "t": self.t, "prompt": self.prompt, "age": self.age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.x, self.t, self.prompt, self.age = state["x"], state["t"], state["prompt"], state["age"]


def states(
    target: Any,
    pool: TrajectoryPool,
    shown: Cond,
    null: Cond,
    *,
    size: int,
    refresh: int,
    batch: int,
    guidance: float,
    steps: int,
    first: int = 0,
    scheduler: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t (batch, 4, h, w) sampled by ``target``, its t (batch,), and which row of ``shown`` each is of.

    Each call samples a partial trajectory of ``first`` to ``steps`` - 1 steps, along the target's noise process (DDIM) unless a
    ``scheduler`` is given. With ``size`` above 0 the states come from ``pool`` instead, that many whole trajectories, sampled anew after
    ``refresh`` calls.
    """
    how = {"scheduler": scheduler, "guidance": guidance, "steps": steps}
    if size:
        if len(pool.t) == 0 or pool.age >= refresh:
            # all prompts alike, or some of them until the pool is sampled anew
            k = torch.randperm(max(size, len(shown)))[:size] % len(shown)
            pool.fill(target, shown[k], null.repeat(size), k, **how)
        return pool.draw(batch)
    k = torch.randint(len(shown), (batch,))
    stop = int(torch.randint(first, max(first + 1, steps), ()))
    x = torch.randn(batch, *target.latent_shape).to(target.device, null.states.dtype)
    t, x_t = denoise(target, x, shown[k], null.repeat(batch), stop=stop, **how)[-1]
    return x_t, t.expand(batch), k


def batches(n: int, size: int) -> Iterator[slice]:
    """Slices that cover ``range(n)``."""
    return (slice(i, min(i + size, n)) for i in range(0, n, size))
