"""Which weights matter for some data: the statistic, its k-th value without a sort, masks, their files, and freezing the rest."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import NonFiniteError, RefusedError, UsageError

Statistic = Literal["abs_sum", "sum_abs", "sum_sq"]
Scope = Literal["global", "layer"]
Control = Literal["saliency", "random", "inverted", "all"]
Weights = Mapping[str, Tensor]
Batch = TypeVar("Batch", bound=Mapping[str, Any])

STEPS = 200
"""levels that a byte tells apart: densities are multiples of 1 / 200"""
DIGITS = ((16, 15), (8, 8), (0, 8))
"""(shift, width) of the digits of a non-negative float32's bits, the highest first"""
CHUNK = 1 << 22  # values looked at together; bounds the working memory


# --- the statistic ------------------------------------------------------------------------------------------------
def mean(
    weights: Weights, loss: Callable[[Batch], Tensor], batches: Iterable[Batch], of: Callable[[Tensor], Tensor] = lambda g: g
) -> dict[str, Tensor]:
    """The mean over examples of ``of(g)``, g the gradient of a batch's mean loss; every batch counts with its number of examples.

    Summed where the weights are, in float32 (float64 for float64 weights). ``weights`` need gradients; one that ``loss`` does not
    touch gets 0. With ``of`` the identity the batch size does not matter.
    """
    total = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights.values()]
    seen = 0
    for batch in batches:
        n = len(next(iter(batch.values())))
        grads = torch.autograd.grad(loss(batch), list(weights.values()), allow_unused=True, materialize_grads=True)
        torch._foreach_add_(total, [of(g.to(t.dtype)) for g, t in zip(grads, total, strict=True)], alpha=n)
        seen += n
    if not seen:
        raise UsageError("there are no examples to take gradients on; name at least one")
    torch._foreach_div_(total, seen)
    return dict(zip(weights, total, strict=True))


def measure(
    weights: Weights, loss: Callable[[Batch], Tensor], batches: Iterable[Batch], statistic: Statistic = "abs_sum"
) -> dict[str, Tensor]:
    """How much each weight matters for the loss: |sum g| (the paper's), sum |g|, or sum g^2 over the batches, up to one factor."""
    if statistic == "abs_sum":
        return {n: g.abs_() for n, g in mean(weights, loss, batches).items()}
    return mean(weights, loss, batches, Tensor.abs if statistic == "sum_abs" else Tensor.square)


# --- the k-th value -----------------------------------------------------------------------------------------------
def count(density: float, n: int) -> int:
    """floor(density n), with the density as the decimal number it is written as: 0.29 of 100 is 29."""
    if not 0 <= density <= 1:
        raise UsageError(f"density is {density} but must be between 0 and 1")
    return int(Fraction(repr(density)) * n)


def stepped(density: float) -> bool:
    """Whether ``levels`` hold the mask of this density."""
    return (Fraction(repr(density)) * STEPS).denominator == 1


def kth(values: Sequence[Tensor], ranks: Sequence[int]) -> list[tuple[float, int]]:
    """For each rank k in 1 … N the k-th largest of all ``values``, and how many of those equal to it belong to the first k.

    ``values`` are non-negative and ranked in float32. A radix search: such floats are ordered as their bits, so three histograms
    (of 15, 8 and 8 bits) find any number of ranks in three passes, without a sort and with little memory beside the values.
    """
    wanted = [(0, k) for k in ranks]  # (the digits found so far, the rank among the values that begin with them)
    left = [_bits(part) for part in _chunks(values)]
    for shift, width in DIGITS:
        heads = sorted({head for head, _ in wanted})
        left, counts = _counted(left, heads, shift, width)
        larger = counts.flip(1).cumsum(1)  # (heads, 2^width): values up from each digit
        found = []
        for head, k in wanted:
            row = larger[heads.index(head)]
            at = int(torch.searchsorted(row, k))  # digits from the largest down
            found.append(((head << width) + len(row) - 1 - at, k - (int(row[at - 1]) if at else 0)))
        wanted = found
    return [(_value(bits), k) for bits, k in wanted]


