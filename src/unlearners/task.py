"""What is asked for: a task, its prompts and pictures, and the pictures that are drawn of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from typing_extensions import Self

from . import config
from .errors import UsageError

Kind = Literal["style", "object", "identity", "nsfw", "class", "samples"]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A prompt and what a faithful picture of it shows: {domain: label}, for example {"style": "neon", "object": "cup"}."""

    prompt: str
    truth: Mapping[str, str]
    seed: int | None = config.later(None)
    """the image seed it is drawn with; None: those of the task"""
    guidance: float | None = config.later(None)
    """its classifier-free guidance; None: the sampler's"""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Examples, named but not opened. The same source, seed, validation share and subset give the same split everywhere."""

    source: str = ""
    """hub name (behind a colon its configuration, "ufldl-stanford/svhn:cropped_digits"), dataset or image folder, webdataset tars,
    "canvas" (its twelve objects), "canvas-pairs", "canvas-mascots" …"""
    split: Literal["train", "validation", "test"] = "train"
    rows: str = ""
    """which: "" all, "class=cat" or "class=3,5", "caption=phrase", "random=0.1" or "random=500", a file of row
    numbers or file names; "not …" the others"""
    seed: int | Literal["run"] = 0
    """seed of the split and of what "random=" takes; "run": "random=" takes what the seed of the run says, and the split is that of 0"""
    validation: float = 0.0
    """share of each class that is split off the training pictures"""
    digest: str = ""
    """SHA-256 of the file of rows, so that a changed file is noticed"""
    forms: tuple[str, ...] = config.later(())
    """how a class is said to a model that reads: "a photo of a {}." …"""
    names: str = config.later("")
    """a text file with one name a line: names that no picture has, and that a picture may be taken for all the same"""
    names_digest: str = config.later("")
    """SHA-256 of that file, so that a changed file is noticed"""
    draw: int | Literal["run"] | None = config.later(None)
    """seed of what "random=" takes, where it is not that of the split; "run" is the seed of the run"""
    subset: int = config.later(0)
    """how many of the training pictures there are, drawn with the split's seed, of each class in proportion; 0 takes all, or those that
    the model was trained on"""
    augment: str = config.later("auto")
    """of training batches: none, flip, crop, crop-flip; crop moves a picture by up to an eighth of its side, crop4 by up to 4 pixels;
    auto is what the model was trained with, else by the data set and the family"""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|none|flip|crop\d*(-flip)?", self.augment):
            raise UsageError(f"augment is '{self.augment}' but must be auto, none, flip, crop, crop-flip, or for example crop4-flip")
        if self.subset < 0:
            raise UsageError(f"subset is {self.subset} but must be a number of pictures; 0 takes all")

    def at(self, seed: int) -> Self:
        """With ``seed``, that of the run, in place of "run"; the same where nothing asks for it."""
        if "run" not in (self.seed, self.draw):
            return self
        draw = seed if self.seed == "run" or self.draw == "run" else self.draw
        drawn = self.rows.removeprefix("not ").startswith("random=")
        return replace(self, seed=0 if self.seed == "run" else self.seed, draw=draw if drawn else None)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One forgetting request. A YAML file, or built from a bare concept on the command line."""

    name: str
    kind: Kind = "object"
    concepts: tuple[str, ...]
    """what to forget"""
    anchors: tuple[str, ...] = ()
    """what takes its place, one for all or one for each concept"""
    preserve: tuple[str, ...] = ()
    """neighbours that must stay"""
    prompts: tuple[str, ...] = ()
    """how the concepts are said while training; the concepts themselves when empty"""
    domain: str = ""
    """the domain of the concepts in probes' truth; the kind when empty"""
    synonyms: tuple[str, ...] = ()
    """other words for the concepts"""
    probes: tuple[Probe, ...] = ()
    judge: str = "clip_zero_shot"
    seeds: tuple[int, ...] = (188, 288, 588, 688, 888)
    suite: tuple[str, ...] = ("ua", "ira", "cra", "clip_score", "asr", "cost")
    forget: Data = Data()
    retain: Data = Data()
    holdout: Data = Data()
    utility: tuple[Data, ...] = config.later(())
    """named pictures of other domains, which must still be named right"""
    question: str = config.later("What is the name of this character?")
    """what a model that answers is asked about a picture"""
    usual: tuple[Literal["anchors", "preserve"], ...] = config.later(())
    """which of these nobody named: they are the usual ones of the kind, and a method may choose better ones"""
    version: int = 1

    def __post_init__(self) -> None:
        if not self.concepts or not all(c.strip() for c in self.concepts):
            raise UsageError("a task needs at least one concept that is not empty; give --concept or fill 'concepts'")
        kept = {p.strip().lower() for p in self.preserve}
        if both := [c for c in self.concepts if c.strip().lower() in kept]:
            raise UsageError(f"'{both[0]}' is both to be forgotten and to be preserved; take it out of one of the two lists")
        if len(self.anchors) not in (0, 1, len(self.concepts)):
            raise UsageError(f"{len(self.anchors)} anchors for {len(self.concepts)} concepts; give one, or one for each")

    @property
    def said(self) -> tuple[str, ...]:
        """The prompts a method trains on."""
        return self.prompts or self.concepts

    @property
    def axis(self) -> str:
        """The domain that is judged for forgetting."""
        return self.domain or self.kind

    def at(self, seed: int) -> Self:
        """With ``seed``, that of the run, in place of "run" in its data."""
        own = {name: getattr(self, name).at(seed) for name in ("forget", "retain", "holdout")}
        made = replace(self, **own, utility=tuple(u.at(seed) for u in self.utility))
        return self if made == self else made

    def anchor(self, i: int) -> str:
        """The anchor of concept ``i``; "" (the empty prompt) when the task has none."""
        return self.anchors[i if len(self.anchors) > 1 else 0] if self.anchors else ""

    def names_concept(self, probe: Probe) -> bool:
        """Whether ``probe`` asks for what is to be forgotten."""
        return probe.truth.get(self.axis) in self.concepts

    def pictures(self, probe: Probe) -> list[Request]:
        """The pictures of ``probe``: one with its own seed, else one for each seed of the task."""
        return [Request(probe.prompt, s, probe.guidance) for s in (self.seeds if probe.seed is None else (probe.seed,))]


@dataclass(frozen=True)
class Request:
    """A picture a metric wants: one prompt, one seed, and the guidance it is drawn with, the sampler's when None."""

    prompt: str
    seed: int
    guidance: float | None = None
