"""The data sets of papers on labelled pictures: forget a share or a class in a classifier, a class in a DDPM, a class in Stable Diffusion.

    cifar10/random10, cifar10/random50          a tenth or a half of the training pictures; also cifar100, svhn, tinyimagenet
    cifar10/cat                                 all training pictures of a class
    cifar10/draw-cat                            the same in a DDPM: 500 pictures of each class, read by a ResNet-34
    imagenette/tench                            one of ten classes in Stable Diffusion: 500 pictures of each, read by a ResNet-50

Nothing is opened before a method asks. ``unlearn list recipes`` names the recipes that train originals and the ResNet-34.

Deviations from SalUn's code:
  1. A tenth of the training pictures is held back of every data set, to choose settings on; theirs trains on all of Tiny ImageNet.
  2. The ResNet-34 is trained on CIFAR-10 from random weights and at 32 pixels; theirs starts from ImageNet's, at 224.
  3. FID compares with the pictures of the model before; theirs with 500 training pictures of each class.
"""

from __future__ import annotations

from dataclasses import replace

from ..base import Data, Probe, Task
from ..errors import unknown
from . import CLASSIFIER

SOURCES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn:cropped_digits",
    "tinyimagenet": "zh-plus/tiny-imagenet",
}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENETTE = (
    "tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck", "gas pump", "golf ball",
    "parachute",
)  # fmt: skip
SHARES = {"random10": "0.1", "random50": "0.5"}
JUDGE = "classifier:cifar10-judge"
"""the folder that ``unlearn train cifar10/resnet34_judge --out cifar10-judge`` writes"""
SEEDS = tuple(range(500))
DRAWN = ("ua", "ira", "fid", "cost")
HELD = 0.1


def names() -> list[str]:
    """Every task of this module, as "data set/name"."""
    shares = [f"{name}/{share}" for name in SOURCES for share in SHARES]
    classes = [f"cifar10/{c}" for c in CIFAR10] + [f"cifar10/draw-{c}" for c in CIFAR10]
    return [*shares, *classes, *(f"imagenette/{_file(c)}" for c in IMAGENETTE)]


def task(name: str) -> Task:
    """The task called ``name``; ``UsageError`` when there is none."""
    family, _, said = name.partition("/")
    if name not in names():
        raise unknown(f"task of {family}", said, [n.partition("/")[2] for n in names() if n.startswith(f"{family}/")])
    if family == "imagenette":
        return _imagenette(name, next(c for c in IMAGENETTE if _file(c) == said))
    source = SOURCES[family]
    if said in SHARES:
        rows, concept = f"random={SHARES[said]}", f"{100 * float(SHARES[said]):g} % of the training pictures"
        return _classifier(name, Task(name=name, kind="samples", concepts=(concept,)), source, rows, "")
    concept = said.removeprefix("draw-")
    rows = f"class={concept}"
    if concept == said:
        return _classifier(name, Task(name=name, kind="class", concepts=(concept,)), source, rows, f"not {rows}")
    k = CIFAR10.index(concept)
    return Task(
        name=name,
        kind="class",
        domain="object",
        concepts=(concept,),
        anchors=(CIFAR10[(k + 1) % len(CIFAR10)],),
        preserve=tuple(c for c in CIFAR10 if c != concept),
        forget=Data(source=source, rows=rows),
        retain=Data(source=source, rows=f"not {rows}"),
        holdout=Data(source=source, split="test", rows=f"not {rows}"),
        probes=tuple(Probe(prompt=c, truth={"object": c}) for c in CIFAR10),
        judge=JUDGE,
        seeds=SEEDS,
        suite=DRAWN,
    )


def _classifier(name: str, bare: Task, source: str, rows: str, outside: str) -> Task:
    """``bare`` with what is forgotten, what stays, and the test pictures without a forgotten class."""
    return replace(
        bare,
        forget=Data(source=source, rows=rows, validation=HELD),
        retain=Data(source=source, rows=f"not {rows}", validation=HELD),
        holdout=Data(source=source, split="test", rows=outside, validation=HELD),
        judge="",
        suite=CLASSIFIER,
    )


def _imagenette(name: str, concept: str) -> Task:
    """SalUn's: the forgotten class becomes the next one; evaluated with "Image of …"."""
    k = IMAGENETTE.index(concept)
    source = "frgfm/imagenette:160px"
    return Task(
        name=name,
        kind="object",
        concepts=(concept,),
        anchors=(IMAGENETTE[(k + 1) % len(IMAGENETTE)],),
        preserve=tuple(c for c in IMAGENETTE if c != concept),
        forget=Data(source=source, rows=f"class={k}"),
        retain=Data(source=source, rows=f"not class={k}"),
        probes=tuple(Probe(prompt=f"Image of {c}", truth={"object": c}) for c in IMAGENETTE),
        judge="imagenet",
        seeds=SEEDS,
        suite=DRAWN,
    )


def _file(name: str) -> str:
    return name.lower().replace(" ", "_")
