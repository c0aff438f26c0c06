"""What probes of an erasure share: the outputs of a changed copy, which no folder keeps, and the model before the erasure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import judges, targets
from ..base import Data, Judge, Outputs, Request, Target, Task
from ..diffusion import batches
from ..errors import UsageError
from ..targets._questions import Reply, put, read
from ..targets.base import Chat

BATCH = 64


class Fresh:
    """What metrics see of ``model`` itself (see ``base.Outputs``): drawn and predicted when asked for, each answer kept in memory.

    Pictures are drawn with the model's own sampler and rounded to 8 bits, as those in a folder are; of them labels alone are kept.
    """

    def __init__(self, model: Any, task: Task, other: Outputs) -> None:
        self.model, self.task = model, task
        self.record, self.verdicts, self.references = other.record, other.verdicts, other.references
        self.named: dict[tuple[Request, str], str] = {}
        self.predicted: dict[Data, tuple[Tensor, Tensor]] = {}
        self.replied: dict[Data, list[Reply]] = {}

    @cached_property
    def judge(self) -> Judge:
        return judges.load(self.task.judge)

    def images(self, requests: Sequence[Request]) -> Tensor:
        """(n, 3, H, W) in [0, 1]; those of one guidance are drawn together."""
        drawn: dict[Request, Tensor] = {}
        for g in dict.fromkeys(r.guidance for r in requests):
            part = list(dict.fromkeys(r for r in requests if r.guidance == g))
            how: Mapping[str, float] = {} if g is None else {"guidance": g}
            images = self.model.sample([r.prompt for r in part], [r.seed for r in part], batch=BATCH, **how)
            drawn |= zip(part, (images * 255).round() / 255, strict=True)
        return torch.stack([drawn[r] for r in requests])

    def labels(self, requests: Sequence[Request], domain: str) -> list[str]:
        new = [r for r in dict.fromkeys(requests) if (r, domain) not in self.named]
        for part in (new[s] for s in batches(len(new), BATCH)):
            found = self.judge.labels(self.images(part), self.task, domain)
            self.named |= {(r, domain): label for r, label in zip(part, found, strict=True)}
        return [self.named[r, domain] for r in requests]

    def logits(self, data: Data) -> tuple[Tensor, Tensor]:
        if data not in self.predicted:
            self.predicted[data] = self.model.predict(self.model.open(data))
        return self.predicted[data]

    def answers(self, data: Data) -> list[Reply]:
        assert isinstance(self.model, Chat)
        if data not in self.replied:
            self.replied[data] = put(self.model, read(data))
        return self.replied[data]


def before(metric: str, target: Target, outputs: Outputs) -> Target:
    """The model before the erasure: ``target.original`` or, where nobody has set it, what the run's record names.

    Raises ``UsageError`` where there is neither.
    """
    if target.original is not None:
        return target.original()
    record: Mapping[str, Any] = outputs.record
    if "run" not in record:
        raise UsageError(f"{metric} needs the model before the erasure; evaluate a run folder, or set target.original to what loads it")
    run, how = record["run"], {"family": record["family"], "force": record["force"]}
    return targets.load(run["target"], patches=run["patches"], device=str(target.device), dtype=run["dtype"], **how)
