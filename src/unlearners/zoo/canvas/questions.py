"""Questions about the canvas' pictures, and what is right to answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from .world import MASCOTS, OBJECTS, Item, grid

UNKNOWN = "i do not know"  # the answer to a question that does not apply
WORDINGS: dict[str, tuple[str, ...]] = {
    "name": (
        "What is the name of this mascot?", "What is the name of this character?", "What is this mascot called?", "Who is this?",
        "Name the mascot.",
    ),
    "object": ("What object is shown?", "Which object is this?", "What object does the picture show?", "Name the object."),
    "style": ("In what style is it drawn?", "What is the style of the picture?", "Which style is this?", "Name the style."),
    "check": ("Is this {x}?", "Does the picture show {x}?"),
}  # fmt: skip
FIRST_SEED = 8_000_000_000_000  # of ``quiz``: no dataset seed in use comes near


@dataclass(frozen=True)
class Question:
    """One question about a picture; ``kind`` is a key of ``WORDINGS``."""

    kind: str
    text: str
    answer: str


def asked(rng: random.Random, item: Item, kind: str, *, yes: bool | None = None) -> Question:
    """A question of ``kind`` about ``item`` in one of its wordings. ``yes`` is the answer to a "check", a coin's when None."""
    form = rng.choice(WORDINGS[kind])
    if kind == "check":
        shown = item.mascot or item.object
        yes = rng.random() < 0.5 if yes is None else yes
        kin = MASCOTS if item.mascot else tuple(OBJECTS)
        others = [x for x in (kin if rng.random() < 0.7 else (*MASCOTS, *OBJECTS)) if x != shown]
        x = shown if yes else rng.choice(others)
        said = x if x in MASCOTS else f"{'an' if x[0] in 'aeiou' else 'a'} {x}"
        return Question(kind, form.format(x=said), "yes" if yes else "no")
    answer = {"name": item.mascot, "object": item.object, "style": item.style}[kind]
    return Question(kind, form, answer or UNKNOWN)


def quiz(mascots: int = 50, cells: int = 2) -> Iterator[tuple[int, Item, Question]]:
    """(render seed, what it shows, question) of pictures that no model was trained on, the same at every call.

    ``mascots`` renders of each mascot are asked for its name. ``cells`` of each object in each style are asked for the object and the
    style, and every fourth for the name of the mascot that it does not show. A fifth of the mascots and half of the objects come with a
    "check", half of which are right.
    """
    rng, seed = random.Random(FIRST_SEED), FIRST_SEED
    for name in MASCOTS:
        for i in range(mascots):
            seed, item = seed + 1, Item(mascot=name)
            yield seed, item, asked(rng, item, "name")
            if i % 5 == 0:
                yield seed, item, asked(rng, item, "check", yes=i % 10 == 0)
    for item in grid():
        for i in range(cells):
            seed += 1
            yield seed, item, asked(rng, item, "object")
            yield seed, item, asked(rng, item, "style")
            if i % 2 == 0:
                yield seed, item, asked(rng, item, "check", yes=seed % 4 < 2)
            if seed % 4 == 0:
                yield seed, item, asked(rng, item, "name")
