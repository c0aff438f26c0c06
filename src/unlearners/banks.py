"""How names are compared, and files of names that a picture may be taken for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .base import Data, Task
from .errors import UsageError


def plain(name: str) -> str:
    """A name as it is compared: lower case, words apart by one space, no article in front."""
    return re.sub(r"^(an?|the) ", "", re.sub(r"[\s_-]+", " ", name.lower()).strip())


def forgotten(classes: Iterable[str], task: Task) -> list[bool]:
    """Whether each class is one of the task's concepts: "Elon_Musk" is "Elon Musk"."""
    gone = {plain(c) for c in task.concepts}
    return [c in task.concepts or plain(c) in gone for c in classes]


def read(file: str) -> tuple[str, ...]:
    """The names in a text file, one a line, each once. Raises ``UsageError`` for a file that is not there, is no text, or is empty."""
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"there is no file {file}; give a text file with one name a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{file} is no text in UTF-8; save it as plain text in UTF-8, one name a line") from None
    found = {plain(line): line.strip() for line in reversed(lines) if plain(line)}
    if not found:
        raise UsageError(f"{file} names nothing; write one name a line")
    return tuple(reversed(found.values()))


def digest(file: str) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def banked(task: Task, file: str | Path) -> Task:
    """``task`` whose test pictures are told from all names in ``file`` too.

    Raises ``UsageError`` for a task without named test pictures and for a file that does not name its concepts.
    """
    if task.kind in ("class", "samples"):
        raise UsageError(f"{file} holds names that a CLIP tells apart, and the classes of '{task.name}' are a classifier's; leave it out")
    if not task.holdout.source:
        raise UsageError(f"{file} holds names that test pictures may be taken for, and the task has none; give them with --test")
    path = str(Path(file).expanduser().resolve())
    known = {plain(n) for n in read(path)}
    for concept in task.concepts:
        if plain(concept) not in known:
            raise UsageError(f"{file} does not name '{concept}', which is to be forgotten; add it on a line of its own")
    return replace(task, holdout=replace(task.holdout, names=path, names_digest=digest(path)))


def others(data: Data, classes: Sequence[str]) -> tuple[str, ...]:
    """The names of ``data.names`` that are none of ``classes``; none where ``data`` has no such file."""
    if not data.names:
        return ()
    found = read(data.names)
    if data.names_digest and data.names_digest != digest(data.names):
        raise UsageError(f"{data.names} has changed since this task was made; put the old list back, or give it anew with --names")
    known = {plain(c) for c in classes}
    return tuple(n for n in found if plain(n) not in known)
