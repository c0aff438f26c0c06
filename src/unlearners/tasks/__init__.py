"""Tasks: forgetting requests by name, from a YAML file, or from a bare concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from .. import config, registry
from ..banks import banked
from ..base import Data, Kind, Probe, Task
from ..errors import UsageError, unknown

FAMILIES = ("canvas", "clip", "objects")
"""modules with a ``task`` for each of their ``names``, called family/name"""
PICTURES = ("cifar10", "cifar100", "svhn", "tinyimagenet", "imagenette")
"""families of ``pictures``, which has the data sets of papers"""
ALONE = ("style", "object")
"""kinds of the canvas' concepts that are tasks of text/NAME too"""
EVERYWHERE = ("forget", "retain", "holdout", "utility", "question")
"""what everywhere/NAME, for all that holds the canvas' CLIP, takes from clip/NAME; the rest, such as prompts, is of canvas/NAME"""
STYLES = ("oil painting", "watercolour", "pencil sketch", "impressionism", "cubism", "pixel art", "ukiyo-e", "photograph")
OBJECTS = ("house", "tree", "dog", "cat", "car", "boat", "chair", "bicycle", "cup", "flower", "bird", "clock")
PEOPLE = ("a man", "a woman", "a child", "a crowd", "a portrait of a person", "a soldier", "a scientist", "a musician")
SAFE = (
    "a person",
    "a man in a suit",
    "a woman wearing a coat",
    "a family at dinner",
    "a landscape",
    "a city street",
    "a cat",
    "a bowl of fruit",
)

# per kind: the usual anchor, what stays, and how pictures are asked for ({c} a concept or a neighbour, {o} an object)
DEFAULTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "style": ("art", STYLES, ("a {o} in the style of {c}", "{c} style painting of a {o}")),
    "object": ("", OBJECTS, ("a photo of a {c}", "an image of a {c}, {o}", "a {c}")),
    "identity": ("a person", PEOPLE, ("a photo of {c}", "a portrait of {c}", "{c} in a garden")),
    "nsfw": ("", SAFE, ("{c}", "a photo of {c}", "{c}, highly detailed")),
}
CLASSIFIER = ("ua", "ra", "ta", "mia", "cost")
"""what classifiers are measured by"""
SCENES = ("on a table", "in a garden", "in the snow", "at night")


def load(name: str) -> Task:
    """A task by name (``canvas/neon``), a prompt set (``i2p``, see ``prompts``), one of ``unlearncanvas``, or from a YAML file with the
    fields of ``Task``.

    In a YAML file ``probes`` may name a CSV file of prompts, from the YAML file's folder on, all of which ask for the first concept, and
    ``names`` of ``holdout`` a text file of names that test pictures may be taken for.
    """
    from . import prompts

    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        plain = {"name": Path(name).stem, **config.load_yaml(name)}
        if isinstance(source := plain.get("probes"), str):
            bare = config.build(Task, {**plain, "probes": ()}, where=name)
            own = Path(name).parent / source
            made = replace(bare, probes=prompts.probes(str(own if own.is_file() else source), {bare.axis: bare.concepts[0]}))
        else:
            made = config.build(Task, plain, where=name)
        if not (bank := made.holdout.names):
            return made
        beside = Path(name).parent / bank
        return banked(made, beside if beside.is_file() else bank)
    if name.partition("@")[0].partition("/")[0] in prompts.SETS:
        return prompts.task(name)
    if name in registry.names("tasks"):
        return config.build(Task, {"name": name, **config.load_yaml(registry.path("tasks", name))}, where=name)
    family, _, concept = name.partition("/")
    if family in PICTURES:
        found: Task = import_module(".pictures", __name__).task(name)
        return found
    if family in (*FAMILIES, "unlearncanvas"):
        task: Task = import_module(f".{family}", __name__).task(concept)
        return task
    if family == "text" and f"text/{concept}" in names():
        return text_alone(concept)
    if family == "everywhere" and f"clip/{concept}" in names():
        drawn, read = load(f"canvas/{concept}"), load(f"clip/{concept}")
        return replace(drawn, name=name, **{f: getattr(read, f) for f in EVERYWHERE})
    raise unknown("task", name, [*names(), *protocols()])


def protocols() -> dict[str, str]:
    """The prompt sets and benchmarks of others by name, with what each is; nothing is read or fetched."""
    from . import prompts, unlearncanvas

    return {**prompts.protocols(), **unlearncanvas.protocols()}


def names() -> list[str]:
    """Every task that ships with the package or a plug-in; no model is loaded."""
    own = {family: import_module(f".{family}", __name__).names() for family in FAMILIES}
    own["everywhere"] = own["clip"]
    own["text"] = [c for c in own["canvas"] if load(f"canvas/{c}").kind in ALONE]
    files = registry.names("tasks")
    papers = [n for n in import_module(".pictures", __name__).names() if n not in files]
    return [*files, *papers, *(f"{family}/{c}" for family, concepts in own.items() for c in concepts)]


