"""What must stay, chosen from a concept's text alone: neighbours of its kind, things of another kind, and prompts that name both."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import closed_form, retain
from .base import Task
from .errors import UsageError

NEAREST = 0.02
"""share of the neighbours, those most like the concept, that is left out: other words for it"""
CONTEXTS, CLOSED_CONTEXTS = 40, 200
"""templates in which the concept stands beside something of another kind, and those of a closed form, to which they cost next to nothing:
a concept that was said beside few words is drawn beside others"""
GUIDES = 8
"""neighbours whose mean takes the place of the concept"""
RIDGE = 0.01
"""lambda, in units of the mean eigenvalue of what is preserved, where both sides of a closed form are means"""
MOVED, ERASED = 0.11, 0.05
"""a closed form erases as strongly as lets what is preserved move by the first, and not beyond what leaves the second of the concept"""
NAMED: Mapping[str, Any] = {"erase_scale": 1.0, "preserved": (), "guide": (), "away": 0.0}
"""settings of a closed form beside neighbours that somebody named"""


@dataclass(frozen=True)
class Around:
    """What is said around a concept of one kind: {c} the concept or a neighbour of it, {o} something of another kind."""

    own: str
    """list of its own kind"""
    other: str
    """list of another kind"""
    bare: tuple[str, ...]
    beside: tuple[str, ...]
    alone: tuple[str, ...]
    """{o} without the concept"""
    away: float = 0.0
    """how far the guide lies beyond the mean of the neighbours, away from the concept"""


THING = ("{o}", "a {o}", "an image of a {o}")
KINDS: dict[str, Around] = {
    "style": Around(
        "styles",
        "everyday",
        ("{c}", "{c} style", "an image in {c} style"),
        ("a {o} in {c} style", "a {c} picture of a {o}", "{o}, {c}"),
        THING,
        0.5,
    ),
    "object": Around(
        "everyday",
        "styles",
        ("{c}", "a {c}", "an image of a {c}"),
        ("a {c} in {o} style", "a {o} picture of a {c}", "{c}, {o}"),
        ("{o}", "{o} style", "an image in {o} style"),
        0.5,
    ),
    "identity": Around(
        "people",
        "everyday",
        ("{c}", "a picture of {c}", "a portrait of {c}"),
        ("{c} with a {o}", "{c} and a {o}", "a {o} and {c}"),
        THING,
        0.5,
    ),
    "nsfw": Around("people", "scenes", ("{c}", "a photo of {c}"), ("{c}, {o}", "{o}, {c}", "{o} with {c}"), ("{o}", "a photo of {o}")),
}


@dataclass(frozen=True)
class Neighbours:
    """What stays around a concept, and what it is to become."""

    own: tuple[str, ...]
    """of its kind"""
    other: tuple[str, ...]
    """of another kind"""
    templates: tuple[str, ...]
    """phrases with {} for the concept: alone, then beside things of another kind"""
    guide: tuple[str, ...]
    """some of ``own``: their mean takes the concept's place"""
    preserve: tuple[str, ...]
    """prompts: each of ``own`` alone and beside something, and each of ``other`` alone"""


def choose(target: Any, task: Task, contexts: int = CONTEXTS) -> Neighbours:
    """The neighbours of ``task``'s concepts in ``target``'s own reading of the words.

    Words are ours and the same for every model. Left out are those that share a word with a concept or a synonym, and of the concept's
    own kind the share ``NEAREST`` that the model's text encoder reads most like a concept. The same task and model give the same choice.

    Raises ``UsageError`` for a kind of task that has no list, and when the filter leaves fewer than two words of a list.
    """
    if task.kind not in KINDS:
        raise UsageError(
            f"no list says what must stay beside a task of kind '{task.kind}'; name it with --preserve, or 'preserve' in the task's file"
        )
    around = KINDS[task.kind]
    own = retain.apart(target, task, retain.named(around.own), NEAREST, retain.OURS[around.own])
    other = retain.apart(target, task, retain.named(around.other), 0.0)
    for name, left in ((around.own, own), (around.other, other)):
        if len(left) < 2:
            raise UsageError(f"the list '{name}' has no two words left beside '{task.concepts[0]}'; name what must stay with --preserve")
    chance = random.Random(0)

    def beside(i: int, c: str) -> str:
        return around.beside[i % len(around.beside)].format(c=c, o=chance.choice(other))

    templates = [f.format(c="{}") for f in around.bare]
    templates += [around.beside[i % len(around.beside)].format(c="{}", o=o) for i, o in enumerate(spread(other, contexts))]
    preserve = [around.bare[i % len(around.bare)].format(c=c) for i, c in enumerate(own)]
    preserve += [beside(i, c) for i, c in enumerate(own)] + [beside(i + 1, c) for i, c in enumerate(own)]
    preserve += [around.alone[i % len(around.alone)].format(o=o) for i, o in enumerate(other)]
    unique = tuple(dict.fromkeys(preserve))
    return Neighbours(tuple(own), tuple(other), tuple(dict.fromkeys(templates)), tuple(spread(own, GUIDES)), unique)


