"""How often a model still gives the forgotten name, and what it says instead (Cai et al., ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Data, Metric, Outputs, Score, Task, rate
from ..targets._questions import Reply
from ..targets.base import Chat
from ._answers import abstains, says, told, wanted


@dataclass(frozen=True, kw_only=True)
class NameAccuracy(Metric):
    """Name accuracy: percentage of questions with a forgotten name for an answer that still get it, and what the others get.

    Idea: a model that forgot a face does not name it. It may say that it does not know, or take the face for another's.

        forgotten      = 100 / n · sum over questions about the concept of [its name is in the answer]
        other_identity = … of [not its name, but that of another thing that questions of this kind are about]
        abstains       = … of [no name, but words such as "I do not know"]
        else           = … of [none of these]

    Logged: each value in percent, its 95 % Wilson interval, n = questions, one 0 or 1 for each question. The four add up to 100. Lower is
    better for the first; the other three say how it was reached.

    Deviations from the authors' code:
      1. A name counts as whole words; ``substring`` counts as they do.
      2. The categories are ours: theirs are read off single answers by eye.
    """

    needs = Chat
    higher_is_better: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2407.11867"

    source: str = ""
    """questions: "canvas", a JSONL file of image, question and answer, or a folder with one; empty: the canvas' own for its model"""
    substring: bool = False
    """count a name inside a longer word too"""

    def data(self, target: Chat, task: Task) -> list[Data]:
        return [wanted("name_accuracy", self.source, target)]

    def score(self, target: Chat, task: Task, outputs: Outputs) -> dict[str, Score]:
        parts = told(outputs, self.data(target, task)[0], task)
        names = {a for r in parts.others for a in r.answers}

        def category(r: Reply) -> str:
            if says(r.said, r.answers, self.substring):
                return "forgotten"
            if says(r.said, names, self.substring):
                return "other_identity"
            return "abstains" if abstains(r.said) else "else"

        found = [category(r) for r in parts.forgotten]
        return {c: rate([f == c for f in found]) for c in ("forgotten", "other_identity", "abstains", "else")}
