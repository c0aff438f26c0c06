"""What every method says before it starts, or when the machine is too small: one sentence with the mend, and nothing lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from unlearners.base import Method, Row, Target, Task
from unlearners.errors import UnlearnError, UsageError
from unlearners.meter import Meter
from unlearners.methods.uce import UCE
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.tasks import from_concept


@pytest.mark.parametrize("xl", [False, True])
def test_a_concept_the_text_encoder_cannot_read_is_refused(xl: bool) -> None:
    target = StableDiffusion.tiny(xl=xl)
    before = {n: p.clone() for n, p in target.named().items()}
    room = 22
    with pytest.raises(UsageError, match=f"has {room + 1} tokens and this model's text encoder reads {room}; shorten it"):
        UCE()(target, from_concept("a" * (room + 1), "style"))
    with pytest.raises(UsageError, match="has no token"):
        UCE()(target, replace(from_concept("cat", "style"), prompts=("cat", " ")))
    assert all(torch.equal(p, before[n]) for n, p in target.named().items())
    UCE()(target, from_concept("a" * room, "style"))


@dataclass(frozen=True, kw_only=True)
class _Greedy(Method):
    needs: ClassVar[type] = Target
    paper: ClassVar[str] = "control"
    params: str = "full"
    batch: int = 7
    says: str = ""

    def run(self, target: Any, task: Task) -> Iterator[Row]:
        raise torch.OutOfMemoryError("CUDA out of memory") if not self.says else RuntimeError(self.says)
        yield {}


def test_out_of_memory_names_the_field_that_lowers_it() -> None:
    target, task = StableDiffusion.tiny(), from_concept("cat", "style")
    for says in ("", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"):
        with pytest.raises(UnlearnError, match=r"needs more memory than there is; lower batch \(now 7\)$"):
            _Greedy(says=says)(target, task)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        _Greedy(says="shapes do not match")(target, task)


def test_the_peak_is_that_of_the_block() -> None:
    with Meter(torch.device("cpu")) as first:
        big = torch.ones(60_000_000)
    del big
    with Meter(torch.device("cpu")) as second:
        torch.ones(10)
    assert second.peak < first.peak - 200_000_000