def _counted(bits: Sequence[Tensor], heads: Sequence[int], shift: int, width: int) -> tuple[list[Tensor], Tensor]:
    """The ``bits`` that begin with one of ``heads``, and (heads, 2^width) counts of their digit at ``shift``, on the CPU."""
    counts, table = torch.zeros(len(heads) << width, dtype=torch.long), torch.full((1 << (31 - shift - width),), -1, dtype=torch.int16)
    table[torch.tensor(heads)] = torch.arange(len(heads), dtype=torch.int16)
    left = []
    for b in bits:
        slot: Tensor | int = 0
        if shift + width < 31:  # else every value begins with the one empty head
            row = table.to(b.device).index_select(0, b >> (shift + width))
            ours = row >= 0
            b, slot = b[ours], row[ours].to(torch.int32) << width
        left.append(b)
        counts += torch.bincount(slot + ((b >> shift) & ((1 << width) - 1)), minlength=len(counts)).cpu()
    return left, counts.view(len(heads), -1)


def _chunks(values: Iterable[Tensor]) -> Iterator[Tensor]:
    return (part for v in values for part in v.detach().reshape(-1).split(CHUNK))


def _bits(values: Tensor) -> Tensor:
    """Non-negative floats as the int32 of their bits, which has the same order."""
    return values.to(torch.float32).contiguous().view(torch.int32)


