"""What the metrics of classifiers share: which examples are named right, and how sure the model is of the truth."""

from __future__ import annotations

from torch import Tensor

from ..base import Data, Outputs


def right(outputs: Outputs, data: Data) -> list[bool]:
    """Whether each example of ``data`` gets its own label; logits that are not finite are wrong."""
    logits, y = outputs.logits(data)  # (N, K), (N,)
    return ((logits.argmax(1) == y) & logits.isfinite().all(1)).tolist()


def confidence(logits: Tensor, y: Tensor) -> Tensor:
    """Softmax probability of the true label: logits (N, K), labels (N,) to (N,) in [0, 1], in the logits' precision."""
    return logits.softmax(1).gather(1, y[:, None].long())[:, 0]
