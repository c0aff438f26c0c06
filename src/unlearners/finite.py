"""Pictures that are not finite are refused wherever pictures are judged, measured or written."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from .errors import NonFiniteError


def finite(images: Tensor) -> None:
    """Refuse pictures (B, 3, H, W) with values that are not finite: nothing can be recognised in them, which is not forgetting."""
    bad = int((~images.isfinite()).flatten(1).any(1).sum()) if images.numel() else 0
    if bad:
        raise NonFiniteError(
            f"{bad} of {len(images)} pictures hold values that are not finite, so they can be neither judged nor measured; "
            "draw them in float32 or bfloat16"
        )


def of_finite(read: Callable[..., Any]) -> Callable[..., Any]:
    """``read``, a method whose first argument is pictures, that looks at them first."""

    @wraps(read)
    def reads(self: Any, images: Tensor, *args: Any, **named: Any) -> Any:
        finite(images)
        return read(self, images, *args, **named)

    return reads
