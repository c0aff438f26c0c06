"""UnlearnCanvas' protocol (Zhang et al., NeurIPS 2024 Datasets and Benchmarks): forget one of its 50 styles or 20 objects.

Written unlearncanvas/NAME; behind it, with commas between, may stand ``pictures=FOLDER`` (real pictures, for FID) and last ``judge=SPEC``:

    unlearncanvas/Van_Gogh
    unlearncanvas/Dogs,pictures=real/without_dogs,judge=unlearncanvas:style=style50.pth,object=cls.pth

Pictures are those of the benchmark's grid: 51 styles, the photos "Seed Images" among them, × 20 objects × 5 seeds, 5,100 of each model, in
its words and with its guidance of 9; its 100 steps are asked for with ``--steps 100``. The model is the benchmark's Stable Diffusion 1.5.

Deviations from the authors' code:
  1. Each picture's noise comes from its own seed; some of their scripts seed once and then draw all pictures in a row.
  2. CRA leaves out the pictures that ask for the concept; their script names the objects in all 51 styles.
  3. FID takes all pictures in the folder that is given; theirs takes five of each style and object, the forgotten one left out.
"""

from __future__ import annotations

import re

from ..base import Probe, Task
from ..errors import unknown

PHOTO = "Seed_Images"
STYLES = (
    "Abstractionism", "Artist_Sketch", "Blossom_Season", "Bricks", "Byzantine", "Cartoon", "Cold_Warm", "Color_Fantasy", "Comic_Etch",
    "Crayon", "Cubism", "Dadaism", "Dapple", "Defoliation", "Early_Autumn", "Expressionism", "Fauvism", "French", "Glowing_Sunset",
    "Gorgeous_Love", "Greenfield", "Impressionism", "Ink_Art", "Joy", "Liquid_Dreams", "Magic_Cube", "Meta_Physics", "Meteor_Shower",
    "Monet", "Mosaic", "Neon_Lines", "On_Fire", "Pastel", "Pencil_Drawing", "Picasso", "Pop_Art", "Red_Blue_Ink", "Rust", "Sketch",
    "Sponge_Dabbed", "Structuralism", "Superstring", "Surrealism", "Ukiyoe", "Van_Gogh", "Vibrant_Flow", "Warm_Love", "Warm_Smear",
    "Watercolor", "Winter",
)  # fmt: skip
OBJECTS = (
    "Architectures", "Bears", "Birds", "Butterfly", "Cats", "Dogs", "Fishes", "Flame", "Flowers", "Frogs", "Horses", "Human",
    "Jellyfish", "Rabbits", "Sandwiches", "Sea", "Statues", "Towers", "Trees", "Waterfalls",
)  # fmt: skip
SEEDS = (188, 288, 588, 688, 888)
GUIDANCE = 9.0


def names() -> list[str]:
    """The concepts; the photos stay, since they are what styles fall back to."""
    return [*STYLES, *OBJECTS]


def protocols() -> dict[str, str]:
    """How the tasks are written, in one line for all seventy."""
    about = "UnlearnCanvas' styles and objects (arXiv:2402.11846), 5,100 pictures each: unlearncanvas/Van_Gogh, unlearncanvas/Dogs …"
    return {"unlearncanvas": about}


def said(name: str) -> str:
    """A name as it stands in a prompt."""
    return name.replace("_", " ")


def probes() -> tuple[Probe, ...]:
    """The grid, in the benchmark's words."""
    return tuple(
        Probe(prompt=f"A {o} image in {said(s)} style.", truth={"style": said(s), "object": o}, guidance=GUIDANCE)
        for s in sorted((*STYLES, PHOTO))
        for o in OBJECTS
    )


def task(spec: str) -> Task:
    """The task ``spec`` names, see above; ``UsageError`` for an unknown style, object or option."""
    head, _, judge = spec.partition(",judge=")
    concept, *pairs = re.split(r",(?=\w+=)", head)
    options = dict(pair.split("=", 1) for pair in pairs)
    if bad := set(options) - {"pictures"}:
        raise unknown("option of unlearncanvas", bad.pop(), ("pictures", "judge"))
    if concept not in names():
        raise unknown("style or object of UnlearnCanvas", concept, names())
    style = concept in STYLES
    family = STYLES if style else OBJECTS
    instead = "Photo" if style else OBJECTS[(OBJECTS.index(concept) + 1) % len(OBJECTS)]
    return Task(
        name=f"unlearncanvas/{concept}",
        kind="style" if style else "object",
        concepts=(said(concept),),
        anchors=(instead,),
        preserve=tuple(said(f) for f in family if f != concept),
        prompts=(f"{said(concept)} Style",) if style else (f"An image of {concept}",),
        probes=probes(),
        judge=judge or "unlearncanvas",
        seeds=SEEDS,
        suite=("ua", "ira", "cra", f"fid:reference={options['pictures']}" if options else "fid", "cost"),
    )
