"""Pictures as latents, each with a prompt: encoded from data or drawn by the pipeline itself, once, and kept on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from . import config, diffusion, keep, patch, schedulers
from .base import Data, Task
from .data import Examples, Loader, open_data

VERSION = 1  # raised when the meaning of a file changes, so that an old one is not taken for a new one
SEED = 1_000_000  # the first seed of drawn pictures, far from those that models are judged by
CHUNK = 16  # pictures that are encoded or drawn together
PHRASES = {
    "style": "an image in {} style",
    "object": "an image of a {}",
    "identity": "a picture of {}",
    "nsfw": "{}",
    "class": "an image of a {}",
    "samples": "an image of a {}",
}
"""how pictures of a concept are asked for, by kind of concept"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a text-to-image model draws of a task that names no pictures."""

    pictures: int = 800
    """how many of each side"""
    forget: tuple[str, ...] = ()
    """prompts of what is to be forgotten; empty: the task's"""
    retain: tuple[str, ...] = ()
    """prompts of what stays; empty: the task's neighbours and anchors, phrased by kind"""


@dataclass(frozen=True)
class Latents:
    """Latents (n, 4, h, w), mapped from a file, and the prompt of each; to be used as ``data.Examples`` are."""

    latent: Tensor
    prompts: tuple[str, ...]
    digest: str
    """hash of what the latents were made from, and of the prompts"""
    indices: Tensor
    """row numbers (n,) in the data; 0 … n - 1 for drawn pictures"""
    device: torch.device
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """for a prompt those that may take its place, the nearest first"""

    def __len__(self) -> int:
        return len(self.latent)

    def batch(self, rows: Tensor, augment: bool = False) -> dict[str, Any]:
        """{"latent": (B, 4, h, w), "prompt": [str], "others": [(str, …)], "rows": (B,)} of ``rows`` (B,) in 0 … n - 1. Latents are not
        augmented."""
        said = [self.prompts[i] for i in rows.tolist()]
        return {
            "latent": self.latent[rows].to(self.device),
            "prompt": said,
            "others": [self.others.get(p, ()) for p in said],
            "rows": rows,
        }

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        """Every picture once, in order."""
        return (self.batch(torch.arange(len(self))[part]) for part in diffusion.batches(len(self), size))

    def loader(self, size: int) -> Loader:
        """Endless shuffled batches."""
        return Loader(cast("Any", self), size, augment=False)


# --- the two sides of a task --------------------------------------------------------------------------------------
def forgotten(target: Any, task: Task, asked: Asked) -> Latents:
    """What is to be forgotten: the task's pictures or, where it names none, ``asked.pictures`` that ``target`` draws as it is now.

    ``others`` of a prompt are the one with the task's anchor in place of the concept. Without an anchor they are the prompts of the
    classes that stay, from the next on, or for a text task the prompts of what stays. Prompts that ``asked`` names go by themselves:
    those to forget give way to those to retain.
    """
    stays = staying(task, asked)
    if task.forget.source:
        examples = open_data(task.forget, side(target))
        says, y = [phrase(task.kind, c) for c in examples.classes], examples.labels.tolist()
        gone, k = set(y), len(says)
        rest = {i: [j % k for j in range(i + 1, i + k) if j % k not in gone or len(gone) == k] for i in gone}
        others = {says[i]: tuple(says[j] for j in rest[i]) for i in gone}
        if task.anchors:
            others = {says[i]: (phrase(task.kind, anchor(task, examples.classes[i])),) for i in gone}
        return replace(encoded(target, examples, [says[i] for i in y]), others=others)
    said = asked.forget or task.prompts or tuple(phrase(task.kind, c) for c in task.concepts)
    plain = bool(task.anchors) and not asked.forget
    return replace(drawn(target, said, asked.pictures), others={p: (instead(task, p),) if plain else stays for p in said})


def retained(target: Any, task: Task, asked: Asked) -> Latents:
    """What stays: the task's pictures or, where it names none, ``asked.pictures`` that ``target`` draws as it is now."""
    if task.retain.source:
        return opened(target, task.retain, task.kind)
    return drawn(target, staying(task, asked), asked.pictures)


def opened(target: Any, data: Data, kind: str = "class") -> Latents:
    """The pictures ``data`` names, each with its class phrased by ``kind`` as its prompt; raises what ``open_data`` raises."""
    examples = open_data(data, side(target))
    says = [phrase(kind, c) for c in examples.classes]
    return encoded(target, examples, [says[y] for y in examples.labels.tolist()])


