"""What the metrics of dual encoders share: pictures named zero-shot, those of the concepts apart from the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..banks import forgotten
from ..base import Data, Outputs, Score, Task, rate
from ..targets.base import DualEncoder


def named(target: DualEncoder, task: Task, outputs: Outputs, data: Data) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Cosines (n, K + E), labels (n,), whether each picture is of a concept (n,), and the K names that pictures have; E other names."""
    cosines, y = outputs.logits(data)
    classes = target.open(data).classes
    return cosines, y, Tensor(forgotten(classes, task)).bool()[y], classes


def within(cosines: Tensor, y: Tensor, k: int) -> Score:
    """How often the right name is among the ``k`` nearest. A broken model has forgotten nothing: nan where cosines are not finite."""
    if not cosines.isfinite().all():
        return Score(value=math.nan, n=len(y))
    first = cosines.topk(min(k, cosines.shape[1]), dim=1).indices
    return rate((first == y[:, None]).any(1).tolist())


def own(cosines: Tensor, y: Tensor) -> Tensor:
    """The cosine (n,) of each picture with its own text or name."""
    return cosines.gather(1, y[:, None])[:, 0]


def mean(values: Sequence[float]) -> Score:
    """The mean of ``values`` with its normal 95 % interval."""
    n = len(values)
    if not n:
        return Score(value=math.nan, n=0)
    middle = sum(values) / n
    half = 1.96 * math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0.0
    return Score(value=middle, n=n, low=middle - half, high=middle + half, per_item=tuple(values))