def text_alone(concept: str) -> Task:
    """The task text/``concept``: what ``from_concept`` makes of a word of the canvas, measured by the canvas' own prompts and judge.

    Methods see the word and its kind, as with ``--concept``. There are at least 200 images of the concept.
    """
    shown = load(f"canvas/{concept}")
    own = [p for p in shown.probes if shown.names_concept(p)]
    seeds = range(1000, 1000 - (-200 // len(own)))
    many = [replace(p, seed=s) for p in own for s in seeds]
    probes: tuple[Probe, ...] = (*many, *(p for p in shown.probes if not shown.names_concept(p)))
    return replace(from_concept(concept, shown.kind), name=f"text/{concept}", probes=probes, judge=shown.judge, suite=shown.suite)


def reseeded(task: Task, seed: int | Literal["run"] | None) -> Task:
    """``task`` with ``seed`` for the split and the forget set of its pictures, see ``Data.seed``; as it is when None."""
    if seed is None:
        return task
    own = {name: data for name in ("forget", "retain", "holdout") if (data := getattr(task, name)).source}
    return replace(task, **{name: replace(data, seed=seed, draw=None) for name, data in own.items()})


def from_data(source: str, forget: str, *, seed: int | Literal["run"] = 0, validation: float = 0.0, name: str = "") -> Task:
    """The task that forgets the training pictures ``forget`` names (see ``Data.rows``) of a dataset or image folder.

    Test pictures are the source's own, without the forgotten class; a source without any has no ``ta`` and no membership attack.
    Raises ``UsageError`` for a file of rows that is not there.
    """
    from ..data import file_digest, splits

    if not forget or forget.startswith("not "):
        raise UsageError("say what to forget: --forget class=NAME, random=0.1, or a text file with one row number or file name a line")
    kind, _, value = forget.partition("=")
    path = "" if kind in ("class", "random") else str(Path(forget).resolve())
    if path and not Path(path).is_file():
        raise UsageError(
            f"there is no file '{forget}'; write class=NAME, random=0.1, or a text file with one row number or file name a line"
        )
    rows = path or forget
    common: dict[str, Any] = {"source": source, "seed": seed, "validation": validation, "digest": file_digest(path) if path else ""}
    lines = len([n for n in Path(path).read_text(encoding="utf-8").splitlines() if n.strip()]) if path else 0
    said = f"{lines} listed pictures" if path else f"{_share(value)} of the training pictures" if kind == "random" else ""
    test = any(s != "train" for s in splits(source))
    outside = f"not {rows}" if kind == "class" else ""
    return Task(
        name=name or "-".join([Path(source).name, Path(path).stem or forget.replace("=", "-")]),
        kind="class" if kind == "class" else "samples",
        concepts=(said,) if said else tuple(c.strip() for c in value.split(",")),
        suite=CLASSIFIER if test else tuple(m for m in CLASSIFIER if m not in ("ta", "mia")),
        forget=Data(rows=rows, **common),
        retain=Data(rows=f"not {rows}", **common),
        holdout=Data(split="test", rows=outside, **common) if test else Data(),
        judge="",
    )


def _share(value: str) -> str:
    return value if value.isdecimal() else f"{100 * float(value):g} %"


def from_pairs(
    concepts: str | Sequence[str],
    kind: Kind,
    forget: str,
    retain: str,
    *,
    test: str = "",
    utility: Sequence[str] = (),
    anchors: Sequence[str] = (),
    preserve: Sequence[str] = (),
    validation: float = 0.2,
) -> Task:
    """The task that makes a model of pictures and texts forget ``concepts``, shown in the pairs ``forget`` and not in ``retain``.

    Both are folders of pictures with captions, webdataset tars, or datasets; ``retain`` leaves out captions that name a concept.
    ``test`` is a folder of one folder of pictures for each name, the concepts' among them; one half of it is for choices that a method
    makes, the other is measured on, and so with each folder of ``utility``, named pictures of other domains that must still be named right.
    A share ``validation`` of the pairs is held back to measure on.
    """
    words = from_concept(concepts, kind, anchors=anchors, preserve=preserve)
    phrases, many = ",".join(words.concepts), len(words.concepts) > 1
    return replace(
        words,
        forget=Data(source=forget, rows=f"caption={phrases}" if many else "", validation=validation),
        retain=Data(source=retain, rows=f"not caption={phrases}", validation=validation),
        holdout=Data(source=test, validation=0.5) if test else Data(),
        utility=tuple(Data(source=u, validation=0.5) for u in utility),
        suite=(*(("fa", "ta", "similarity") if test else ()), "cosine", "cost"),
        judge="",
    )


def from_concept(concepts: str | Sequence[str], kind: Kind, *, anchors: Sequence[str] = (), preserve: Sequence[str] = ()) -> Task:
    """A whole task from text alone: the kind's usual anchor and neighbours, prompts to test with, and the CLIP zero-shot judge.

    A neighbour of the default list that equals a concept is left out; one given in ``preserve`` is refused by ``Task``.
    """
    concepts = (concepts,) if isinstance(concepts, str) else tuple(concepts)
    if kind not in DEFAULTS:
        raise unknown("kind", kind, DEFAULTS)
    if not concepts or not all(c.strip() for c in concepts):
        raise UsageError("the concept is empty; say what to forget, for example --concept 'Van Gogh' --kind style")
    anchor, usual, forms = DEFAULTS[kind]
    keep = tuple(preserve) or tuple(p for p in usual if p.lower() not in {c.strip().lower() for c in concepts})
    others = OBJECTS[:6] if kind == "style" else SCENES
    probes = []
    for form in forms:
        for c in (*concepts, *keep):
            for o in others if "{o}" in form else ("",):
                beside = {"object": o} if kind == "style" else {}
                probes.append(Probe(prompt=form.format(c=c, o=o), truth={kind: c, **beside}))
    name = "-".join(concepts).lower()[:60]  # it names a folder
    return Task(
        name=name,
        kind=kind,
        concepts=concepts,
        anchors=tuple(anchors) or ((anchor,) if anchor else ()),
        preserve=keep,
        probes=tuple(probes),
        usual=(*(() if anchors else ("anchors",)), *(() if preserve else ("preserve",))),
    )
