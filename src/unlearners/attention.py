"""Cross-attention with its probabilities in the open: fused kernels never form them, so a loss on them needs the plain computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Explicit:
    """An attention processor: out = softmax(q k' / sqrt(d)) v, with the soft-max kept in ``seen`` under the layer's name."""

    def __init__(self, name: str, seen: dict[str, Tensor]) -> None:
        self.name, self.seen = name, seen

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states  # (B, L, D)
        mask = attn.prepare_attention_mask(attention_mask, text.shape[1], len(hidden_states))
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
        p = attn.get_attention_scores(q, k, mask)  # (B heads, pixels, L), the heads of a picture side by side
        self.seen[self.name] = p.unflatten(0, (len(hidden_states), attn.heads))
        out: Tensor = attn.to_out[0](attn.batch_to_head_dim(torch.bmm(p, v)))
        return out


@contextmanager
def explicit(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, the cross-attention layers (``attn2``) of a diffusers UNet compute explicit probabilities; afterwards all is as before.

    The dictionary holds, for the latest forward pass, {layer: (B, heads, pixels, L)}: the share of each text position in each pixel,
    differentiable. The UNet's output is that of the fused kernels up to rounding.
    """
    layers: dict[str, Any] = {n: m for n, m in unet.named_modules() if n.endswith("attn2")}
    before = {n: m.processor for n, m in layers.items()}
    seen: dict[str, Tensor] = {}
    try:
        for name, layer in layers.items():
            layer.set_processor(_Explicit(name, seen))
        yield seen
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])


def at(seen: dict[str, Tensor], where: Tensor) -> Tensor:
    """The probabilities of the positions ``where`` (B, L; true or false, differing from row to row) over all layers, in one vector."""
    return torch.cat([p.float().movedim(-1, 1)[where].flatten() for p in seen.values()])
