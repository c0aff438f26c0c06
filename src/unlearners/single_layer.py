"""One layer, one step: which tensor says most of what is to be forgotten and least of the rest, and how far to move it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
KEPT_OUT = ("bias", "logit_scale", "position", "embedding")
"""parts of names that are never edited (the authors' list)"""
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("fc1", "fc2"))
"""layers that the authors' code for Stable Diffusion and LLaVA moves together"""


class Layer(NamedTuple):
    """A tensor that could be edited."""

    name: str
    tower: str
    importance: float
    """||g|| / ||theta||"""
    alignment: float
    """|cos(g, r)|, or cos(g, r) where it is asked for signed"""
    each: tuple[float, ...] = ()
    """the alignment with every r by itself, where r was taken several times, from batches made otherwise"""

    @property
    def spread(self) -> float:
        """Largest minus smallest alignment."""
        return max(self.each) - min(self.each) if self.each else 0.0


class Point(NamedTuple):
    """What a step does: forget accuracy and utility, both in percent."""

    alpha: float
    fa: float
    ta: float
    kept: float = 0.0
    """a finer measure of the utility, higher is better: it tells steps of equal ``ta`` apart"""


def candidates(names: Mapping[str, Tensor], *, norms: bool = False, leave: str = "") -> list[str]:
    """Tensors that may be edited: no biases, embeddings, positions or logit scales, matrices unless ``norms``, and nothing that the
    regular expression ``leave`` matches."""
    return [
        n
        for n, p in names.items()
        if not any(k in n for k in KEPT_OUT) and (p.ndim > 1 or (norms and p.ndim == 1)) and not (leave and re.search(leave, n))
    ]


def layers(theta: Tensors, g: Tensors, r: Sequence[Tensors], *, signed: bool = False) -> list[Layer]:
    """Importance and alignment of every tensor (SLUG, eq. 7 and 8); one without a gradient of its own is left out.

    ``r`` are gradients of the same data, each from batches made otherwise; the alignment is with their mean.
    """
    out = []
    for n in theta:
        size, norm = (float(t[n].detach().double().norm()) for t in (theta, g))
        if norm == 0 or size == 0:
            continue
        mean = torch.stack([k[n].double() for k in r]).mean(0)
        cos, *each = (_cosine(g[n].double(), k, signed) for k in (mean, *(k[n].double() for k in r)))
        out.append(Layer(n, n.partition(".")[0], norm / size, cos, tuple(each)))
    return out


def _cosine(g: Tensor, r: Tensor, signed: bool) -> float:
    other = float(r.norm())
    cos = float((g * r).sum()) / max(float(g.norm()) * other, 1e-30) if other else 0.0
    return cos if signed else abs(cos)


def pareto(found: Sequence[Layer]) -> list[Layer]:
    """The layers of each tower that no other beats in both importance (higher) and alignment (lower), the most important first.

    Only a layer that is strictly worse in both is dropped, as in the authors' code.
    """
    front = [a for a in found if not any(b.tower == a.tower and b.importance > a.importance and b.alignment < a.alignment for b in found)]
    return sorted(front, key=lambda a: -a.importance)


def steady(found: Sequence[Layer]) -> dict[str, float]:
    """For each layer the share of the r's whose own front it is in."""
    n = len(found[0].each) if found else 0
    fronts = [{a.name for a in pareto([a._replace(alignment=a.each[k]) for a in found])} for k in range(n)]
    return {a.name: sum(a.name in f for f in fronts) / max(1, n) for a in found}


def picked(found: Sequence[Layer], front: Sequence[Layer], rule: str, top: int) -> list[Layer]:
    """The layers of each tower whose steps are searched. best: the ``top`` first of the front (0: all); deepest: the last block's of the
    front, of several the worst aligned; importance, alignment, random: one of all layers."""
    out: list[Layer] = []
    for tower in dict.fromkeys(a.tower for a in found):
        own, first = [a for a in found if a.tower == tower], [a for a in front if a.tower == tower]
        if rule == "importance":
            out.append(max(own, key=lambda a: a.importance))
        elif rule == "alignment":
            out.append(min(own, key=lambda a: a.alignment))
        elif rule == "random":
            out.append(own[int(torch.randint(len(own), ()))])
        elif rule == "deepest":
            out.append(max(first, key=lambda a: (depth(a.name), a.alignment)))
        else:
            out += first[: top or None]
    return out


