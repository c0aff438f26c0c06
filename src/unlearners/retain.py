"""Prompts that must stay as they are: everyday objects or a list of one's own, without what comes near the concept."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Task
from .diffusion import batches
from .errors import UsageError

LISTS = Path(__file__).parent / "tasks"
TEMPLATE = "a photo of {}"
OURS = {"everyday": TEMPLATE, "objects": TEMPLATE, "people": TEMPLATE, "scenes": TEMPLATE, "styles": "{} style"}
"""our lists, and how their names are said; everyday and objects are one list"""
SMALL = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"])


def prompts(target: Any, task: Task, source: str = "everyday", nearest: float = 0.08, *, filtered: bool = True) -> list[str]:
    """The retain prompts of ``task``, "" first, each once.

    ``source``, or several of them joined by "+":
    - everyday (or objects), people, scenes, styles: our lists, as "a photo of …" or "… style";
    - canvas: the canvas' world, in other words than its tests'; preserve: the task's neighbours, said as its concepts are;
    - coco_object, imagenet: the 80 and 1000 class names, as "a photo of …"; hub:NAME, those of a data set of the hub;
    - a text file with one prompt a line, or a CSV file with a column "prompt", as AdvUnlearn's release has them.

    Left out are prompts that share a word with a concept or a synonym, singular or plural, and then the share ``nearest`` of the rest
    whose text embeddings have the highest cosine with a concept's. Without ``filtered`` nothing is left out.

    Raises ``UsageError`` for a file that is missing or that asks for the concept itself, and when nothing is left.
    """
    phrases = [*task.concepts, *task.synonyms]
    found: dict[str, str] = {}  # {prompt: what of it is compared with the concept's words}
    for part in source.split("+"):
        found |= {prompt: name for prompt, name in _said(part, task, phrases if filtered else ()).items() if prompt not in found}
    kept = [p for p in found if p]
    if filtered:
        words = {w for p in phrases for w in _words(p) if w not in SMALL}
        kept = [p for p in kept if not words & set(_words(found[p]))]
        kept = _far(target, kept, [TEMPLATE.format(c) for c in task.concepts], nearest)
    if not kept:
        raise UsageError(
            f"no retain prompt is left of the {len(found)} in '{source}', since all share a word with '{task.concepts[0]}'; give a list of "
            "other things, or none (retain=none)"
        )
    return ["", *kept]


def _said(part: str, task: Task, phrases: Iterable[str]) -> dict[str, str]:
    """The prompts of one source: {prompt: the text of it that may not share a word with the concept}."""
    if part in OURS:
        return {OURS[part].format(name): name for name in named(part)}
    if part in ("coco_object", "imagenet") or part.startswith("hub:"):
        classes = _hub(part.removeprefix("hub:")) if part.startswith("hub:") else _torchvision(part)
        return {TEMPLATE.format(name): name for name in classes}
    found = _lines(LISTS / "canvas_retain.txt") if part == "canvas" else neighbours(task) if part == "preserve" else None
    return {p: p for p in (_listed(Path(part), phrases) if found is None else found)}


@cache
def named(which: str) -> tuple[str, ...]:
    """The names of one of our own lists."""
    return tuple(_lines(LISTS / f"{'everyday' if which == 'objects' else which}.txt"))


def everyday() -> tuple[str, ...]:
    """Names of everyday objects: our own list."""
    return named("everyday")


def _torchvision(which: str) -> list[str]:
    """The class names of COCO's detection task or of ImageNet, which torchvision carries."""
    from torchvision.models import ResNet50_Weights
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    kind: Any = ResNet50_Weights if which == "imagenet" else FasterRCNN_ResNet50_FPN_Weights
    return [name for name in kind.DEFAULT.meta["categories"] if name not in ("__background__", "N/A")]


def _hub(name: str) -> list[str]:
    """The class names of a data set of the hub, behind a colon its configuration; no picture is fetched."""
    from datasets import ClassLabel, load_dataset_builder

    where, _, chosen = name.partition(":")
    try:
        features = load_dataset_builder(where, chosen or None).info.features or {}
    except Exception as error:  # the library raises what its readers, the network and the file system raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UsageError(f"the retain set 'hub:{name}' cannot be read ({reason}); check its name, or give a text file of prompts") from None
    if not (labels := [f.names for f in features.values() if isinstance(f, ClassLabel)]):
        raise UsageError(f"the data set '{name}' has no class names; write the retain prompts into a text file and give its path")
    return list(labels[0])