def staying(task: Task, asked: Asked) -> tuple[str, ...]:
    """Prompts of what stays; the empty prompt where nobody names any."""
    named = asked.retain or tuple(phrase(task.kind, p) for p in (*task.preserve, *task.anchors))
    return tuple(dict.fromkeys(p for p in named if p)) or ("",)


def phrase(kind: str, concept: str) -> str:
    """How a picture of ``concept`` is asked for; an empty concept is the empty prompt."""
    return PHRASES[kind].format(concept) if concept else ""


def anchor(task: Task, concept: str) -> str:
    """The anchor of one of the concepts, the first one's for any other word."""
    return task.anchor(task.concepts.index(concept) if concept in task.concepts else 0)


def instead(task: Task, said: str) -> str:
    """``said`` with the anchor in place of the concept it names; the anchor alone where it names none ("storm" for "lightning").

    An empty anchor makes it the empty prompt.
    """
    for concept in sorted(task.concepts, key=len, reverse=True):
        found = re.compile(rf"(?<!\w){re.escape(concept)}(?!\w)", re.IGNORECASE)
        if found.search(said):
            other = anchor(task, concept)
            return found.sub(lambda _, other=other: other, said) if other else ""  # type: ignore[misc]
    return task.anchor(0)


def side(target: Any) -> int:
    """Height and width of the target's pictures."""
    return int(target.latent_shape[1] * 2 ** (len(target.vae.config.block_out_channels) - 1))


# --- making and keeping -------------------------------------------------------------------------------------------
@torch.no_grad()
def encoded(target: Any, examples: Examples, prompts: Sequence[str]) -> Latents:
    """The latents of ``examples`` (n pictures), each with its prompt, from ``target``'s VAE."""
    about = {
        "version": VERSION,
        "encoder": [patch.fingerprint({"vae": target.vae}), target.vae.config.scaling_factor, str(target.dtype)],
        "pictures": [examples.digest, examples.indices.tolist(), side(target)],
    }
    made = kept(about, lambda: torch.cat([target.latents(b["x"]).cpu() for b in examples.batches(CHUNK)]))
    digest = config.content_hash([about, list(prompts)])
    return Latents(made, tuple(prompts), digest, examples.indices, target.device)


@torch.no_grad()
def drawn(target: Any, prompts: Sequence[str], n: int, *, first: int = SEED) -> Latents:
    """``n`` pictures that ``target`` draws with its own sampler from ``prompts`` in turn, with the seeds ``first`` …, as latents.

    They do not go through the VAE. The global random state is as before, whether they are drawn or found.
    """
    said, sampler = [prompts[i % len(prompts)] for i in range(n)], schedulers.named(target)
    settings = {k: target.sampler[k] for k in ("steps", "guidance")}
    about = {
        "version": VERSION,
        "weights": patch.fingerprint(target.modules),
        "sampler": [type(sampler).__name__, sampler.to_json_string(), settings, str(target.dtype)],
        "prompts": said,
        "seeds": [first, n],
    }

    def draw() -> Tensor:
        unique, made = list(dict.fromkeys(said)), []
        cond = diffusion.Cond.cat([target.encode(unique[part]) for part in diffusion.batches(len(unique), CHUNK)])
        row = [unique.index(p) for p in said]
        for part in diffusion.batches(n, CHUNK):
            c, rows = cond[row[part]], diffusion.generators(range(first, first + n)[part])
            x = diffusion.noise(rows, target.latent_shape, target.device, c.states.dtype)
            how: dict[str, Any] = {"scheduler": sampler, "generators": rows, **settings}
            made.append(diffusion.denoise(target, x, c, target.null(len(c)), **how)[-1][1].cpu())
        return torch.cat(made)

    return Latents(kept(about, draw), tuple(said), config.content_hash(about), torch.arange(n), target.device)


def kept(about: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """The latents made from what ``about`` says: mapped from their file in the cache, which is written when it is not there, damaged, or
    of something else."""
    key = config.content_hash(about)
    path = keep.place("latents", key)
    if found := keep.read(path, key):
        return found[0]["latents"]
    made = make().contiguous()
    keep.write(path, key, {"latents": made})
    found = keep.read(path, key)
    return found[0]["latents"] if found else made
