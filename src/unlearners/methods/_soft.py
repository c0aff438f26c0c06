"""Token embeddings of one's own inside a prompt: where they go, and the prompts they make together with plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion import Cond, Soft
from ..errors import UsageError
from ..places import before, laid
from ..targets.base import TextToImage

Place = Literal["prefix", "suffix", "mid", "insert", "per-k-words", "replace", "add"]
"""as ``places.Place``, or instead of the concept's tokens, or onto their own embeddings"""
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
    own, rest = ids[1 : n + 1].tolist(), torch.cat([ids[last + 1 :], ids[-1:].expand(last)])
    if place == "add":
        row, at = own, list(range(1, 1 + n))
    elif place == "replace":
        row, at = laid([], [0] * k, own[0])
    else:
        row, at = laid(own, before(n, k, place), own[0])
    return torch.cat([ids[:1], ids.new_tensor(row), rest])[:L], torch.tensor(at, dtype=torch.long, device=ids.device)


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


def attack(
    target: TextToImage,
    spot: Spot,
    place: Place,
    drawn: Callable[[], Any],
    kind: Literal["adam", "pgd", "fgsm"],
    steps: int,
    lr: float,
    slips: tuple[str, ...],
    *,
    restarts: int,
    start: Deltas | None,
) -> tuple[Deltas, Tensor]:
    """AdvUnlearn's delta*, (k, D) for each text encoder: the one of ``restarts`` with the lowest loss after ``steps``; and its loss.

    ``drawn`` gives states of a pool with the frozen predictions that the attacker wants back. Restarts begin at random tokens, the first
    at ``start`` where there is one. ``adam`` is Adam, ``pgd`` takes sign steps, ``fgsm`` a single one. The slip "sum" adds up gradients
    over the steps, "stale" gives back what was before the last one.
    """
    R = restarts
    first = torch.randint(target.vocabulary, (R, len(spot[1]))).to(target.device)
    delta = [table[first].float().detach() for table in tables(target)]  # (R, k, D)
    if start is not None:
        delta = [torch.cat([old[None], d[1:]]) for old, d in zip(start, delta, strict=True)]
    opt = torch.optim.Adam([d.requires_grad_() for d in delta], lr=lr)
    total, past = [torch.zeros_like(d) for d in delta], delta

    def losses() -> Tensor:
        x_t, t, e_c, _ = drawn()  # B rows
        prompts, B = encode(target, spot, tuple(delta), place), len(x_t)  # R rows
        e = target.eps(x_t.repeat(R, 1, 1, 1), t.repeat(R), prompts[torch.arange(R).repeat_interleave(B)]).float()
        found: Tensor = (e - e_c.repeat(R, 1, 1, 1)).square().flatten(1).mean(1).view(R, B).mean(1)
        return found

    for _ in range(1 if kind == "fgsm" else steps):
        loss = losses()  # (R,), each restart's own
        g = torch.autograd.grad(loss.sum(), delta)  # of delta alone: no weight's gradient is computed
        total = [s + d if "sum" in slips else d for s, d in zip(total, g, strict=True)]
        past = [d.detach().clone() for d in delta]
        for d, slope in zip(delta, total, strict=True):
            d.grad = slope
            if kind != "adam":
                d.data -= lr * slope.sign()
        if kind == "adam":
            opt.step()
    if R > 1:
        with torch.no_grad():
            loss = losses()  # of what will be used, on states that all restarts share
    best = int(loss.argmin())
    return tuple(d.detach()[best] for d in (past if "stale" in slips else delta)), loss.detach()[best]


class Latest:
    """The last delta of every concept, for ``Target.steps`` to checkpoint."""

    def __init__(self) -> None:
        self.delta: dict[int, Deltas] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"delta": dict(self.delta)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.delta = dict(state["delta"])
