"""The verbs of the command line: dataclasses whose fields are flags."""

from __future__ import annotations

from .attack import Attack
from .base import Verb
from .bench import Bench
from .demo import Demo
from .erase import Erase
from .evaluate import Evaluate
from .export import Export
from .list import List
from .patch import Patch
from .report import Report
from .show import Show
from .train import Train
from .zoo import Zoo

VERBS: dict[str, type[Verb]] = {
    "list": List, "show": Show, "train": Train, "erase": Erase, "attack": Attack, "evaluate": Evaluate, "report": Report, "export": Export,
    "patch": Patch, "bench": Bench, "demo": Demo, "zoo": Zoo,
}  # fmt: skip
"""in the order of --help"""
