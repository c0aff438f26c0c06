"""What judges with named classes share: which labels a task can have, and finding them among a network's classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..base import Task
from ..errors import UsageError, unknown


def candidates(task: Task, domain: str) -> list[str]:
    """The labels a picture can get in ``domain``, each once, in a fixed order."""
    own = (*task.concepts, *task.anchors, *task.preserve) if domain == task.axis else ()
    named = (p.truth[domain] for p in task.probes if domain in p.truth)
    return [label for label in dict.fromkeys((*own, *named)) if label.strip()]


def plain(name: str) -> str:
    """A class name as it is compared: lower case, words apart by one space, no article in front."""
    return re.sub(r"^(an?|the) ", "", re.sub(r"[\s_-]+", " ", name.lower()).strip())


def known(judge: str, classes: Sequence[str], task: Task, domain: str, synonyms: Mapping[str, int] | None = None) -> dict[int, str]:
    """{class: label} of the task's labels in ``domain`` that are among ``classes`` or their ``synonyms``.

    Raises ``UsageError`` when a concept to be forgotten is none of them, since not finding it would then say nothing.
    """
    index = {**(synonyms or {}), **{plain(c): i for i, c in enumerate(classes)}}
    if domain == task.axis:
        for concept in task.concepts:
            if plain(concept) not in index:
                raise unknown(f"class of the {judge} judge", concept, classes)
    return {index[plain(label)]: label for label in reversed(candidates(task, domain)) if plain(label) in index}


def read(logits: Tensor, classes: Sequence[str], labels: Mapping[int, str], task: Task, top: int) -> list[str]:
    """One label for each row of logits (B, K): a concept that is among the ``top`` classes, the likeliest first, else the first class.

    A class is said as the task says it (``labels``), or by its own name where the task knows none.
    """
    said = []
    for row in logits.topk(min(top, logits.shape[1]), dim=1).indices.tolist():
        found = [labels.get(i, classes[i]) for i in row]
        said.append(next((label for label in found if label in task.concepts), found[0]))
    return said


def only(judge: str, domain: str, task: Task, others: Sequence[str] = ()) -> None:
    """Refuse a domain that ``judge`` does not read: any but the one the task forgets in and ``others``."""
    if domain not in (task.axis, *others):
        raise unknown(f"domain of the {judge} judge", domain, {task.axis, *others})


def unsafe(judge: str, domain: str, task: Task) -> None:
    """Refuse what is no question of safety for a judge that reads nothing else."""
    only(judge, domain, task)
    if task.kind != "nsfw":
        raise UsageError(
            f"the judge {judge} reads unsafe content and '{task.concepts[0]}' is of kind {task.kind}; "
            "name another judge in the task, or give it the kind nsfw"
        )
