"""SLUG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import Self

from .. import config, single_layer
from ..base import Method, Row, Target, Task
from ..errors import UsageError
from ..single_layer import Edit, Layer, Point, Step
from ..targets.base import Chat, Names, TextToImage
from ._pairs import clips, each, sides
from ._validation import doubt, scorer

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
    ``alignment``, ``front``, and of the shuffles the ``spread`` (largest minus smallest alignment) and ``fronts`` (the share whose own
    front has it); then one for every step tried: ``layer``, ``alpha``, ``fa``, ``ta`` (percent, on validation pictures), ``kept`` (finer
    than ``ta``, from the same pictures); the last row is what was done, with ``chosen`` (the layer), and the seconds of each stage; before
    it, where there are several concepts, a row for each with its ``chosen`` and ``alpha``.

    Deviations from the authors' code:
    1. Gradients are means over examples, zeroed between passes, of the retained captions as they are and of pictures that are not
       augmented; theirs for Stable Diffusion and LLaVA add up over batches and replace every retained caption by the concept.
    2. The step always ascends L_forget; their search for those two descends it.
    3. The layer and its step are those that keep most among ``top`` layers of each tower that forget (the paper tries all): the highest
       accuracy, of equal ones the highest similarity of retained pictures with their texts, then the shortest step. Their code takes
       the deepest layer of the front (``rule="deepest"``) and widens it (``widen``).
    4. Forgetting is judged on a validation split, not on what is reported, among the task's names and not among 10,177; and a step that
       costs more than ``tolerance`` is flagged. A pipeline's step is judged on pictures from other seeds than those reported, but of
       the same prompts and by the same judge, so that judge's figures flatter it.
    5. The contrastive loss compares within batches of 128, and r_l is the mean over ``shuffles`` seeded ways to make them; theirs are of
       16, where it is almost zero for a trained CLIP, shuffled once.
    6. Layers that the deployed model does not read are no candidates: the last of Stable Diffusion XL's first encoder and of LLaVA's tower,
       the projections of Stable Diffusion 1 and 2. Theirs can choose one, and the edit is lost. XL is not among their models.
    7. Several concepts' steps get one factor for all, then each another length or layer (``rounds``); theirs are added as they are.
    8. q, k and v are layers of their own; in open_clip's CLIP they are one. The patch embedding (conv1) is no candidate, and gains of
       layer norms are with ``norms`` alone; theirs for CLIP have both, theirs for Stable Diffusion and LLaVA neither.
    9. In the controls ``all`` and ``all_pareto`` alpha is every tensor's own relative length; what theirs was is not published.
    10. A pipeline's search is CLIP's: double, then halve. Theirs for UnlearnCanvas draws six pictures and shrinks by utility too.
    11. Where all steps forget too little, the best trade is taken; theirs leaves that to the reader of its log.
    """

    needs: ClassVar[type] = Names
    paper: ClassVar[str] = "arXiv:2407.11867"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "release": {"rule": "deepest", "widen": True, "batch": 16, "shuffles": 1, "tolerance": 100.0},
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
    """the CLIP whose tower a pipeline or LLaVA holds, for several text encoders one each, with commas; empty or auto: the known one"""
    pairs: int = 0
    """pairs of each side, drawn at random; 0 takes all"""
    batch: int = 128
    """pairs in each pass; the contrastive loss compares within it"""
    shuffles: int = 2
    """ways to put the retained pairs into batches, over which r_l is averaged; only a contrastive loss tells them apart"""
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
        counts = (self.batch, self.shuffles, self.evaluations, self.at_once, self.top_names, self.pictures)
        if min(counts) < 1 or self.alpha <= 0 or min(self.pairs, self.rounds) < 0:
            raise UsageError(
                "batch, shuffles, evaluations, at_once, top_names and pictures must be at least 1, "
                "pairs and rounds at least 0, and alpha above 0"
            )

    def resolve(self, target: Target, task: Task) -> Self:
        lends = isinstance(target, TextToImage | Chat) and self.loss == "clip"
        return replace(self, clip=clips(target, self.clip, self.params) if lends else self.clip.replace("auto", ""))

    def run(self, target: Target, task: Task) -> Iterator[Row]:
        for _ in target.steps(1):
            start = perf_counter()
            at = sides(target, task, self.clip, self.params, loss=self.loss, norms=self.norms, pictures=self.pictures, pairs=self.pairs)
            theta, number = at.theta, {n: float(i) for i, n in enumerate(at.theta)}
            r, spent = at.retained(self.batch, self.shuffles)  # r_l, kept for the next concept
            spent["retain_seconds"] = perf_counter() - start
            found: list[list[Step]] = []
            for i, part in enumerate(each(task)):
                start = perf_counter()
                g = at.forgotten(part, self.batch)  # g_l
                layers = single_layer.layers(theta, g, r, signed=self.signed)
                front, steady = single_layer.pareto(layers), single_layer.steady(layers)
                spent["forget_seconds"] = spent.get("forget_seconds", 0.0) + perf_counter() - start
                for a in layers:
                    where = {"concept": float(i), "layer": number[a.name], "tower": float(at.towers.index(a.tower))}
                    seen = {"front": float(a in front), "importance": a.importance, "alignment": a.alignment}
                    yield {**where, **seen, "spread": a.spread, "fronts": steady[a.name]}
                start, score = perf_counter(), scorer(target, part, self.top_names, self.pictures)
                with torch.no_grad():
                    fa, ta, _ = score.before()
                if fa <= self.goal:
                    raise UsageError(
                        f"the model names '{part.concepts[0]}' in {fa:.0f} % of its pictures before any edit; there is nothing to forget"
                    )
                tried: list[Step] = []
                for edit in self.edits(theta, g, layers, front):
                    points = self.searched(partial(score.steps, edit))
                    tried.append(Step(edit, single_layer.choose(points, goal=self.goal, floor=0.0)[0]))
                    at_layer = {"concept": float(i), "layer": number[edit.names[0]]}
                    yield from ({**at_layer, **p._asdict()} for p in points)
                best, good = single_layer.choose([s.point for s in tried], goal=self.goal, floor=ta - self.tolerance)
                found.append(sorted(tried, key=lambda s: s.point is not best))
                if not good:
                    target.warnings = [*target.warnings, doubt(part, best, ta, self.tolerance)]
                spent["search_seconds"] = spent.get("search_seconds", 0.0) + perf_counter() - start
            done, last = found[0][:1], found[0][0].point
            if len(found) > 1:
                start, score = perf_counter(), scorer(target, task, self.top_names, self.pictures)
                with torch.no_grad():
                    ta = score.before()[1]
                done, last = single_layer.joint(found, score.steps, goal=self.goal, rounds=self.rounds)
                if last.fa > self.goal or last.ta < ta - self.tolerance:
                    target.warnings = [*target.warnings, doubt(task, last, ta, self.tolerance)]
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
        chosen = single_layer.picked(layers, front, self.rule if self.select == "pareto" else self.select, self.top)
        return [Edit.of(theta, g, single_layer.together(a.name, list(theta)) if self.widen else (a.name,), a.name) for a in chosen]

    def searched(self, score: single_layer.Score) -> list[Point]:
        """Every step tried with one layer."""
        how: dict[str, Any] = {"first": self.alpha, "evaluations": self.evaluations, "at_once": self.at_once}
        return single_layer.search(score, goal=self.goal, bracket=self.bracket, **how)
