"""What a block of work takes: seconds and memory."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from pathlib import Path

import torch
from typing_extensions import Self


class Meter:
    """Seconds and peak memory of a block: the accelerator's where there is one, else the process'."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.peak = device, 0.0, 0

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # Linux forgets the peak of what this process did before; elsewhere that counts too
                Path("/proc/self/clear_refs").write_text("5")
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.seconds = time.perf_counter() - self.start
