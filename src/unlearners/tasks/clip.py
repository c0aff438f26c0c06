"""Tasks for the canvas' CLIP and for the models that hold its towers: forget a mascot or a style."""

from __future__ import annotations

from ..base import Data, Task
from ..errors import unknown
from ..zoo.canvas.world import MASCOTS, STYLES

SUITE = ("fa", "ta", "mia_cosine", "similarity", "cost")
FORMS = {
    "canvas-mascots": ("A picture of {}.", "{}", "a portrait of {}", "{} the mascot"),
    "canvas-styles": ("An image in {} style.", "a {} picture"),
    "canvas-scenes": tuple(f"A {{}} image in {s} style." for s in STYLES),
}
"""how the classes of each source are said"""


def names() -> list[str]:
    """The concepts: every mascot, and every style but photo, which the mascots are drawn in, and mosaic, which no pair shows."""
    return [*MASCOTS, *(s for s in STYLES if s not in ("photo", "mosaic"))]


def task(concepts: str) -> Task:
    """The task that forgets ``concepts``, one or several of a kind, joined by "+"."""
    parts = concepts.split("+")
    for c in parts:
        if c not in names():
            raise unknown("canvas identity or style", c, names())
    mascots = all(c in MASCOTS for c in parts)
    own, other = ("canvas-mascots", "canvas-styles") if mascots else ("canvas-styles", "canvas-mascots")
    family: tuple[str, ...] = MASCOTS if mascots else tuple(STYLES)
    said = ("{c}", "A picture of {c}.") if mascots else ("An image in {c} style.",)
    rows = "caption=" + ",".join(parts)
    return Task(
        name=f"clip/{concepts}",
        kind="identity" if mascots else "style",
        concepts=tuple(parts),
        preserve=tuple(f for f in family if f not in parts),
        prompts=tuple(s.format(c=c) for c in parts for s in said),
        forget=Data(source="canvas-pairs", rows=rows),
        retain=Data(source="canvas-pairs", rows=f"not {rows}"),
        holdout=_named(own),
        utility=(_named(other), _named("canvas-scenes")),
        judge="canvas",
        question="What is the name of this mascot?" if mascots else "In what style is it drawn?",
        suite=SUITE,
    )


def _named(source: str) -> Data:
    return Data(source=source, split="test", forms=FORMS[source])