def neighbours(task: Task) -> list[str]:
    """What the task preserves, in the words its concepts are said in: "neon style" makes "mosaic style"."""
    forms = [s.replace(c, "{}") for s in task.said for c in task.concepts if c in s and "{" not in s] or ["{}"]
    return [f.replace("{}", p) for p in task.preserve for f in dict.fromkeys(forms)]


def apart(target: Any, task: Task, names: Sequence[str], nearest: float, form: str = TEMPLATE) -> list[str]:
    """``names`` without those that share a word with a concept or a synonym, or have a word that it is a part of ("goldfish" for "fish"),
    and then without the share ``nearest`` whose text embeddings have the highest cosine with a concept's, both said as ``form``."""
    taken = {w for p in (*task.concepts, *task.synonyms) for w in _words(p) if w not in SMALL}
    parts = tuple(w for w in taken if len(w) > 2)
    left = [n for n in names if not taken & set(_words(n)) and not any(part in word for word in _words(n) for part in parts)]
    far = set(_far(target, [form.format(n) for n in left], [form.format(c) for c in task.concepts], nearest))
    return [n for n in left if form.format(n) in far]


def contains(prompt: str, phrase: str) -> bool:
    """Whether ``prompt`` has ``phrase`` in it word by word, in singular or plural."""
    text, wanted = _words(prompt), _words(phrase)
    return bool(wanted) and any(text[i : i + len(wanted)] == wanted for i in range(len(text) - len(wanted) + 1))


def _listed(path: Path, phrases: Iterable[str]) -> list[str]:
    """The lines of a user's file; refused when one asks for what is to be forgotten."""
    if not path.is_file():
        known = ", ".join((*OURS, "preserve", "canvas", "coco_object", "imagenet"))
        raise UsageError(f"the retain set '{path}' is no file; write {known}, hub:NAME, or the path of a text file of prompts")
    try:
        lines = _table(path) if path.suffix.lower() == ".csv" else _lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the retain set '{path}' cannot be read ({error}); save it as UTF-8 text, one prompt a line") from None
    for line in lines:
        if named := [p for p in phrases if contains(line, p)]:
            raise UsageError(f"'{line}' in {path} asks for '{named[0]}', which is to be forgotten; take it out of the retain set")
    return lines


def _table(path: Path) -> list[str]:
    """The column "prompt" of a CSV file; ``UsageError`` where there is none."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if "prompt" not in (rows.fieldnames or ()):
            raise UsageError(f"{path} has no column 'prompt'; name the column of the retain prompts so, or give a text file of them")
        return [p for row in rows if (p := (row["prompt"] or "").strip())]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _words(text: str) -> list[str]:
    """Lower-case words, plurals made singular the same crude way on both sides of a comparison."""
    return [_singular(w) for w in re.findall(r"[^\W_]+", text.lower())]


def _singular(word: str) -> str:
    for end, put in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x"), ("oes", "o"), ("ves", "f")):
        if word.endswith(end) and len(word) > len(end) + 1:
            return word[: -len(end)] + put
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word


def _far(target: Any, found: Sequence[str], concepts: Sequence[str], nearest: float) -> list[str]:
    """``found`` without the share ``nearest`` that is most like a concept, in the order given."""
    drop = int(nearest * len(found))
    if not drop:
        return list(found)
    states = _embedded(target, [*found, *concepts])
    states = F.normalize(states - states[: len(found)].mean(0), dim=1)  # text embeddings share a large mean, which hides differences
    like = (states[: len(found)] @ states[len(found) :].T).amax(1)  # (n,)
    near = set(like.argsort(descending=True, stable=True)[:drop].tolist())
    return [p for i, p in enumerate(found) if i not in near]


@torch.no_grad()
def _embedded(target: Any, texts: Sequence[str]) -> Tensor:
    """The text encoder's state at the end token of each text: (n, D), float32 on the CPU."""
    rows = []
    for part in batches(len(texts), 64):
        ids = target.tokens(texts[part])
        plain = torch.tensor([[int(i) not in target.special for i in row] for row in ids.tolist()])
        end = (plain * torch.arange(ids.shape[1])).amax(1) + 1
        states = target.encode(texts[part]).states.float().cpu()
        rows.append(states[torch.arange(len(states)), end.clamp(max=ids.shape[1] - 1)])
    return torch.cat(rows)
