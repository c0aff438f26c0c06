"""What the searches share that know only the text encoder before the erasure: vocabularies, pooled texts, forms of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..diffusion import Cond
from ..errors import UsageError
from ..targets.base import TextToImage


def free(target: TextToImage, k: int) -> int:
    """How many of ``k`` tokens are searched: all but the places of start and end, where k is the whole context.

    Raises ``UsageError`` when k does not fit.
    """
    room = target.tokens([""]).shape[1] - 2
    if not 0 < k <= room + 2:
        raise UsageError(f"k = {k} tokens do not fit this text encoder; give k from 1 to {room + 2}")
    return min(k, room)


def framed(target: TextToImage, s: Tensor, length: int = 0) -> Tensor:
    """[start] s [end, padding] as ids (P, L), for tokens ``s`` (P, k); cut behind the first ``length`` places unless that is 0."""
    empty = target.tokens([""])[0]  # start, end, padding
    c = torch.cat([empty[:1].expand(len(s), 1), s.to(empty), empty[1:2].expand(len(s), 1), empty[2:].expand(len(s), -1)], 1)
    return c[:, : length or len(empty)]


def pooled(target: TextToImage, cond: Cond, ids: Tensor) -> Tensor:
    """One vector (B, D) for each text: SDXL's pooled one, else the final state of the first end token of ``ids`` (B, L)."""
    if cond.pooled is not None:
        return cond.pooled
    end = (ids == target.tokens([""])[0, 1]).long().argmax(1)
    return cond.states[torch.arange(len(ids), device=end.device), end]


def names(concepts: Sequence[str]) -> list[str]:
    """The words of ``concepts`` in small letters, without those of one or two letters, such as "of", beside longer ones."""
    found = [c.lower().split() for c in concepts]
    return [w for words in found for w in words if len(w) > 2 or max(map(len, words)) <= 2]


def plain(target: TextToImage, concepts: Sequence[str]) -> Tensor:
    """The ids (W,) of tokens that a prompt may hold without a word of ``concepts``: no start, end or padding, nothing without a text, no
    token of the concepts and none whose text has one of their words in it."""
    words = names(concepts)
    own = set(target.tokens(list(concepts)).flatten().tolist()) | target.special
    texts = {i: target.decode(torch.tensor([i])).lower() for i in range(target.vocabulary) if i not in own}
    found = [i for i, text in texts.items() if text and not any(w in text for w in words)]
    if not found:
        raise UsageError(f"no token is left without '{concepts[0]}' in it; give the concept in longer words")
    return torch.tensor(found, device=target.device)


def typed(target: TextToImage, s: Tensor, concepts: Sequence[str]) -> str | None:
    """The text of tokens ``s`` (k,), or None where it is read as other tokens or has a word of ``concepts`` in it."""
    text = target.decode(s)
    read = target.tokens([text])[0]
    whole = len(read) >= len(s) + 2 and torch.equal(read[1 : 1 + len(s)], s.to(read)) and int(read[1 + len(s)]) in target.special
    return text if whole and not any(w in text.lower() for w in names(concepts)) else None