def _value(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()


def place(values: Sequence[Tensor], ranks: Sequence[int]) -> list[Tensor]:
    """For each value how many of ``ranks`` (ascending, below 256 of them) it is not among the first of; uint8, shaped as ``values``.

    The largest value comes first. Of equal values the one with the lower flat index comes first, counted through all ``values`` in
    the order given and row by row within each. So exactly k places are 0 … i for the i-th rank k.
    """
    total = sum(v.numel() for v in values)
    inner = [k for k in ranks if 0 < k < total]
    zeros, places = sum(k <= 0 for k in ranks), [torch.zeros(v.numel(), dtype=torch.uint8, device=v.device) for v in values]
    found = kth(values, inner) if inner else []
    edges = torch.tensor([t for t, _ in reversed(found)], dtype=torch.float32)  # ascending
    takes: dict[float, list[int]] = {}  # of the values equal to an edge: how many are among the first k, for each rank
    for t, take in found:
        takes.setdefault(t, []).append(take)
    ties = _Ties(takes, total)
    parts = [part for p in places for part in p.split(CHUNK)]
    for v, part in zip(_chunks(values), parts, strict=True):
        v, at = v.to(torch.float32).contiguous(), edges.to(v.device)
        above = torch.searchsorted(at, v, right=True, out_int32=True)  # edges that are not above v
        part += (zeros + len(found) - above).to(torch.uint8)
        if found:
            rows = ((above > 0) & (at[(above - 1).clamp_(min=0)] == v)).nonzero().flatten()
            part[rows] += ties.more(v[rows])
    return [p.view(v.shape) for p, v in zip(places, values, strict=True)]


class _Ties:
    """Counts through values that are equal to an edge, in the order they come: which of them are beyond a rank's share."""

    def __init__(self, takes: Mapping[float, Sequence[int]], total: int) -> None:
        self.edges = torch.tensor(sorted(takes), dtype=torch.float32)
        self.span = total + 1
        self.starts = torch.tensor([0, *(len(takes[t]) for t in sorted(takes))]).cumsum(0)
        self.takes = torch.tensor([g * self.span + take for g, t in enumerate(sorted(takes)) for take in takes[t]])
        self.seen = torch.zeros(len(takes), dtype=torch.long)

    def more(self, v: Tensor) -> Tensor:
        """For the next values ``v`` (n,) the number of ranks they are not among the first of; uint8."""
        edges, starts, takes, seen = (t.to(v.device) for t in (self.edges, self.starts, self.takes, self.seen))
        g = torch.searchsorted(edges, v)
        counts, by = torch.bincount(g, minlength=len(edges)), g.argsort(stable=True)
        order = torch.empty_like(g)
        order[by] = torch.arange(len(g), device=g.device) - (counts.cumsum(0) - counts)[g[by]]
        beyond = torch.searchsorted(takes, g * self.span + seen[g] + order, right=True) - starts[g]
        self.seen += counts.cpu()
        return beyond.to(torch.uint8)


# --- masks --------------------------------------------------------------------------------------------------------
def levels(saliency: Weights, scope: Scope = "global") -> dict[str, Tensor]:
    """One byte for each weight: the smallest i in 1 … 200 for which it is among the floor(i N / 200) most salient.

    The mask of density i / 200 is ``levels <= i``: exactly floor(density N) weights, the same as from the statistic itself, equal
    ones by ``place``'s rule. With scope "layer" N is the size of each tensor and every tensor is ranked by itself.
    """
    _finite(saliency)
    return _within(saliency, scope, lambda v: [p + 1 for p in place(v, [i * _size(v) // STEPS for i in range(1, STEPS)])])


def choose(saliency: Weights, density: float, control: Control = "saliency", scope: Scope = "global") -> dict[str, Tensor]:
    """True for exactly floor(density N) weights: the most salient, at random (equal in number), or the least salient (inverted).

    ``saliency`` is the statistic, uint8 ``levels`` (for densities that are multiples of 1 / 200), or a finished bool mask, which is
    returned. "all" takes every weight. Equal ones go by ``place``'s rule; inverted takes what the N - floor(density N) most salient
    leave. Random masks are drawn from the global generator.
    """
    if control == "all":
        return {n: torch.ones_like(s, dtype=torch.bool) for n, s in saliency.items()}
    kinds = {s.dtype for s in saliency.values()}
    if control == "random":
        saliency = {n: torch.rand(s.shape).to(s.device) for n, s in saliency.items()}
    elif kinds == {torch.bool}:
        if control != "saliency":
            raise UsageError("a file of a mask has no least salient weights; give a saliency_file that holds levels")
        return dict(saliency)
    elif kinds == {torch.uint8}:
        if not stepped(density):
            raise UsageError(f"a file of levels tells densities apart in steps of {1 / STEPS}, and {density} lies between two; round it")
        if control == "saliency":
            return {n: s <= count(density, STEPS) for n, s in saliency.items()}
        saliency = {n: (STEPS - s).to(torch.float32) for n, s in saliency.items()}
    _finite(saliency)

    def most(v: Sequence[Tensor]) -> list[Tensor]:
        k = count(density, _size(v))
        return [p == 0 for p in place(v, [k])] if control != "inverted" else [p == 1 for p in place(v, [_size(v) - k])]

    return _within(saliency, scope, most)


def _within(saliency: Weights, scope: Scope, rank: Callable[[Sequence[Tensor]], list[Tensor]]) -> dict[str, Tensor]:
    groups = [[n] for n in saliency] if scope == "layer" else [list(saliency)]
    ranked = [t for group in groups for t in rank([saliency[n] for n in group])]
    return dict(zip(saliency, ranked, strict=True))


def _size(values: Iterable[Tensor]) -> int:
    return sum(v.numel() for v in values)


def _finite(saliency: Weights) -> None:
    if bad := [n for n, s in saliency.items() if not torch.isfinite(s).all()]:
        raise NonFiniteError(f"the saliency of '{bad[0]}' is not finite; check the model's loss on the forget set, or use float32")


# --- freezing -----------------------------------------------------------------------------------------------------
class Freeze:
    """Holds every weight outside ``mask`` at the bits it has now, whatever the optimiser does with momentum, weight decay or AMP.

    After ``backward``: ``gradients()``, then clipping; after ``step``: ``restore()``. Values are chosen, not computed (so -0.0 and
    NaN stay too), and nothing is read back from the device.
    """

    def __init__(self, weights: Weights, mask: Weights) -> None:
        self.weights = weights
        self.held = []  # (weight, where it is held, its value): what is wholly in the mask needs nothing
        for n, w in weights.items():
            out = torch.empty_like(w, dtype=torch.bool).copy_(~mask[n])  # in the weight's memory format
            if out.any():
                self.held.append((w, out, w.detach().clone()))

    @torch.no_grad()
    def gradients(self) -> None:
        """Zero the gradients outside the mask, also such that are not finite."""
        for w, out, _ in self.held:
            if w.grad is not None:
                w.grad.masked_fill_(out, 0)

    @torch.no_grad()
    def restore(self) -> None:
        """Put every weight outside the mask back."""
        for w, out, start in self.held:
            torch.where(out, start, w.detach(), out=w.detach())


# --- files --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class About:
    """What a saliency file was made from; all of it stands in the file's header."""

    model: str
    """hash of the weights the gradients were taken at"""
    data: str
    """hash of the forget set"""
    loss: str
    statistic: Statistic
    scope: Scope = "global"
    augment: bool = False
    """whether the examples were augmented"""
    batch: int = 0
    """examples in a gradient; 0 when the statistic does not depend on it"""
    seed: int = 0
    """of the noise and augmentation in the pass"""
    density: float = -1.0
    """of a mask; -1 for levels, from which any density is read"""
    seconds: float = 0.0
    """what the pass over the data took"""
    direction: Literal["top"] = "top"
    """the mask marks the most salient weights"""

    def differs(self, other: About) -> str:
        """The first thing that two saliencies are not of in common, "" when one may stand for the other."""
        same = ("model", "data", "loss", "statistic", "scope", "augment", "batch", "direction")
        return next((k for k in same if getattr(self, k) != getattr(other, k)), "")


def save(path: str | Path, tensors: Weights, about: About) -> None:
    """Write levels (uint8, Huffman coded: below a byte for each weight) or a mask (bool: a bit for each) as safetensors, whole or not
    at all."""
    flat = torch.cat([t.reshape(-1) for t in tensors.values()]).cpu()
    held = pack(flat) if flat.dtype == torch.bool else _coded(flat)
    meta = {"about": json.dumps(asdict(about), sort_keys=True), "weights": _layout(tensors)}
    draft = Path(f"{path}.{os.getpid()}.tmp")
    try:
        save_file({"saliency": held}, draft, meta)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load(path: str | Path, weights: Weights) -> tuple[dict[str, Tensor], About]:
    """The levels (uint8) or mask (bool) of a file, on the devices of ``weights``, and what it was made from.

    Raises ``RefusedError`` for a damaged file and for one of other weights.
    """
    total = sum(w.numel() for w in weights.values())
    try:
        with safe_open(path, framework="pt") as file:
            held, meta = file.get_tensor("saliency"), file.metadata() or {}
        about, layout = About(**json.loads(meta["about"])), meta["weights"]
        if layout != _layout(weights):
            raise RefusedError(f"{path} holds the saliency of other weights than these; delete it, or give another file")
        flat = unpack(held, total) if about.density >= 0 else _decoded(held)
        parts = flat.split([w.numel() for w in weights.values()])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, zlib.error):
        raise RefusedError(f"{path} is damaged or no saliency file; delete it and it is computed again") from None
    return {n: part.view(w.shape).to(w.device) for part, (n, w) in zip(parts, weights.items(), strict=True)}, about


def _layout(tensors: Weights) -> str:
    """SHA-256 of names and shapes in order."""
    return hashlib.sha256(json.dumps([[n, list(t.shape)] for n, t in tensors.items()]).encode()).hexdigest()


def _decoded(held: Tensor) -> Tensor:
    """Undoes ``_coded``."""
    return torch.frombuffer(bytearray(zlib.decompress(held.numpy().data)), dtype=torch.uint8)


def _coded(levels: Tensor) -> Tensor:
    """uint8 (n,) as Huffman coded bytes: 201 levels need less than the eight bits that 256 would."""
    coder = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    return torch.frombuffer(bytearray(coder.compress(levels.numpy().data) + coder.flush()), dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """A mask as bits: uint8 (ceil(n / 8),), the first weight in the lowest bit, zeros after the last."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first ``n`` bits of ``pack``, as bool (n,)."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1).bool().reshape(-1)[:n]
