"""The untouched model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..base import Method, Row, Target, Task


@dataclass(frozen=True, kw_only=True)
class Original(Method):
    """The untouched model, as an ordinary row to hold the others against.

    Equation:
        theta <- theta_0
    Nothing is trained and no weight is saved; attacks and metrics run on it as on any erasure.

    Logged: nothing.

    Deviations from the authors' code: none, it is a control.
    """

    paper: ClassVar[str] = "control"
    needs: ClassVar[type] = Target

    params: str = "full"
    """has no effect"""

    def run(self, target: Target, task: Task) -> Iterator[Row]:
        for _ in target.steps(1):
            yield {}
