"""What judges with named classes share: which labels a task can have, and finding them among a network's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..banks import plain
from ..base import Task
from ..errors import UsageError, unknown


def candidates(task: Task, domain: str) -> list[str]:
    """The labels a picture can get in ``domain``, each once, in a fixed order."""
    own = (*task.concepts, *task.anchors, *task.preserve) if domain == task.axis else ()
    named = (p.truth[domain] for p in task.probes if domain in p.truth)
    return [label for label in dict.fromkeys((*own, *named)) if label.strip()]


def said(index: int, classes: Sequence[str], labels: Mapping[int, str]) -> str:
    """A class as the task says it, or by its own name where the task knows none."""
    return labels.get(index, classes[index])


def spellings(name: str) -> list[str]:
    """A class name, then each part of one like the hub's "tench, Tinca tinca", as they are compared."""
    parts = name.split(",") if "," in name else []
    return [p for p in dict.fromkeys(map(plain, (name, *parts))) if p]


def known(judge: str, classes: Sequence[str], task: Task, domain: str, synonyms: Mapping[str, int] | None = None) -> dict[int, str]:
    """{class: label} of the task's labels in ``domain`` that are among ``classes``.

    A label is a class when it is the class's name, a part of it ("tench" of "tench, Tinca tinca"), one of ``synonyms``, or, for artists and
    other persons, the name without those in front ("Van Gogh" of "vincent-van-gogh"); a concept also when a synonym of the task is one.
    Raises ``UsageError`` when a concept to be forgotten is no class, since not finding it would then say nothing, or could be several.
    """
    index: dict[str, list[int]] = {}
    for i, c in enumerate(classes):  # whole names first: "cardigan" is no "Cardigan, Cardigan Welsh corgi"
        index.setdefault(plain(c), []).append(i)
    parts: dict[str, list[int]] = {}
    for i, c in enumerate(classes):
        for part in spellings(c)[1:]:
            parts.setdefault(part, []).append(i)
    index = {**{s: [i] for s, i in (synonyms or {}).items()}, **parts, **index}
    found: dict[int, str] = {}
    for label in candidates(task, domain):
        concept = domain == task.axis and label in task.concepts
        words = (label, *task.synonyms) if concept and len(task.concepts) == 1 else (label,)
        rows = next((index[s] for w in words for s in spellings(w) if s in index), None)
        rows = rows or (_surnamed(judge, label, index, classes, concept) if task.kind in NAMED and domain == task.axis else [])
        if concept and not rows:
            raise unknown(f"class of the {judge} judge", label, [p.strip() for c in classes for p in (c, *c.split(","))])
        for i in rows:
            found.setdefault(i, label)
    return found


NAMED = ("style", "identity")
"""kinds whose concepts may be people"""


def _surnamed(judge: str, label: str, index: Mapping[str, list[int]], classes: Sequence[str], concept: bool) -> list[int]:
    """The one class whose name ends with ``label``; none where there are several, which is refused for a concept."""
    ends = sorted({i for name, rows in index.items() if name.endswith(f" {plain(label)}") for i in rows})
    if len(ends) > 1 and concept:
        named = ", ".join(sorted(classes[i] for i in ends)[:12])
        raise UsageError(f"'{label}' may be several classes of the {judge} judge ({named}); name the one that is meant")
    return ends if len(ends) == 1 else []


def read(logits: Tensor, classes: Sequence[str], labels: Mapping[int, str], task: Task, top: int) -> list[str]:
    """One label for each row of logits (B, K): a concept that is among the ``top`` classes, the likeliest first, else the first class.

    A class is said as the task says it (``labels``), or by its own name where the task knows none.
    """
    out = []
    for row in logits.topk(min(top, logits.shape[1]), dim=1).indices.tolist():
        found = [said(i, classes, labels) for i in row]
        out.append(next((label for label in found if label in task.concepts), found[0]))
    return out


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
