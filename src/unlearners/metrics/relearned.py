"""How soon an erased concept is learnt again (relearn time: Golatkar et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..banks import forgotten
from ..base import Metric, Outputs, Score, Target, Task, kebab
from ..data import Examples
from ..errors import UsageError
from ..latents import Asked
from ..sandbox import roomy, sandbox
from ..targets.base import Denoiser, DualEncoder, Recogniser
from ._naming import within
from ._probe import before

AT = (0, 1, 2, 4, 8, 16, 32)
"""steps after which the copy is asked; those beyond ``steps`` are left out"""


@dataclass(frozen=True, kw_only=True)
class Relearned(Metric):
    """Relearned: how few steps of training on a few pictures of the concept bring its name back.

    Idea: what is gone must be learnt from the start, what is only hidden is soon found again. A copy takes steps of AdamW, without weight
    decay, on all weights, with the loss whose ascent forgets: cross-entropy, or 1 - cos of picture and text.

        w <- AdamW(w, grad L(w; D_s)),      D_s: ``shots`` training pictures of the forget set with their own labels or captions
        FA(i) = 100 / n · sum over pictures of the concept that are not in D_s of [named right after i steps]
        steps_to_half = min {i : FA(i) >= FA_o / 2},      FA_o: the same of the model before the erasure

    Pictures that are measured are the test pictures of the concept for dual encoders, which are asked for the nearest name, and the rest of
    the forget set for classifiers. Steps count only beside those of other methods and of a model that never saw the concept, which learns
    it too. Models that draw or answer are refused.

    Logged: ``relearned/steps_to_half`` (of the steps measured, the first; the last one if none is, and then ``relearned/reached`` is 0 and
    not 1; the whole curve goes into the record) and ``relearned/fa_after_N`` for N = 0, 1, 2, 4, 8, 16, 32, in percent with its 95 %
    Wilson interval; n = pictures. Shots, their order and their augmentation hang on the run's seed.

    Deviations from the authors' code: theirs counts epochs of training on the whole forget set; here few pictures and single steps.
    """

    needs = Recogniser
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:1911.04933"

    shots: int = 16
    """training pictures of the concept that are shown; at most half of the forget set where the rest is measured"""
    batch: int = 16
    """pictures in a step"""
    steps: int = 32
    """steps taken; of 0, 1, 2, 4, 8, 16 and 32 those up to this one are measured"""
    lr: float = 1e-3
    """AdamW's step size for classifiers"""
    lr_pairs: float = 1e-4
    """AdamW's step size for dual encoders"""

    def __post_init__(self) -> None:
        for name, least in (("shots", 1), ("batch", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)} but must be a whole number from {least} on")

    def better(self, name: str) -> bool:
        return name.rpartition("/")[2] == "steps_to_half"

    def score(self, target: Target, task: Task, outputs: Outputs) -> dict[str, Score]:
        if not isinstance(target, Recogniser) or isinstance(target, Denoiser):
            raise UsageError(f"relearned teaches classifiers and dual encoders, and this is a {kebab(target)}; leave it out with --metrics")
        seed = outputs.record.get("run", {}).get("seed", 0)
        old, copy = before("relearned", target, outputs), target.frozen()
        with sandbox(copy, seed), roomy(self):
            shots, held = self.parted(copy, task)
            whole = named(old, held)
            curve = dict(self.taught(copy, shots, held))
        half = next((i for i, s in curve.items() if s.value >= whole.value / 2), None)
        known = {"steps": list(curve), "fa": [s.value for s in curve.values()]}
        table = known | {"original": whole.value, "reached": half is not None, "shots": len(shots)}
        found = {
            "steps_to_half": Score(value=float(max(curve) if half is None else half), n=whole.n, table=table),
            "reached": Score(value=float(half is not None), n=whole.n),
        }
        return found | {f"fa_after_{i}": s for i, s in curve.items()}

    def parted(self, target: Any, task: Task) -> tuple[Examples, Examples]:
        """The pictures that are shown, drawn from the global generator, and those that are measured."""
        forget, dual = target.forgotten(task, Asked(pictures=self.shots)), isinstance(target, DualEncoder)
        n = min(self.shots, len(forget) if dual else len(forget) // 2)
        if not n:
            raise UsageError("relearned shows one picture of the forget set and measures on another, and there is one alone; forget more")
        order = torch.randperm(len(forget))
        if not dual:
            return forget.only(order[:n]), forget.only(order[n:].sort().values)
        test = target.open(task.holdout)
        gone = torch.tensor(forgotten(test.classes, task))[test.labels].nonzero().flatten()
        if not len(gone):
            raise UsageError(f"no test picture of {task.holdout.source} is called {task.concepts[0]}; give test pictures with its name")
        return forget.only(order[:n]), test.only(gone)

    def taught(self, copy: Any, shots: Examples, held: Examples) -> Iterator[tuple[int, Score]]:
        """The forget accuracy of ``copy`` while it is taught ``shots``."""
        weights = copy.trainable("full").values()
        opt = torch.optim.AdamW(weights, lr=self.lr_pairs if isinstance(copy, DualEncoder) else self.lr, weight_decay=0)
        loader = shots.loader(self.batch)
        for i in range(self.steps + 1):
            if i in AT or i == self.steps:
                yield i, named(copy, held)
            opt.zero_grad()
            copy.forgetting(loader.draw()).backward()
            opt.step()


def named(model: Any, held: Examples) -> Score:
    """How many of the pictures ``held`` get their own name."""
    scores, y = model.predict(held)
    return within(scores, y, 1)
