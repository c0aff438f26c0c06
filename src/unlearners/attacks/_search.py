"""What searches over prompts share: random streams of their own, slots for tokens, and steps on the simplex."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import Attack, Item, kebab
from ..errors import UnlearnError, UsageError
from ..targets.base import TextToImage


def table(target: TextToImage) -> Tensor:
    """The token-embedding table (V, D), detached, at least float32."""
    E = target.embed().detach()
    return E.to(torch.promote_types(E.dtype, torch.float32))


def slots(target: TextToImage, prompts: Sequence[str], k: int) -> Tensor:
    """[start] k slots [prompt] [end, padding] as ids (B, L), cut to L with the end kept; slots hold 0.

    Raises ``UsageError`` when k does not fit.
    """
    c = target.tokens(prompts)
    if not 0 < k <= c.shape[1] - 2:
        raise UsageError(f"k = {k} tokens do not fit this text encoder; give k from 1 to {c.shape[1] - 2}")
    end = target.tokens([""])[0, 1]
    c = torch.cat([c[:, :1], c.new_zeros(len(c), k), c[:, 1:-k]], 1)
    c[(c[:, 1 + k :] != end).all(1), -1] = end
    return c


def simplex(u: Tensor) -> Tensor:
    """Euclidean projection of each row of ``u`` (..., V) onto {v >= 0, sum v = 1}: max(u - tau, 0) (Held et al. 1974)."""
    u = u - u.amax(-1, keepdim=True)  # changes nothing but the rounding
    sorted_, n = u.sort(-1, descending=True).values, torch.arange(1, u.shape[-1] + 1, device=u.device)
    excess = sorted_.cumsum(-1) - 1
    support = (sorted_ * n > excess).sum(-1, keepdim=True)
    return (u - excess.gather(-1, support - 1) / support).clamp(min=0)


def draw(u: Tensor, rng: Sequence[torch.Generator]) -> Tensor:
    """One index (B, k) from each distribution of ``u`` (B, k, V), by inverting its cumulative sum; row b uses ``rng[b]``."""
    r = torch.stack([torch.rand(u.shape[1], 1, generator=g) for g in rng]).to(u)  # (B, k, 1)
    cdf = u.cumsum(-1)
    return torch.searchsorted(cdf, r * cdf[..., -1:], right=True).squeeze(-1).clamp(max=u.shape[-1] - 1)


def stream(item: Item) -> torch.Generator:
    """The random stream of one prompt under the seed in force: neither the other prompts nor the batch size change it."""
    # A checksum, since torch's CPU generator heeds only the low 32 bits of a seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{torch.initial_seed()} {item.seed} {item.prompt}".encode()))


def pictures(attack: Attack, items: Sequence[Item]) -> Tensor:
    """The original model's pictures (B, 3, H, W) of ``items``."""
    found = [i.picture for i in items if i.picture is not None]
    if len(found) < len(items):
        missing = next(i.prompt for i in items if i.picture is None)
        raise UnlearnError(f"{kebab(attack)} needs the original model's picture of '{missing}'; give it as Item.picture (1, 3, H, W)")
    return torch.cat(found)
