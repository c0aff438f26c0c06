"""Token embeddings of one's own inside a prompt: where they go, and the prompts they make together with plain ones."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion import Cond, Soft
from ..errors import UsageError
from ..targets.base import TextToImage

Place = Literal["prefix", "suffix", "replace", "add"]
Spot = tuple[Tensor, Tensor]
"""token ids (L,) and the slots (k,) among them that embeddings go to"""
Deltas = tuple[Tensor, ...]
"""one (k, D), or (n, k, D) for n prompts, for each text encoder"""


def placed(target: TextToImage, concept: str, place: Place, k: int, *, words: bool = False) -> Spot:
    """Token ids (L,) of ``concept`` with room for ``k`` embeddings, and their slots (k,); start and end token stay around them.

    ``add`` needs no room: its slots are the concept's own. ``words`` counts the concept's length in words as AdvUnlearn's code does,
    which cuts "nudity" (two tokens) in half. Raises ``UsageError`` for a concept without tokens and for one that is too long.
    """
    ids = target.tokens([concept])[0]
    L, last = len(ids), max((i for i, token in enumerate(ids.tolist()) if token not in target.special), default=0)
    k = 0 if place == "add" else k
    if not last:
        raise UsageError(f"'{concept}' has no token that the text encoder knows; write it in letters")
    if last + k > L - 3:  # a prompt that fills every slot may have been cut
        raise UsageError(f"'{concept}' is too long for an attack of {k} tokens: a prompt has {L - 3}; shorten it or lower k")
    n = min(last, len(concept.split())) if words else last
    room, own, rest = ids[1:2].expand(k), ids[1 : n + 1], torch.cat([ids[last + 1 :], ids[-1:].expand(last)])
    if place == "replace":
        own = own[:0]
    first = 1 + n if place == "suffix" else 1
    middle = (own, room) if place == "suffix" else (room, own)
    at = torch.arange(first, first + (n if place == "add" else k), device=ids.device)
    return torch.cat([ids[:1], *middle, rest])[:L], at


def encode(target: TextToImage, spot: Spot, delta: Deltas, place: Place, plain: Tensor | None = None) -> Cond:
    """Conditioning of one prompt with each of n deltas in its slots, then of ``plain`` ids (m, L): n + m rows in one call."""
    ids, at = spot
    delta = tuple(d if d.dim() == 3 else d[None] for d in delta)  # (n, k, D)
    if place == "add":
        delta = tuple(table[ids[at]] + d for table, d in zip(tables(target), delta, strict=True))
    n, m = len(delta[0]), 0 if plain is None else len(plain)
    every = ids.expand(n, -1) if plain is None else torch.cat([ids.expand(n, -1), plain])
    slots = torch.cat([at.expand(n, -1), at.new_full((m, len(at)), -1)])
    return target.encode(every, Soft(tuple(F.pad(d, (0, 0, 0, 0, 0, m)) for d in delta), slots))


def tables(target: TextToImage) -> list[Tensor]:
    """The token-embedding table (V, D) of every text encoder."""
    encoders: list[Any] = [m for name, m in target.modules.items() if name.startswith("text_encoder")]
    return [e.get_input_embeddings().weight for e in encoders]


class Latest:
    """The last delta of every concept, for ``Target.steps`` to checkpoint."""

    def __init__(self) -> None:
        self.delta: dict[int, Deltas] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"delta": dict(self.delta)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.delta = dict(state["delta"])