def depth(name: str) -> int:
    """The number of the block that a tensor is in; -1 outside of blocks."""
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def together(name: str, names: Sequence[str]) -> tuple[str, ...]:
    """``name`` and, where it is one of q, k and v or of fc1 and fc2, the others of its block."""
    for group in TOGETHER:
        for part in group:
            if f".{part}." in name:
                return tuple(n for other in group if (n := name.replace(f".{part}.", f".{other}.")) in names)
    return (name,)


@dataclass(frozen=True)
class Edit:
    """A direction: at step alpha, theta + alpha * unit. Each unit is as long as its tensor, so alpha is the relative change."""

    units: Tensors
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.units))

    @classmethod
    def of(cls, theta: Tensors, g: Tensors, names: Sequence[str], by: str = "") -> Edit:
        """Along ``g``: every tensor at its own relative length or, with ``by``, all with the lambda of that tensor."""

        def length(n: str) -> float:
            return float(theta[n].detach().double().norm() / g[n].double().norm())

        return cls({n: g[n] * length(by or n) for n in names})

    @contextmanager
    def at(self, weights: Tensors, alpha: float) -> Iterator[None]:
        """The edited weights inside, and the very bits of before outside."""
        old = {n: weights[n].detach().clone() for n in self.names}
        try:
            self.apply(weights, alpha)
            yield
        finally:
            for n, w in old.items():
                weights[n].data.copy_(w)

    def apply(self, weights: Tensors, alpha: float) -> None:
        """Step by ``alpha`` for good."""
        for n, u in self.units.items():
            weights[n].data.add_(u.to(weights[n]), alpha=alpha)


class Step(NamedTuple):
    """Where to, and how far."""

    edit: Edit
    point: Point

    def times(self, f: float) -> Step:
        """``f`` times as far; what it does there is not known."""
        return Step(self.edit, self.point._replace(alpha=f * self.point.alpha))


Score = Callable[[Sequence[float]], list[Point]]


