"""Prompt sets of others as tasks: I2P, UnlearnDiffAtk's, Ring-A-Bell's and COCO's captions, each prompt with its own seed and guidance.

Written NAME, NAME@SOURCE or NAME/CONCEPT@SOURCE, where SOURCE is a CSV file, a hub id, or a folder in the hub's form. Behind it, with
commas between, may stand ``count=100`` (the first rows only), ``pictures=FOLDER`` (real ones, for FID) and last ``judge=SPEC``:

    i2p                     unlearndiffatk/church@church.csv            coco@coco_10k.csv,pictures=coco/val2014
    i2p@i2p.csv,count=100   unlearndiffatk/vangogh@vangogh.csv,judge=style:model=path/to/vit,top=3
                            unlearndiffatk/tench@tench.csv,judge=style:model=microsoft/resnet-50 (its own judge of objects)

Columns are those the sets are published with: the prompt; ``evaluation_seed``, ``sd_seed`` or ``seed``; ``evaluation_guidance``,
``sd_guidance_scale``, ``guidance_scale`` or ``guidance``, where there is one. What is drawn for a row depends on that row alone. A prompt
beyond the text encoder's context is cut to it by the tokenizer, as every prompt is. The scheduler is the model's own unless
``--scheduler`` names another: UnlearnDiffAtk's published numbers are of lms in 50 steps, those of COCO of lms in 100.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..base import Kind, Probe, Task
from ..errors import UnlearnError, UsageError, unknown
from . import from_concept

Row = Mapping[str, Any]
PROMPT = ("prompt", "caption", "text", "sensitive prompt", "adv_prompt")
SEED = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance")
CATEGORY = ("categories",)


@dataclass(frozen=True, kw_only=True)
class _Set:
    """What a published set is of: its concepts by name as (kind, words, judge), and how it is measured."""

    about: str
    concepts: Mapping[str, tuple[Kind, str, str]]
    suite: tuple[str, ...]
    source: str = ""
    seeded: bool = True  # whether it is published with seeds, and so must have them


SETS = {
    "i2p": _Set(
        about="I2P: 4,703 real prompts (arXiv:2211.05105), from the hub or i2p@FILE.csv; NudeNet counts for each body part",
        concepts={"nudity": ("nsfw", "nudity", "nudenet")},
        suite=("nudenet_counts",),
        source="AIML-TUDA/i2p",
    ),
    "unlearndiffatk": _Set(
        about="UnlearnDiffAtk's prompts (arXiv:2310.11868): unlearndiffatk/CONCEPT@FILE.csv, one of nudity, violence, illegal, vangogh, "
        "church, garbage_truck, parachute, tench",
        concepts={
            "nudity": ("nsfw", "nudity", "nudenet:preset=release"),
            "violence": ("nsfw", "violence", "q16"),
            "illegal": ("nsfw", "illegal activity", "q16"),
            "vangogh": ("style", "Van Gogh", "clip_zero_shot"),
            **{c.replace(" ", "_"): ("object", c, "imagenet") for c in ("church", "garbage truck", "parachute", "tench")},
        },
        suite=("ua", "pre_asr", "asr", "cost"),
    ),
    "ringabell": _Set(
        about="Ring-A-Bell's ready-made prompts (arXiv:2310.10012): ringabell/CONCEPT@FILE.csv, nudity or violence",
        concepts={"nudity": ("nsfw", "nudity", "nudenet"), "violence": ("nsfw", "violence", "q16")},
        suite=("ua", "cost"),
        seeded=False,
    ),
    "coco": _Set(
        about="captions for FID and CLIP score (10,000 of COCO in AdvUnlearn): coco@FILE.csv,pictures=FOLDER, or a hub id for the file",
        concepts={"captions": ("object", "nothing in particular", "clip_zero_shot")},
        suite=("clip_score",),
        seeded=False,
    ),
}


def protocols() -> dict[str, str]:
    """What sets there are, and how each is written. Nothing is read."""
    return {name: found.about for name, found in SETS.items()}


def task(spec: str) -> Task:
    """The task ``spec`` names, see above.

    Raises ``UsageError`` for an unknown set, concept or option, a file that is not there, lacks a column or has no row, and a cell that
    is no seed or guidance; ``UnlearnError`` when the hub cannot be reached.
    """
    head, _, judge = spec.partition(",judge=")
    name, _, rest = head.partition("@")
    source, *pairs = re.split(r",(?=\w+=)", rest)
    options = dict(pair.split("=", 1) for pair in pairs)
    family, _, concept = name.partition("/")
    found = SETS[family]
    if bad := set(options) - {"count", "pictures"}:
        raise unknown(f"option of {family}", bad.pop(), ("count", "pictures", "judge"))
    concept = concept or (next(iter(found.concepts)) if len(found.concepts) == 1 else "")
    if concept not in found.concepts:
        raise unknown(f"concept of {family}", concept, found.concepts)
    if not (source or found.source):
        raise UsageError(f"say where the prompts of {family} are: {name}@FILE.csv, or a hub id in place of the file")
    kind, words, own = found.concepts[concept]
    table = rows(source or found.source)[: _count(options.get("count", ""))]
    probes = tuple(_probe(source or found.source, i, row, family, kind, words, found.seeded) for i, row in enumerate(table, 1))
    suite = (f"fid:reference={options['pictures']}", *found.suite) if "pictures" in options else found.suite
    made = replace(from_concept(words, kind), name=name, probes=probes, judge=judge or own, seeds=(0,), suite=suite)
    return replace(made, anchors=(), preserve=()) if family == "coco" else made


def probes(source: str, truth: Mapping[str, str]) -> tuple[Probe, ...]:
    """The prompts of a CSV file or dataset, each with ``truth``; seed and guidance where there are such columns."""
    return tuple(_read(source, i, row, truth, seeded=False) for i, row in enumerate(rows(source), 1))


def rows(source: str) -> Sequence[Row]:
    """The rows of a CSV file or of a dataset of the hub, at least one."""
    path = Path(source)
    if path.is_file():
        with path.open(encoding="utf-8-sig", newline="") as file:
            found: Sequence[Row] = list(csv.DictReader(file))
    elif not path.is_dir() and (path.suffix == ".csv" or source.startswith((".", "/", "~"))):
        raise UsageError(f"there is no file {source}; check the path")
    else:
        found = _dataset(source)
    if not found:
        raise UsageError(f"{source} has no prompts; give a file with one prompt in each row")
    return found


def _dataset(source: str) -> Sequence[Row]:
    from datasets import load_dataset

    try:
        splits = load_dataset(source)
    except Exception as error:  # what is wrong with the network or a dataset can surface as anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UnlearnError(
            f"the prompts '{source}' could not be fetched ({said[:200]}); connect once, or give a CSV file: @FILE.csv"
        ) from None
    split = splits["train" if "train" in splits else next(iter(splits))]
    keep = [c for c in split.column_names if c in (*PROMPT, *SEED, *GUIDANCE, *CATEGORY)]  # pictures of captions are not decoded
    return [dict(row) for row in split.select_columns(keep)] if keep else [dict.fromkeys(split.column_names, "")] * len(split)


def _count(text: str) -> int | None:
    if text and not (text.isdecimal() and int(text)):
        raise UsageError(f"count is '{text}' but must be a whole number above 0")
    return int(text) if text else None


def _probe(source: str, line: int, row: Row, family: str, kind: Kind, words: str, seeded: bool) -> Probe:
    """Row ``line`` as a probe: one that asks for the concept, but for captions and for what I2P does not file under "sexual"."""
    asked = family != "coco"
    if family == "i2p":
        asked = "sexual" in str(row[_column(source, row, CATEGORY)])
    return _read(source, line, row, {kind: words} if asked else {}, seeded=seeded)


def _read(source: str, line: int, row: Row, truth: Mapping[str, str], *, seeded: bool) -> Probe:
    prompt = str(row[_column(source, row, PROMPT)] or "").strip()
    if not prompt:
        raise UsageError(f"row {line} of {source} has no prompt; fill or delete it")
    seed = _number(source, line, row, SEED, needed=seeded)
    if seed is not None and (seed < 0 or not seed.is_integer()):
        raise UsageError(f"the seed in row {line} of {source} is {seed:g} but must be a whole number from 0 on")
    guidance = _number(source, line, row, GUIDANCE, needed=False)
    return Probe(prompt=prompt, truth=truth, seed=None if seed is None else int(seed), guidance=guidance)


def _column(source: str, row: Row, names: Sequence[str]) -> str:
    """The first of ``names`` that is a column."""
    for name in names:
        if name in row:
            return name
    raise UsageError(f"{source} has no column {' or '.join(names)} (it has {', '.join(map(str, row))}); rename or add it")


def _number(source: str, line: int, row: Row, names: Sequence[str], *, needed: bool) -> float | None:
    """The number in the first of ``names`` that is a column; None where there is none and none is needed."""
    if not needed and not set(names) & set(row):
        return None
    name = _column(source, row, names)
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"'{name}' in row {line} of {source} is '{row[name]}' but must be a number")
    return value
