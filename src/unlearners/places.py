"""Where searched tokens stand beside those of a prompt, for attacks that type them and methods that train against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Place = Literal["prefix", "suffix", "mid", "insert", "per-k-words"]
"""before the prompt; after it; between its halves; one by one at equal distances inside it; one before every third of its tokens"""
EVERY = 3
"""tokens of the prompt after each searched one, under per-k-words"""


def before(n: int, k: int, place: Place) -> list[int]:
    """How many of a prompt's ``n`` tokens stand before each of the ``k`` searched ones, in ascending order.

    Where the prompt is too short for per-k-words or insert, the searched tokens that are left stand together.
    """
    if place == "prefix":
        return [0] * k
    if place == "suffix":
        return [n] * k
    if place == "mid":
        return [n // 2] * k
    if place == "insert":
        return [(i + 1) * (n // (k + 1)) for i in range(k)]
    return [min(EVERY * i, n) for i in range(k)]


def laid(own: Sequence[int], ahead: Sequence[int], filler: int = 0) -> tuple[list[int], list[int]]:
    """The ids of a prompt ``own`` with ``filler`` in place of searched tokens, and their slots, where the start token has slot 0.

    ``ahead`` says of each searched token how many of ``own`` stand before it, as ``before`` does.
    """
    row: list[int] = []
    at: list[int] = []
    done = 0
    for i in ahead:
        row += own[done:i]
        at.append(1 + len(row))
        row.append(filler)
        done = i
    return [*row, *own[done:]], at
