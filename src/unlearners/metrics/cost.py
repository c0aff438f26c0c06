"""What an erasure cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..base import Metric, Outputs, Score, Target, Task

WHERE = {"seconds": ("time", "seconds"), "peak_memory": ("time", "peak_memory"), "patch_bytes": ("weights", "bytes")}


@dataclass(frozen=True, kw_only=True)
class Cost(Metric):
    """Cost of the erasure: seconds it ran, peak memory in bytes, and size of the patch in bytes.

    Idea: read from the run's record, not measured again.

        seconds = wall clock of the method;   peak_memory = the accelerator's, else the process';   patch_bytes = file size

    Logged: ``cost/seconds``, ``cost/peak_memory``, ``cost/patch_bytes``; n = 1, no interval. nan with n = 0: not in the record.

    Deviations from the authors' code:
      1. Loading the model and drawing pictures are not counted; papers differ in this and seldom say.
      2. Without an accelerator the memory is the highest resident size of the whole process, libraries included.
    """

    needs = Target
    higher_is_better: ClassVar[bool] = False
    reproducible: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2402.11846"

    def score(self, target: Target, task: Task, outputs: Outputs) -> dict[str, Score]:
        found = {name: outputs.record.get(part, {}).get(key) for name, (part, key) in WHERE.items()}
        return {name: Score(value=math.nan, n=0) if value is None else Score(value=float(value), n=1) for name, value in found.items()}
