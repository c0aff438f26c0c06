"""Prompts that must stay as they are: everyday objects or a list of one's own, without what comes near the concept."""

from __future__ import annotations

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
SMALL = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with"])


def prompts(target: Any, task: Task, source: str = "everyday", nearest: float = 0.08) -> list[str]:
    """The retain prompts of ``task``, "" first, each once.

    ``source``: "everyday" (our list, as "a photo of …"), "canvas" (the canvas' world, in other words than its tests'), "preserve" (the
    task's neighbours, said as its concepts are), a text file with one prompt a line, or several of these joined by "+". Left out are
    prompts that share a word with a concept or a synonym, singular or plural, and then the share ``nearest`` of the rest whose text
    embeddings have the highest cosine with a concept's.

    Raises ``UsageError`` for a file that is missing or that asks for the concept itself, and when nothing is left.
    """
    phrases = [*task.concepts, *task.synonyms]
    found: list[str] = []
    for part in source.split("+"):
        if part == "everyday":
            found += [TEMPLATE.format(name) for name in everyday()]
        elif part == "canvas":
            found += _lines(LISTS / "canvas_retain.txt")
        elif part == "preserve":
            found += neighbours(task)
        else:
            found += _listed(Path(part), phrases)
    words = {w for p in phrases for w in _words(p) if w not in SMALL}
    kept = [p for p in dict.fromkeys(found) if p and not words & set(_words(p))]
    kept = _far(target, kept, [TEMPLATE.format(c) for c in task.concepts], nearest)
    if not kept:
        raise UsageError(f"no retain prompt is left beside '{task.concepts[0]}' in '{source}'; give a longer list, or none (retain=none)")
    return ["", *kept]


@cache
def everyday() -> tuple[str, ...]:
    """Names of everyday objects: our own list."""
    return tuple(_lines(LISTS / "everyday.txt"))


def neighbours(task: Task) -> list[str]:
    """What the task preserves, in the words its concepts are said in: "neon style" makes "mosaic style"."""
    forms = [s.replace(c, "{}") for s in task.said for c in task.concepts if c in s and "{" not in s] or ["{}"]
    return [f.replace("{}", p) for p in task.preserve for f in dict.fromkeys(forms)]


def contains(prompt: str, phrase: str) -> bool:
    """Whether ``prompt`` has ``phrase`` in it word by word, in singular or plural."""
    text, wanted = _words(prompt), _words(phrase)
    return bool(wanted) and any(text[i : i + len(wanted)] == wanted for i in range(len(text) - len(wanted) + 1))


def _listed(path: Path, phrases: Iterable[str]) -> list[str]:
    """The lines of a user's file; refused when one asks for what is to be forgotten."""
    if not path.is_file():
        raise UsageError(f"the retain set '{path}' is no file; write everyday, preserve, canvas, or the path of a text file of prompts")
    try:
        lines = _lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the retain set '{path}' cannot be read ({error}); save it as UTF-8 text, one prompt a line") from None
    for line in lines:
        if named := [p for p in phrases if contains(line, p)]:
            raise UsageError(f"'{line}' in {path} asks for '{named[0]}', which is to be forgotten; take it out of the retain set")
    return lines


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
