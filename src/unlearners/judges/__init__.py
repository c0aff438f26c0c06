"""Judges: readers of pictures. ``load`` makes the one a task names."""

from __future__ import annotations

from .. import registry
from ..base import Judge


def load(spec: str) -> Judge:
    """The judge called ``spec``: a registered name ("canvas"), or with the model it reads with, "classifier:path/to/model".

    Raises ``UsageError`` for an unknown judge, and for a model given to one that takes none.
    """
    name, _, model = spec.partition(":")
    judge: Judge = registry.make("judges", name, **({"model": model} if model else {}))
    return judge
