"""The canvas' twelve objects as a dataset: forget a class or a tenth of the pictures, in the bundled classifier or DDPM."""

from __future__ import annotations

from ..base import Data, Probe, Task
from ..errors import unknown
from ..zoo.canvas.objects import CLASSES
from . import CLASSIFIER

DRAWN = ("ua", "ira", "fid", "kid", "cost")  # of a model that draws
SEEDS = tuple(range(100, 125))


def names() -> list[str]:
    """The classes, "random10" (a tenth of all pictures), and "draw-CLASS" for the DDPM."""
    return ["random10", *CLASSES, *(f"draw-{c}" for c in CLASSES)]


def task(name: str) -> Task:
    """The task called ``name``; a drawn class is judged by the bundled classifier, 25 pictures of each class."""
    if name not in names():
        raise unknown("canvas object", name, names())
    concept = name.removeprefix("draw-")
    rows = "random=0.1" if name == "random10" else f"class={concept}"
    forget, retain = Data(source="canvas", rows=rows), Data(source="canvas", rows=f"not {rows}")
    if name == "random10":
        said, holdout = ("10 % of the training pictures",), Data(source="canvas", split="test")
        return Task(
            name=f"objects/{name}", kind="samples", concepts=said, forget=forget, retain=retain, holdout=holdout, judge="", suite=CLASSIFIER
        )
    others = tuple(c for c in CLASSES if c != concept)
    anchor = CLASSES[(CLASSES.index(concept) + 1) % len(CLASSES)]
    return Task(
        name=f"objects/{name}",
        kind="class",
        domain="object",
        concepts=(concept,),
        anchors=(anchor,),
        preserve=others,
        forget=forget,
        retain=retain,
        holdout=Data(source="canvas", split="test", rows=f"not {rows}"),
        probes=tuple(Probe(prompt=c, truth={"object": c}) for c in CLASSES) if name.startswith("draw-") else (),
        judge="classifier" if name.startswith("draw-") else "",
        seeds=SEEDS,
        suite=DRAWN if name.startswith("draw-") else CLASSIFIER,
    )
