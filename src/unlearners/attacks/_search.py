"""What searches over prompts share: random streams of their own, slots for tokens, steps on the simplex, projections on the vocabulary."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..base import Attack, Item, Task, kebab, require
from ..diffusion import Soft
from ..errors import UnlearnError, UsageError
from ..judges._clip import load_clip
from ..places import Place, before, laid
from ..targets.base import TextToImage


def table(target: TextToImage) -> Tensor:
    """The token-embedding table (V, D), detached, at least float32."""
    E = target.embed().detach()
    return E.to(torch.promote_types(E.dtype, torch.float32))


def slots(target: TextToImage, prompts: Sequence[str], k: int, place: Place = "prefix") -> tuple[Tensor, Tensor]:
    """[start] k slots and the prompt, as ``place`` has them [end, padding]: ids (B, L), where slots hold 0, and the slots (B, k).

    A prompt that leaves no room is cut at its end, never a slot. Raises ``UsageError`` when k does not fit.
    """
    fits(target, k=k)
    room = target.tokens([""]).shape[1] - 2 - k
    found = [laid(p, before(len(p), k, place)) for p in (p[:room] for p in own(target, prompts))]
    return sentences(target, [row for row, _ in found]), torch.tensor([at for _, at in found], device=target.device)


def own(target: TextToImage, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of each prompt between start and end, as far as the text encoder reads it; a padding token may be among them, as "!" is one
    of SD 2's."""
    end, rows = int(target.tokens([""])[0, 1]), target.tokens(prompts)[:, 1:].tolist()
    return [row[: row.index(end)] for row in rows]


def fits(target: TextToImage, **count: int) -> None:
    """Raise ``UsageError`` when so many tokens, given under their field's name, do not fit the text encoder beside start and end."""
    room = target.tokens([""]).shape[1] - 2
    for name, k in count.items():
        if not 0 < k <= room:
            raise UsageError(f"{name} = {k} tokens do not fit this text encoder; give {name} from 1 to {room}")


def tokens(task: Task) -> int:
    """How many tokens UnlearnDiffAtk's paper and code search, or draw at random, for a task: 5 for nudity and harm, else 3."""
    return 5 if task.kind == "nsfw" else 3


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
        raise UnlearnError(f"{kebab(attack)} needs the original's picture of '{missing}'; name that model with --base, or set Item.picture")
    return torch.cat(found)


# --- searches with gradients ---------------------------------------------------------------------------------------
def original(attack: Attack, target: TextToImage) -> TextToImage:
    """The model before the erasure; ``UsageError`` where nobody says how to load it."""
    if target.original is None:
        raise UsageError(
            f"{kebab(attack)} needs the model before the erasure; name it with --base, or set target.original to what loads it"
        )
    found = target.original()
    require(attack, found)
    return cast("TextToImage", found)


def tables(target: TextToImage) -> Tensor:
    """The token-embedding tables (V, D) of all text encoders side by side, as ``table``; SDXL's two share a vocabulary."""
    second: Any = target.modules.get("text_encoder_2")
    first = table(target)
    return first if second is None else torch.cat([first, second.get_input_embeddings().weight.detach()[: len(first)].to(first)], 1)


def soft(target: TextToImage, e: Tensor, at: Tensor) -> Soft:
    """Embeddings ``e`` (B, k, D) laid out as ``tables`` in the slots ``at`` (B, k), -1 for none."""
    return Soft.of(e, at, target.embed().shape[1])


def ordinary(target: TextToImage) -> Tensor:
    """The ids (W,) that a text can consist of: all but start, end and padding."""
    return torch.tensor([i for i in range(target.vocabulary) if i not in target.special], device=target.device)


def nearest(z: Tensor, E: Tensor, metric: Literal["cosine", "l2"]) -> Tensor:
    """The row of ``E`` (W, D) nearest to each vector of ``z`` (..., D), as indices (...)."""
    if metric == "cosine":  # the length of z changes nothing
        return (z @ torch.nn.functional.normalize(E, dim=-1).T).argmax(-1)
    return (z @ E.T - E.square().sum(-1) / 2).argmax(-1)


def sentences(target: TextToImage, rows: Sequence[Sequence[int]]) -> Tensor:
    """[start] row [end, padding] for each row of ids, as ids (B, L); a longer row is cut and the end kept."""
    empty = target.tokens([""])[0]  # start, end, padding
    out = empty.repeat(len(rows), 1)
    for line, ids in zip(out, rows, strict=True):
        n = min(len(ids), len(empty) - 2)
        line[1 : 1 + n], line[1 + n] = torch.tensor(list(ids)[:n], dtype=line.dtype, device=line.device), empty[1]
    return out


def insert(ids: Tensor, at: Tensor, s: Tensor) -> Tensor:
    """``ids`` (B, L) with the tokens ``s`` (B, k) in the slots ``at`` (B, k); nothing is put where a slot is -1."""
    row, column = (at >= 0).nonzero(as_tuple=True)
    out = ids.clone()
    out[row, at[row, column]] = s[row, column]
    return out


def noise(x: Tensor, rng: Sequence[torch.Generator]) -> Tensor:
    """Unit Gaussian noise like ``x`` (B, ...); row b from ``rng[b]``."""
    return torch.stack([torch.randn(x.shape[1:], generator=g) for g in rng]).to(x)


def uniform(low: int, high: int, rng: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """One integer (B,) of [low, high) from each stream, on the device of ``like``."""
    return torch.cat([torch.randint(low, high, (1,), generator=g) for g in rng]).to(like.device)


def keep_rows(optimiser: torch.optim.Optimizer, z: Tensor, rows: Sequence[int]) -> None:
    """Drop all but ``rows`` of the variable ``z`` (B, ...) and of what Adam remembers of it."""
    z.grad, z.data = None, z.data[rows]
    for name in ("exp_avg", "exp_avg_sq"):
        optimiser.state[z][name] = optimiser.state[z][name][rows]


def checkpoints(steps: int, checks: int) -> set[int]:
    """The numbers of steps after which the victim is asked: ``checks`` of them, evenly spread, the last after all."""
    if checks < 1:
        raise UsageError(f"checks = {checks} never asks the victim; give 1 or more")
    return {steps * (i + 1) // checks for i in range(checks)}


def clip_of(target: TextToImage, name: str) -> str:
    """``name`` or, where it is empty, the bundled CLIP for models as small as the canvas and SD 1.x's for others; loaded once.

    Raises ``UnlearnError`` when it cannot be read.
    """
    name = name or ("canvas" if target.latent_shape[1] <= 16 else "openai/clip-vit-large-patch14")
    load_clip(name)
    return name