def search(score: Score, *, first: float, evaluations: int, at_once: int = 1, goal: float = 0.0, bracket: float = 0.0) -> list[Point]:
    """Steps tried while looking for the smallest alpha whose forget accuracy is at most ``goal``.

    One at a time it is the paper's: double until forgotten, then halve the interval, ``evaluations`` times. With ``at_once`` above 1
    a round tries that many, spread geometrically, first around ``first`` and then inside the bracket. Ends early when the bracket is
    narrower than ``bracket`` of its upper end.
    """
    tried: list[Point] = []
    low, high, upper = 0.0, math.inf, first
    while len(tried) < evaluations:
        n = min(at_once, evaluations - len(tried))
        if n == 1:
            steps = [upper if math.isinf(high) else (low + high) / 2]
        elif math.isinf(high):
            start = low * 2 if low else first / 2 ** (n // 2)
            steps = [start * 2**k for k in range(n)]
        else:
            ratio = (high / (low or high / 8)) ** (1 / (n + 1))
            steps = [(low or high / 8) * ratio ** (k + 1) for k in range(n)]
        found = score(steps)
        tried += found
        done = [p.alpha for p in found if p.fa <= goal]
        high = min([high, *done])
        low = max([low, *(p.alpha for p in found if p.fa > goal and p.alpha < high)])
        upper = low * 2 or first
        if high - low <= bracket * high < math.inf:
            break
    return tried


def choose(points: Sequence[Point], *, goal: float, floor: float) -> tuple[Point, bool]:
    """The point that keeps most among those that forget, and whether it also keeps at least ``floor``.

    Of equal utility the one with the largest ``kept``, and of those the shortest step. Utility counts answers, and where all are right
    it does not see what a longer step costs.

    Without one that forgets: the one with the largest utility minus forget accuracy.
    """
    forgot = [p for p in points if p.fa <= goal]
    best = max(forgot or points, key=lambda p: (p.ta if forgot else p.ta - p.fa, p.kept, -p.alpha))
    return best, bool(forgot) and best.ta >= floor


FACTORS = (2.0, 1.5, 1.2, 1.0, 0.85, 0.7, 0.5)
"""of all steps together"""
NUDGES = (0.6, 0.8, 0.9, 1.1, 1.25, 1.6)
"""of one step, the others as they are"""


def joint(
    found: Sequence[Sequence[Step]], score: Callable[[Edit, Sequence[float]], list[Point]], *, goal: float = 0.0, rounds: int = 3
) -> tuple[list[Step], Point]:
    """One step for each of several concepts, and what all do together: steps that forget every concept and keep most.

    ``found`` are the steps found for each concept alone, the best first; steps on one tensor add up. The best ones get one factor
    for all; then, up to ``rounds`` times, each by itself gets another length or another layer, as long as that forgets more or keeps more.
    """

    def together(steps: Sequence[Step]) -> Point:
        units: dict[str, Tensor] = {}
        for edit, p in steps:
            for n, u in edit.units.items():
                units[n] = units[n] + p.alpha * u if n in units else p.alpha * u
        return score(Edit(units), (1.0,))[0]

    def best(sets: Sequence[list[Step]], *now: tuple[list[Step], Point]) -> tuple[list[Step], Point]:
        tried = [*now, *((steps, together(steps)) for steps in sets)]
        point, _ = choose([p for _, p in tried], goal=goal, floor=0.0)
        return next((steps, p) for steps, p in tried if p is point)

    done, last = best([[own[0].times(f) for own in found] for f in FACTORS])
    for _ in range(rounds):
        before = last
        for k, own in enumerate(found):
            near = [*(done[k].times(f) for f in NUDGES), *(s for s in own if s.edit is not done[k].edit)]
            done, last = best([[*done[:k], s, *done[k + 1 :]] for s in near], (done, last))
        if last is before:
            break
    return done, last


# --- evaluating many steps on what lies behind the edited layer ------------------------------------------------------
class Behind:
    """Runs a CLIP tower from the block of the edited layer on: what lies before it is computed once, for all steps.

    ``encoder`` has ``layers``, which are called one after another with the hidden states (n, L, D) first.
    """

    def __init__(self, encoder: nn.Module, block: int) -> None:
        self.encoder, self.block = encoder, block

    def record(self, run: Callable[[], object]) -> Tensor:
        """The hidden states with which ``run``, a pass through the tower, reaches the block; what lies behind is not computed."""
        layers: nn.ModuleList = self.encoder.layers  # type: ignore[assignment]
        held: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            held.append(_hidden(args, kwargs).detach())
            raise _Reached

        hook = layers[self.block].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            run()
        except _Reached:
            pass
        finally:
            hook.remove()
        return held[0]

    @contextmanager
    def skipping(self, states: Tensor) -> Iterator[None]:
        """Inside, the tower begins at the block, with ``states`` whatever it is given."""
        layers: nn.ModuleList = self.encoder.layers  # type: ignore[assignment]

        def put(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
            return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})

        hook = layers[self.block].register_forward_pre_hook(put, with_kwargs=True)
        self.encoder.layers = nn.ModuleList(list(layers)[self.block :])
        try:
            yield
        finally:
            self.encoder.layers = layers
            hook.remove()


class _Reached(Exception):
    """The pass has come to the block."""


def _hidden(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def stepping(module: nn.Linear, unit: Tensor, alphas: Tensor) -> Iterator[None]:
    """Inside, row i of ``module``'s input meets the weight W + alphas[i] * unit: many steps in one pass."""

    def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        by = alphas.to(out).view(-1, *(1,) * (x.ndim - 1))
        return out + by * (x @ unit.to(x).T)

    hook = module.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