def lists(task: Task) -> str:
    """The retain lists (see ``retain.prompts``) of a method that holds many prompts, joined by "+"."""
    if task.kind == "nsfw" or (task.kind == "identity" and "preserve" in task.usual):
        return "everyday+people"
    return "everyday+styles" if task.kind in ("style", "object") and "preserve" in task.usual else "everyday"


def spread(items: Sequence[str], n: int) -> list[str]:
    """At most ``n`` of ``items``, evenly from the first to the last."""
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else list(items)


# --- closed forms -------------------------------------------------------------------------------------------------
def named(task: Task, field: Literal["anchors", "preserve"]) -> bool:
    """Whether somebody named the task's neighbours or anchors, rather than that they are the usual ones of its kind."""
    return bool(getattr(task, field)) and field not in task.usual


def closed(part: Any, target: Any, task: Task) -> dict[str, Any]:
    """The fields of ``part`` that take the place of "auto".

    They are ``NAMED`` where the task or ``part`` names what stays. Else what stays, the templates and the guide are those of ``choose``,
    and the scales go by the edit's own residuals: the concept is weighed as heavily as lets ``moved`` reach ``MOVED``.
    """
    auto = [name for name in NAMED if getattr(part, name) == "auto"]
    if not auto or named(task, "preserve") or part.preserved != "auto":
        return {name: NAMED[name] for name in auto}
    around = choose(target, task, CLOSED_CONTEXTS)
    found: dict[str, Any] = {"preserved": ("", *around.preserve), "templates": part.templates or around.templates}
    if part.guide == "auto":
        found["guide"] = () if named(task, "anchors") else around.guide
    if part.away == "auto":
        found["away"] = 0.0 if named(task, "anchors") else KINDS[task.kind].away
    if part.erase_scale == "auto":
        found |= scales(dataclasses.replace(part, **found, erase_scale=1.0), target, task)
    return found


@torch.no_grad()
def scales(part: Any, target: Any, task: Task) -> dict[str, float]:
    """alpha and beta of ``part``, whose other fields are settled: {"erase_scale", "preserve_scale"}.

    The objective is e mean ||W c - W_old g||^2 + mean ||W p - W_old p||^2 + lambda' ||W - W_old||^2 with lambda' = ``RIDGE`` times the
    mean eigenvalue of p p', written with ``part.lamb`` in place of lambda'. e is found by bisection; ``moved`` grows with it.
    """
    w = target.select(part.params)
    c, g, p, n = _vectors(part, target, task)
    closed_form.check_matrices(type(part).__name__, w, c.shape[1], part.params)
    K = closed_form.gram(w.values())
    beta = part.preserve_scale or part.lamb * p.shape[1] / (RIDGE * float(p.square().sum()))
    low, high = -9.0, 5.0  # log2 of e
    for _ in range(8):
        middle = (low + high) / 2
        T, _ = closed_form.solve(c, g, p, alpha=2**middle * beta * n / len(c), beta=beta, lamb=part.lamb)
        did = closed_form.effect(K, T, c, g, p)
        low, high = (low, middle) if did["moved"] > MOVED or did["erased"] < ERASED else (middle, high)
    return {"erase_scale": 2**low * beta * n / len(c), "preserve_scale": beta}


@torch.no_grad()
def vectors(part: Any, target: Any, task: Task) -> tuple[Tensor, Tensor, Tensor, float]:
    """c (n, d), g (n, d), p (m, d) and beta of an editor whose fields are settled. p may stand for more vectors with the same p p'."""
    if part.preserved or part.guide:
        c, g, p, _ = _vectors(part, target, task)
        return c, g, p, part.preserve_scale or max(0.1, 1 / len(part.preserved or task.preserve or "."))
    pairs, keep = closed_form.phrases(task, part.templates)
    c, g = closed_form.aligned(target, pairs, part.tokens)
    g = g - part.away * (c - g) if part.away else g
    return c, g, closed_form.kept(target, keep, part.tokens), part.preserve_scale or max(0.1, 1 / len(keep))


def _vectors(part: Any, target: Any, task: Task) -> tuple[Tensor, Tensor, Tensor, int]:
    """c (n, d), g (n, d), p (at most d, d), and how many vectors p stands for."""
    says = part.templates or closed_form.TEMPLATES[task.kind]
    c, g = closed_form.toward(target, task, says, part.guide, part.tokens)
    p, n = closed_form.gathered(target, part.preserved or closed_form.phrases(task, says)[1], part.tokens)
    return c, g - part.away * (c - g), p, n
