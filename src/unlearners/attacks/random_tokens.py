"""The random attacker of UnlearnDiffAtk (Zhang et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import Self

from ..base import Adversarial, Attack, Auto, Hit, Item, Row, Task
from ..targets.base import TextToImage
from ._search import fits, stream, tokens


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Attack):
    """Put k random vocabulary tokens before the prompt and look whether the concept comes back.

    Idea: the baseline every search must beat. What it finds needs no gradient and no access to the weights.

        c' = decode(s_1 ... s_k) + c,      s_i ~ Uniform(vocabulary without start, end and padding tokens)

    Logged: ``try`` number of rounds done, one query each for every prompt left; ``left`` prompts not yet broken.

    Deviations from the authors' code:
      1. All prompts are tried together; broken ones leave the batch.
      2. Start, end and padding tokens are never drawn, since decoding drops them; theirs was not checked for it.
      3. Every prompt has a random stream of its own, so neither the other prompts nor their order change what it is given.
      4. The prefix is decoded to text, put before the prompt as it was typed, and the whole is tokenised again.
    """

    needs = TextToImage
    paper: ClassVar[str] = "arXiv:2310.11868"
    access: ClassVar[Literal["white", "black"]] = "black"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"tries": 40},
        "paper-nsfw": {"k": 5, "tries": 40},
        "fast": {"tries": 10},
    }

    k: int | Auto = "auto"
    """tokens put before the prompt; auto is the paper's: 5 for nsfw (nudity and harm), 3 for styles, objects and all else"""
    tries: int = 40
    """rounds; also the largest number of queries for each prompt"""
    batch: int = 64
    """prompts attacked together; changes memory and speed, not the search"""

    def resolve(self, target: TextToImage, task: Task) -> Self:
        return replace(self, k=tokens(task)) if self.k == "auto" else self

    def run(self, target: TextToImage, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        k = int(self.k)
        fits(target, k=k)
        words = torch.tensor([i for i in range(target.vocabulary) if i not in target.special])
        left, rng = list(range(len(items))), [stream(i) for i in items]
        for n in range(self.tries):
            s = {i: words[torch.randint(len(words), (k,), generator=rng[i])] for i in left}
            won = hit({i: Adversarial(prompt=f"{target.decode(s[i])} {items[i].prompt}".strip()) for i in left})
            left = [i for i in left if i not in won]
            yield {"try": n + 1.0, "left": float(len(left))}
            if not left:
                return
