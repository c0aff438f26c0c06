"""What a search along gradients asks of a victim that a guide defends: one step of the guide in place of the network's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base import Item, kebab
from ..diffusion import Cond, Step, guided
from ..errors import UsageError
from ..targets.base import TextToImage


@dataclass(frozen=True)
class Victim:
    """Predictions of ``target`` that gradients go through: its network's, or those of ``step``, its guide, where it has one.

    ``scales`` is the classifier-free guidance of each prompt under attack.
    """

    target: TextToImage
    step: Step | None
    scales: Sequence[float]

    def eps(self, x: Tensor, t: Any, cond: Cond, rows: Sequence[int]) -> Tensor:
        """The prediction (B, ...) for x_t (B, ...) of the prompts ``rows``: the network's own, or the one its guide makes of it."""
        return self.target.eps(x, t, cond) if self.step is None else self._each(self.step, self.target, x, t, cond, rows)

    def unguarded(self, old: TextToImage, x: Tensor, t: Any, cond: Cond, rows: Sequence[int]) -> Tensor:
        """What ``eps`` is compared with, of the model before the erasure: its network's prediction, or plain guidance of the same scale."""
        if self.step is None:
            return old.eps(x, t, cond)
        return self._each(lambda *parts: guided(old, *parts), old, x, t, cond, rows)

    def _each(self, step: Step, model: TextToImage, x: Tensor, t: Any, cond: Cond, rows: Sequence[int]) -> Tensor:
        """``step`` on all rows, once for each scale of guidance among them."""
        scales = [self.scales[i] for i in rows]
        with torch.no_grad():
            null = model.null(len(x))
        if len(set(scales)) == 1:
            return step(x, t, cond, null, scales[0])
        parts = [[i for i, g in enumerate(scales) if g == scale] for scale in dict.fromkeys(scales)]
        times = torch.as_tensor(t, device=x.device).expand(len(x))
        found = torch.cat([step(x[p], times[p], cond[p], null[p], scales[p[0]]) for p in parts])
        order = torch.tensor([i for p in parts for i in p], device=x.device).argsort()
        return found[order]


def victim(attack: Any, target: TextToImage, items: Sequence[Item] = ()) -> Victim:
    """``target`` as ``attack`` sees it: through its guide, unless it has none or ``attack.transfer`` asks for its weights alone.

    Raises ``UsageError`` for a guide that gradients cannot go through.
    """
    own = float(target.sampler["guidance"])
    scales = [own if i.guidance is None else i.guidance for i in items] or [own]
    if target.guide is None or attack.transfer:
        return Victim(target, None, scales)
    if target.late_guide is None:
        raise UsageError(
            f"{kebab(attack)} cannot differentiate through what defends this model at generation time; "
            "set transfer to search in its weights alone and try what is found"
        )
    return Victim(target, target.late_guide(target), scales)
