"""Where methods and attacks run: seeded inside, no trace outside, and a sentence where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import UnlearnError

SIZES = ("batch", "forget_batch", "attack_batch", "retain_batch", "restarts", "pool", "pool_gb", "k")  # fields that memory grows with


@contextmanager
def sandbox(target: Any, seed: int, *, bare: bool = False) -> Iterator[None]:
    """Seed what is done with a ``Target`` inside; outside leave no trace: global RNG, grad mode, ``requires_grad``, gradients and train
    mode are as before.

    With ``bare``, the target has no guide inside.
    """
    guide = target.guide
    modes = {m: m.training for module in target.modules.values() for m in module.modules()}
    wanted = {p: (p.requires_grad, p.dtype) for p in target.named().values()}
    devices = [target.device] if target.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.set_grad_enabled(True):
        torch.manual_seed(seed)
        for module in target.modules.values():
            module.requires_grad_(False).eval()
        target.guide = None if bare else guide
        try:
            yield
        finally:
            target.guide = guide or target.guide  # the second: what a method that acts at generation time has set
            for p, (trains, dtype) in wanted.items():
                p.requires_grad_(trains).grad = None
                p.data = p.data.to(dtype)
            for m, training in modes.items():
                m.training = training


@contextmanager
def roomy(part: Any) -> Iterator[None]:
    """Say which field of ``part`` lowers the memory it takes, where there is not enough."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        sizes = [f"{n} (now {v})" for n, v in vars(part).items() if n in SIZES and v]
        mend = f"lower {' or '.join(sizes)}" if sizes else "use --dtype bfloat16 or a larger device"
        name = type(part).__module__.rpartition(".")[2]
        raise UnlearnError(f"{name} needs more memory than there is; {mend}") from error
