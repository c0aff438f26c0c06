"""Several attacks one after another: the worst case for each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from .. import registry
from ..base import Adversarial, Attack, Hit, Item, Row, Task, require, settle
from ..diffusion import batches
from ..errors import UsageError
from ..targets.base import TextToImage

LEVELS: tuple[Literal["prompt", "tokens", "embedding", "latent"], ...] = ("prompt", "tokens", "embedding", "latent")


@dataclass(frozen=True, kw_only=True)
class Ensemble(Attack):
    """Try several attacks in turn on each prompt; the prompt is broken when one of them breaks it.

    Idea: a defence is as good as its answer to the attack that suits it least. Members come in order, cheap ones first, and each is
    given the prompts that no earlier one broke. It searches as it would alone, so a prompt that a member breaks alone is broken here:

        broken = broken_1 or broken_2 or … or broken_M,      so the rate is never below that of the best member.

    Access and level are those of the strongest member: "white" when one reads the victim's weights. It searches through a defence that
    acts at generation time when all members that read weights do. A verdict names the member that
    broke the prompt in ``by``, and counts the queries of all members until then.

    Logged: what the member logs, with ``member`` its number in the list, from 1, and ``survivors`` prompts not yet broken by any.

    Deviations from the authors' code: there is no paper, and no authors; it is common practice.
    """

    needs = TextToImage
    paper: ClassVar[str] = "control"
    access: ClassVar[Literal["white", "black"]] = "white"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"members": ("paraphrase", "seed_search", "random_tokens", "ring_a_bell", "mma", "unlearndiffatk")},
        "black": {"members": ("paraphrase:fast", "seed_search:fast", "random_tokens:fast", "ring_a_bell:fast", "mma:fast")},
        "fast": {"members": ("paraphrase:fast", "seed_search:fast", "random_tokens:fast", "unlearndiffatk:fast")},
        "canvas": {"members": ("paraphrase:fast", "seed_search:fast", "ring_a_bell:canvas", "mma:canvas", "unlearndiffatk:canvas")},
    }

    members: tuple[str, ...] = ("paraphrase:fast", "seed_search:fast", "random_tokens:fast", "unlearndiffatk:fast")
    """attacks in the order they are tried, each as "name" or "name:preset"; "paper" is every member's preset with its paper's budget"""
    batch: int = 64
    """prompts attacked together; a member takes as many of them at a time as its own batch says"""

    def __post_init__(self) -> None:
        if not self.members:
            raise UsageError("an ensemble needs members; give attacks such as paraphrase and unlearndiffatk:fast")
        found = [_made(m) for m in self.members]
        object.__setattr__(self, "access", "white" if any(a.access == "white" for a in found) else "black")
        object.__setattr__(self, "through", all(a.through for a in found if a.access == "white"))
        object.__setattr__(self, "level", max((a.level for a in found), key=LEVELS.index))

    def run(self, target: TextToImage, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        found, seed, left = [_made(m) for m in self.members], torch.initial_seed(), list(range(len(items)))
        for attack in found:
            require(attack, target)
        found = [settle(attack, target, task) for attack in found]
        for n, (name, attack) in enumerate(zip(self.members, found, strict=True)):
            won: set[int] = set()
            for part in batches(len(left), attack.batch):
                torch.manual_seed(seed)  # as a member would find it alone
                ids = left[part]
                for row in attack.run(target, task, [items[i] for i in ids], _asking(hit, ids, name, won)):
                    yield {**row, "member": n + 1.0, "survivors": float(len(left) - len(won))}
            left = [i for i in left if i not in won]
            yield {"member": n + 1.0, "survivors": float(len(left))}
            if not left:
                return


def _made(member: str) -> Attack:
    """The attack behind "name" or "name:preset"; ``UsageError`` with the nearest names for an unknown one."""
    name, _, preset = member.partition(":")
    if name == "ensemble":
        raise UsageError("an ensemble cannot be its own member; name its members instead")
    attack: Attack = registry.make("attacks", name, preset=preset or None)
    return attack


def _asking(hit: Hit, ids: Sequence[int], name: str, won: set[int]) -> Hit:
    """``hit`` for a member that sees only the prompts ``ids``; notes in ``won`` which of them it broke."""

    def ask(proposals: Mapping[int, Adversarial]) -> set[int]:
        broken = hit({ids[i]: replace(a, by=name) for i, a in proposals.items()})
        won.update(broken)
        return {i for i in proposals if ids[i] in broken}

    return ask
