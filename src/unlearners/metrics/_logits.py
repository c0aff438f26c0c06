"""What the metrics of classifiers share: which examples are named right, and how sure the model is of the truth."""

from __future__ import annotations

import math

from torch import Tensor

from ..base import Data, Outputs, Score, rate


def right(outputs: Outputs, data: Data) -> list[bool]:
    """Whether each example of ``data`` gets its own label; logits that are not finite are wrong."""
    logits, y = outputs.logits(data)  # (N, K), (N,)
    return ((logits.argmax(1) == y) & logits.isfinite().all(1)).tolist()


def missed(outputs: Outputs, data: Data) -> Score:
    """Percentage of ``data`` that does not get its own label. What a broken model says is no forgetting: nan for logits not finite."""
    logits, y = outputs.logits(data)
    return rate((logits.argmax(1) != y).tolist()) if logits.isfinite().all() else Score(value=math.nan, n=len(y))


def confidence(logits: Tensor, y: Tensor) -> Tensor:
    """Softmax probability of the true label: logits (N, K), labels (N,) to (N,) in [0, 1], in the logits' precision."""
    return logits.softmax(1).gather(1, y[:, None].long())[:, 0]
