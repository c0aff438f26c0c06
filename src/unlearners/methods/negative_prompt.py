"""Negative prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from ..base import Method, Row, Task
from ..diffusion import Cond, Step, guided
from ..targets.base import TextToImage
from ._guide import TEXTS, read


@dataclass(frozen=True, kw_only=True)
class NegativePrompt(Method):
    """Negative prompt, the baseline of every user: classifier-free guidance away from the concept instead of from no text.

    Equation (Ho & Salimans 2022, eq. 6, with the concept c in place of the empty prompt):
        eps = eps_c + g (eps_p - eps_c)
    A step costs as much as without it. With guidance g = 1 it has no effect, and a prompt that is c itself is drawn as if g were 1.

    No weight changes: this acts at generation time, is applied again when the run folder is loaded, and is bypassed by whoever holds
    the weights. P4D, UnlearnDiffAtk, PH2P and CCE differentiate through the guidance; prompts of every attack are judged by pictures
    drawn with it.

    Logged: ``tokens`` is how many tokens of c the text encoder reads.

    Deviations from the authors' code: none, it is a custom without one. The published baseline (as SD-NegPrompt beside ESD and SLD)
    is the same formula with c a list of words.
    """

    paper: ClassVar[str] = "arXiv:2207.12598"
    needs: ClassVar[type] = TextToImage
    runtime: ClassVar[bool] = True

    negative: str = ""
    """c, what to steer away from; empty: the task's phrases, joined by commas. i2p, i2p-ours: as of ``sld``"""

    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        text = TEXTS.get(self.negative, self.negative) or ", ".join(task.said)
        for _ in target.steps(1):
            target.guide = target.late_guide = partial(steer, text)  # it has neither warm-up nor memory
            yield {"tokens": float(read(target, text))}


def steer(text: str, target: TextToImage) -> Step:
    """The guide; without a text, plain guidance from what the model takes for no text."""
    if not text.strip():
        return partial(guided, target)
    c = target.encode([text])

    def step(x: Tensor, t: Any, p: Cond, null: Cond, g: float) -> Tensor:
        return guided(target, x, t, p, c.repeat(len(p)), g)

    return step
