"""What the metrics of models that answer share: which questions are asked, which replies are right, and what they are about."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..base import Data, Outputs, Target, Task, kebab
from ..data import file_digest
from ..errors import UsageError
from ..targets._questions import Reply, question_file
from ..targets.base import Chat

ABSTAINS = ("do not know", "don't know", "not sure", "unsure", "unknown", "cannot", "can't", "unable", "no idea")


def wanted(metric: str, source: str, target: Target) -> Data:
    """The questions: ``source``, else the canvas' own for its model; ``UsageError`` where there are none."""
    if not isinstance(target, Chat):
        raise UsageError(f"{metric} asks questions, and a {kebab(target)} answers none; leave it out with --metrics")
    if not source and target.base["name"] != "canvas-llava":
        raise UsageError(f"{metric} has no questions for this model; set its field 'source' to a JSONL file or a folder with one")
    if source in ("", "canvas"):
        return Data(source="canvas", split="test")
    file = question_file(source).resolve()
    return Data(source=str(file), split="test", digest=file_digest(str(file)))


def says(said: str, answers: Iterable[str], substring: bool) -> bool:
    """Whether one of ``answers`` is in the lower-cased reply, as whole words unless ``substring``."""
    said = said.lower()
    return any(a.lower() in said if substring else re.search(rf"(?<!\w){re.escape(a.lower())}(?!\w)", said) is not None for a in answers)


def abstains(said: str) -> bool:
    """Whether a reply says that it has no answer."""
    return any(phrase in said.lower().replace("’", "'") for phrase in ABSTAINS)


@dataclass(frozen=True)
class Parts:
    """Replies by what was asked for: a forgotten thing, another thing of its kind, or anything else that does not name it."""

    forgotten: list[Reply]
    others: list[Reply]
    rest: list[Reply]


def parted(replies: list[Reply], task: Task) -> Parts:
    """``replies`` in three. Questions that name a concept ("Is this zorbo?") are in none: their right answer is what is to change."""
    concepts = {c.lower() for c in task.concepts}

    def about(reply: Reply) -> bool:
        return any(a.lower() in concepts for a in reply.answers)

    forgotten = [r for r in replies if about(r)]
    kinds = {r.kind for r in forgotten}
    others = [r for r in replies if r.kind in kinds and not about(r) and not abstains(r.answers[0])]
    taken = {id(r) for r in (*forgotten, *others)}
    rest = [r for r in replies if id(r) not in taken and not says(r.question, concepts, substring=False)]
    return Parts(forgotten, others, rest)


def told(outputs: Outputs, data: Data, task: Task) -> Parts:
    """The model's replies to ``data`` in three."""
    return parted(outputs.answers(data), task)
