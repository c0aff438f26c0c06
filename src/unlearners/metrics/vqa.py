"""Accuracy of a model that answers questions about pictures (tasks in the manner of lmms-eval; Cai et al., ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Data, Metric, Outputs, Score, Task, rate
from ..targets.base import Chat
from ._answers import says, told, wanted


@dataclass(frozen=True, kw_only=True)
class VQA(Metric):
    """Question answering: percentage of questions that have nothing to do with the concept and are still answered right.

    Idea: what was not to be forgotten stays. Greedy answers of at most 16 tokens; one is right if a right answer is in it.

        vqa/others    = 100 / n · sum over questions of the concept's kind about other things (such as other names) of [right]
        vqa/questions = 100 / n · sum over all other questions that do not name the concept of [right]

    Logged: both values in percent, 95 % Wilson intervals, n = questions, and one 0 or 1 for each question.

    Deviations from the authors' code:
      1. An answer counts as whole words: "no" is not in "I do not know". ``substring`` counts as they do.
      2. Questions that name the concept ("Is this zorbo?") are left out: their right answer is what is to change.
      3. Tasks are local files; their lists of celebrities and public benchmarks are not here.
    """

    needs = Chat
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2407.11867"

    source: str = ""
    """questions: "canvas", a JSONL file of image, question and answer, or a folder with one; empty: the canvas' own for its model"""
    substring: bool = False
    """count an answer inside a longer word too"""

    def data(self, target: Chat, task: Task) -> list[Data]:
        return [wanted("vqa", self.source, target)]

    def score(self, target: Chat, task: Task, outputs: Outputs) -> dict[str, Score]:
        parts = told(outputs, self.data(target, task)[0], task)
        asked = {"others": parts.others, "questions": parts.rest}
        return {name: rate([says(r.said, r.answers, self.substring) for r in rows]) for name, rows in asked.items()}
