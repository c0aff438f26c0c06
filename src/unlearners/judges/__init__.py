"""Judges: readers of pictures. ``load`` makes the one a task names.

A task names its judge in one string: a registered name ("canvas"), behind a colon its fields with commas between, and ``preset=`` for
published settings ("nudenet:preset=four,threshold=0.45", "style:model=path/to/vit,top=3"). What is no field=value is the model that the
judge reads with: "classifier:path/to/model". Values are written as in YAML: "nudenet:classes=[BELLY_EXPOSED, FEET_EXPOSED]".
"""

from __future__ import annotations

from .. import registry
from ..base import Judge


def load(spec: str) -> Judge:
    """The judge called ``spec``, see above.

    Raises ``UsageError`` for an unknown judge, preset or field, also for a model given to one that takes none.
    """
    judge: Judge = registry.from_spec("judges", spec)
    return judge
