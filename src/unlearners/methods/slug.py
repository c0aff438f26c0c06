"""SLUG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, ClassVar, Literal

import torch

from .. import config, saliency, single_layer
from ..base import Method, Row, Target, Task
from ..errors import UsageError
from ..single_layer import Edit, Layer, Point, Step
from ..targets.base import Chat, Names
from ._pairs import each, sides
from ._validation import scorer

Select = Literal["pareto", "importance", "alignment", "random", "all_pareto", "all"]


@dataclass(frozen=True, kw_only=True)
class SLUG(Method):
    """Single layer unlearning gradient (Cai et al., ICML 2025): one gradient, one layer, one searched step.

    Equation (paper, eq. 4-9): with g_l = grad_l L_forget, r_l = grad_l L_retain at the original weights, of every layer l
        importance(l) = ||g_l|| / ||theta_l||,    alignment(l) = |cos(g_l, r_l)|
    and P the layers that no other beats in both, one layer of P takes one step of ascent, as short as forgets,
        theta_l <- theta_l + lambda g_l,    lambda = alpha ||theta_l|| / ||g_l||
    L_forget is mean(1 - cos(v, t)) over pairs of a picture and a text, L_retain the contrastive loss; on classifiers both are
    cross-entropy. Stable Diffusion and LLaVA hold one tower of a CLIP (``clip``), whose gradients are taken; only layers that their
    own tower has and uses are looked at, and alpha is judged by what they draw or answer. LLaVA reads patches, and CLIP's loss the
    pooled token; with ``loss="answers"`` both losses are the cross-entropy of its own answers to the task's question. Several concepts:
    each gets its own layer and step from the original weights, steps on one tensor add up, and are refined together at the end.

    Logged: for each concept (``concept``, its number) first a row for every layer: ``layer`` (its number), ``tower``, ``importance``,
    ``alignment``, ``front``; then one for every step tried: ``layer``, ``alpha``, ``fa``, ``ta`` (percent, on validation pictures); the
    last row is what was done, with ``chosen`` (the layer), and the seconds of each stage; before it, where there are several concepts, a
    row for each with its ``chosen`` and ``alpha``.

    Deviations from the authors' code:
    1. Gradients are means over examples, zeroed between passes, of the retained captions as they are; theirs for Stable Diffusion and
       LLaVA add up over batches and replace every retained caption by the concept.
    2. The step always ascends L_forget; their search for those two descends it.
    3. The layer and its step are those that keep most among ``top`` layers of each tower that forget (the paper tries all); their
       code takes the deepest of the front (``rule="deepest"``) and widens it (``widen``).
    4. Forgetting is judged on a validation split, not on what is reported; and a step that costs more than ``tolerance`` is flagged.
    5. Batches of 128 in the contrastive loss; in batches of 16 it is almost zero for a trained CLIP.
    6. Layers that the deployed model does not use are no candidates; theirs can choose one, and the edit is lost.
    7. Several concepts' steps get one factor for all, then each another length or layer (``rounds``); theirs are added as they are.
    """

    needs: ClassVar[type] = Names
    paper: ClassVar[str] = "arXiv:2407.11867"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "release": {"rule": "deepest", "widen": True, "batch": 16, "tolerance": 100.0},
        "fast": {"top": 2, "at_once": 5, "bracket": 0.05},
        "canvas": {"pairs": 1000, "top": 2, "at_once": 5, "bracket": 0.05, "top_names": 1, "tolerance": 3.0},
        "pipeline": {"pairs": 1000, "top": 3, "alpha": 0.4, "evaluations": 8, "tolerance": 3.0},
        "llava": {"pairs": 1000, "loss": "answers", "evaluations": 7, "bracket": 0.05, "goal": 5.0, "tolerance": 3.0},
    }

    params: str = ".*"
    """weights among which the layer is looked for: a group or a regular expression"""
    loss: Literal["clip", "answers"] = config.later("clip")
    """whose loss gives the gradients: the CLIP's (the paper), or for a model that answers that of its own answers"""
    clip: str = ""
    """the CLIP whose tower a pipeline or LLaVA holds; empty: the one it is known to have"""
    pairs: int = 0
    """pairs of each side, drawn at random; 0 takes all"""
    batch: int = 128
    """pairs in each pass; the contrastive loss compares within it"""
    select: Select = "pareto"
    """layers that are tried: of the front; controls: the most important, least aligned or a random one, all of the front or all at once"""
    rule: Literal["best", "deepest"] = "best"
    """among those of the front: the one that keeps most, or the deepest block (the authors' code)"""
    top: int = 4
    """layers of each tower's front that are tried, the most important first; 0 tries all"""
    signed: bool = False
    """alignment with its sign, as the paper prints it"""
    norms: bool = False
    """whether gains of layer norms may be chosen"""
    widen: bool = False
    """move q, k and v, or fc1 and fc2, of the layer's block together (the authors' code for Stable Diffusion and LLaVA)"""
    alpha: float = 0.1
    """the first relative step that is tried"""
    evaluations: int = 10
    """steps tried for each layer"""
    at_once: int = 1
    """steps tried together; 1 doubles and halves as the paper does"""
    bracket: float = 0.0
    """end when the smallest step that forgets is known to this share"""
    goal: float = 0.0
    """forget accuracy, in percent, that counts as forgotten; below 0 none does, and the step is the best trade"""
    top_names: int = 5
    """forget accuracy counts a name among the first so many"""
    tolerance: float = 1.0
    """points of utility that forgetting may cost"""
    pictures: int = 48
    """pictures that a pipeline draws for each step tried, and for the forget set when none is given"""
    rounds: int = config.later(3)
    """times that each of several concepts' steps is changed by itself, after one factor for all; ends when nothing is gained"""

    def __post_init__(self) -> None:
        if self.loss == "answers":
            object.__setattr__(self, "needs", Chat)
        counts = (self.batch, self.evaluations, self.at_once, self.top_names, self.pictures)
        if min(counts) < 1 or self.alpha <= 0 or min(self.pairs, self.rounds) < 0:
            raise UsageError(
                "batch, evaluations, at_once, top_names and pictures must be at least 1, pairs and rounds at least 0, and alpha above 0"
            )

    def run(self, target: Target, task: Task) -> Iterator[Row]:
        for _ in target.steps(1):
            start = perf_counter()
            at = sides(target, task, self.clip, self.params, loss=self.loss, norms=self.norms, pictures=self.pictures, pairs=self.pairs)
            theta, number = at.theta, {n: float(i) for i, n in enumerate(at.theta)}
            r, spent = at.retained(self.batch)  # r_l, kept for the next concept
            spent["retain_seconds"] = perf_counter() - start
            found: list[list[Step]] = []
            for i, part in enumerate(each(task)):
                start = perf_counter()
                g = saliency.mean(theta, at.source.forgetting, at.forget(part).batches(self.batch))  # g_l
                layers = single_layer.layers(theta, g, r, signed=self.signed)
                front = single_layer.pareto(layers)
                spent["forget_seconds"] = spent.get("forget_seconds", 0.0) + perf_counter() - start
                for a in layers:
                    where = {"concept": float(i), "layer": number[a.name], "tower": float(at.towers.index(a.tower))}
                    yield {**where, "front": float(a in front), "importance": a.importance, "alignment": a.alignment}
                start, score = perf_counter(), scorer(target, part, self.top_names, self.pictures)
                with torch.no_grad():
                    fa, ta = score.before()
                if fa <= self.goal:
                    raise UsageError(
                        f"the model names '{part.concepts[0]}' in {fa:.0f} % of its pictures before any edit; there is nothing to forget"
                    )
                tried: list[Step] = []
                for edit in self.edits(theta, g, layers, front):
                    points = self.searched(partial(score.steps, edit))
                    tried.append(Step(edit, single_layer.choose(points, goal=self.goal, floor=0.0)[0]))
                    for p in points:
                        yield {"concept": float(i), "layer": number[edit.names[0]], "alpha": p.alpha, "fa": p.fa, "ta": p.ta}
                best, good = single_layer.choose([s.point for s in tried], goal=self.goal, floor=ta - self.tolerance)
                found.append(sorted(tried, key=lambda s: s.point is not best))
                if not good:
                    target.warnings = [*target.warnings, self.doubt(part, best, ta)]
                spent["search_seconds"] = spent.get("search_seconds", 0.0) + perf_counter() - start
            done, last = found[0][:1], found[0][0].point
            if len(found) > 1:
                start, score = perf_counter(), scorer(target, task, self.top_names, self.pictures)
                with torch.no_grad():
                    _, ta = score.before()
                done, last = single_layer.joint(found, score.steps, goal=self.goal, rounds=self.rounds)
                if last.fa > self.goal or last.ta < ta - self.tolerance:
                    target.warnings = [*target.warnings, self.doubt(task, last, ta)]
                spent["joint_seconds"] = perf_counter() - start
            for i, (edit, p) in enumerate(done):
                edit.apply(target.named(), p.alpha)
                if len(done) > 1:
                    yield {"concept": float(i), "chosen": number[edit.names[0]], "alpha": p.alpha}
            end = {"chosen": number[done[-1].edit.names[0]], "edited": float(sum(len(s.edit.names) for s in done))}
            yield {**end, "alpha": done[-1].point.alpha, "fa": last.fa, "ta": last.ta, **spent}

    def edits(self, theta: Mapping[str, Any], g: Mapping[str, Any], layers: list[Layer], front: list[Layer]) -> list[Edit]:
        """The steps that are searched, each along its layer's gradient."""
        if self.select in ("all", "all_pareto"):
            return [Edit.of(theta, g, [a.name for a in (layers if self.select == "all" else front)])]
        chosen = []
        for tower in dict.fromkeys(a.tower for a in layers):
            own, first = [a for a in layers if a.tower == tower], [a for a in front if a.tower == tower]
            if self.select == "importance":
                chosen.append(max(own, key=lambda a: a.importance))
            elif self.select == "alignment":
                chosen.append(min(own, key=lambda a: a.alignment))
            elif self.select == "random":
                chosen.append(own[int(torch.randint(len(own), ()))])
            elif self.rule == "deepest":
                chosen.append(max(first, key=lambda a: (single_layer.depth(a.name), a.alignment)))
            else:
                chosen += first[: self.top or None]
        return [Edit.of(theta, g, single_layer.together(a.name, list(theta)) if self.widen else (a.name,), a.name) for a in chosen]

    def searched(self, score: single_layer.Score) -> list[Point]:
        """Every step tried with one layer."""
        how: dict[str, Any] = {"first": self.alpha, "evaluations": self.evaluations, "at_once": self.at_once}
        return single_layer.search(score, goal=self.goal, bracket=self.bracket, **how)

    def doubt(self, task: Task, p: Point, ta: float) -> str:
        """What the run record says of a step that forgets too little or costs too much."""
        return (
            f"no step forgot {', '.join(task.concepts)} at a cost of at most {self.tolerance:g} points: the best leaves a forget "
            f"accuracy of {p.fa:.0f} % and takes utility from {ta:.1f} to {p.ta:.1f} %; try a higher top, evaluations or tolerance"
        )
