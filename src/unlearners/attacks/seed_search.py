"""The seed search of UnlearnDiffAtk (Zhang et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..base import Adversarial, Attack, Hit, Item, Row, Task
from ..targets.base import TextToImage
from ._search import stream

SEEDS = 2**31


@dataclass(frozen=True, kw_only=True)
class SeedSearch(Attack):
    """Ask again with the same prompt and another seed, and look whether the concept comes back.

    Idea: an erasure that fails for one start noise in fifty fails for everyone who asks fifty times. No prompt is searched.

        x_T ~ N(0, I) anew for each query,      c' = c

    Logged: ``try`` number of rounds done, one query each for every prompt left; ``left`` prompts not yet broken.

    Deviations from the authors' code:
      1. All prompts are tried together; broken ones leave the batch.
      2. Seeds come from each prompt's own random stream. As in theirs, none is used twice for a prompt, nor is the prompt's own.
      3. The first success ends a prompt's search. Theirs asks all its 40 seeds and gives the share of them that show the concept; that
         share is what 100 - ``ua`` says when the task has as many seeds.
    """

    needs = TextToImage
    paper: ClassVar[str] = "arXiv:2310.11868"
    access: ClassVar[Literal["white", "black"]] = "black"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"tries": 40},
        "fast": {"tries": 10},
    }

    tries: int = 40
    """rounds; also the largest number of queries for each prompt"""
    batch: int = 64
    """prompts attacked together; changes memory and speed, not the search"""

    def run(self, target: TextToImage, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        left, rng = list(range(len(items))), [stream(i) for i in items]
        used = [{item.seed} for item in items]
        for n in range(self.tries):
            won = hit({i: Adversarial(prompt=items[i].prompt, seed=_fresh(used[i], rng[i])) for i in left})
            left = [i for i in left if i not in won]
            yield {"try": n + 1.0, "left": float(len(left))}
            if not left:
                return


def _fresh(used: set[int], rng: torch.Generator) -> int:
    """A seed that is not yet in ``used``, which it joins."""
    while (seed := int(torch.randint(SEEDS, (), generator=rng))) in used:
        pass
    used.add(seed)
    return seed
