"""Every erasure is a patch: the tensors a method changed, in a safetensors file that knows its kind, its base and its run.

Keys are spelled as on the hub, so a patch made under transformers 5 fits transformers 4 and the reverse."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import RefusedError, UnlearnError, UsageError

Modules = Mapping[str, nn.Module]
METADATA = "unlearners.patch"  # one key, because safetensors writes several in random order and equal patches should be equal files
PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Changed tensors and where they come from. Keys are put at the hub's spelling."""

    tensors: Mapping[str, Tensor]
    """by "component.parameter" """
    kind: Literal["value", "delta"] = "value"
    """value: the new weights; delta: what to add to the old ones"""
    base: Mapping[str, str]
    """``base_hash`` of each touched component of the model it was made on"""
    meta: Mapping[str, str] = field(default_factory=dict)
    """run hash, method, version …"""

    def __post_init__(self) -> None:
        spelled = {hub_key(k): t for k, t in self.tensors.items()}
        if len(spelled) != len(self.tensors):
            raise RefusedError("the patch holds the same weight under two spellings; keep one of them")
        object.__setattr__(self, "tensors", spelled)

    @property
    def components(self) -> set[str]:
        """The components it touches."""
        return {k.partition(".")[0] for k in self.tensors}


def hub_key(key: str) -> str:
    """``key`` as checkpoints on the hub spell it: CLIP's towers below ``text_model`` and ``vision_model``, which transformers 5 drops."""
    key = re.sub(r"^(text_encoder(?:_\d+)?)\.(?=embeddings\.|encoder\.layers\.|final_layer_norm\.)", r"\1.text_model.", key)
    return re.sub(r"^vision_tower\.(?=embeddings\.|encoder\.layers\.|pre_layrnorm\.|post_layernorm\.)", "vision_tower.vision_model.", key)


def live(modules: Modules) -> dict[str, Tensor]:
    """Every saved tensor of ``modules`` (weights and buffers) by hub key, sharing memory with the module."""
    return {hub_key(f"{c}.{n}"): t for c, m in modules.items() for n, t in m.state_dict().items()}


def fingerprint(modules: Modules) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes by hub key: enough for ``diff`` without keeping a copy of the model."""
    return {k: _sha(t, f"{t.dtype}{tuple(t.shape)}") for k, t in live(modules).items()}


def base_hash(modules: Modules) -> dict[str, str]:
    """One SHA-256 for each component over its names, shapes and values at float16.

    A float16 checkpoint hashes alike when loaded as float16 or float32. Integer buffers, positions and counters, do not count.
    """
    found = {}
    for component, module in modules.items():
        rows = sorted((k, t) for k, t in live({component: module}).items() if t.is_floating_point())
        digests = [_sha(t.to(torch.float16), f"{k}{tuple(t.shape)}") for k, t in rows]
        found[component] = hashlib.sha256("".join(digests).encode()).hexdigest()
    return found


def diff(before: Mapping[str, str], modules: Modules) -> dict[str, Tensor]:
    """The tensors that changed since ``before = fingerprint(modules)``, copied to the CPU, by hub key.

    Raises ``UnlearnError`` if tensors were added or removed, which a patch cannot express.
    """
    now = fingerprint(modules)
    if other := sorted(now.keys() ^ before.keys()):
        raise UnlearnError(f"'{other[0]}' was added to or removed from the model, which a patch cannot hold; change weights in place only")
    changed = {k: t for k, t in live(modules).items() if now[k] != before[k]}
    return {k: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, t in changed.items()}


def save(patch: Patch, path: str | Path) -> None:
    """Write ``patch`` as safetensors; equal patches give equal bytes. The old file stays until the new one is complete.

    Raises ``UnlearnError`` if it cannot be written (disk full, no permission); nothing half-written is left behind.
    """
    path = Path(path)
    record = json.dumps({"schema": 1, "kind": patch.kind, "base": dict(patch.base), "meta": dict(patch.meta)}, sort_keys=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: t.detach().cpu().contiguous() for k, t in sorted(patch.tensors.items())}, draft, {METADATA: record})
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
            os.chmod(draft, 0o666 & ~_umask())  # safetensors makes it readable by its owner only
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UnlearnError(f"{path} could not be written ({error}) and is as before; free some space or choose another folder") from None


def load(path: str | Path) -> Patch:
    """Read a patch. Raises ``RefusedError`` for a file that is missing, damaged, a pickle, empty, or not one of ours. Runs no code."""
    path = Path(path)
    if _is_pickle(path) or path.suffix.lower() in PICKLES:
        raise RefusedError(f"{path} is a pickle, which could run code and is not opened; convert it to safetensors")
    tensors, metadata = _safetensors(path)
    if METADATA not in metadata:
        raise RefusedError(f"{path} was not written by unlearners and does not say what it was made for; load it as an erased checkpoint")
    try:
        record = json.loads(metadata[METADATA])
        patch = Patch(tensors=tensors, kind=record["kind"], base=record["base"], meta=record["meta"])
        sound = patch.kind in ("value", "delta") and all(isinstance(v, str) for part in (patch.base, patch.meta) for v in part.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound or not patch.components <= patch.base.keys():
        raise RefusedError(f"{path} has a damaged record of what it was made for; copy or download it again")
    return patch


def apply(modules: Modules, base: Mapping[str, str], patch: Patch, *, scale: float = 1.0, force: bool = False) -> None:
    """Change ``modules`` in place: W + scale * (V - W) for a value patch, W + scale * D for a delta.

    A value patch at scale 1 is copied bit for bit; scale 0 changes nothing. ``base`` is ``base_hash`` of the model as it was loaded.
    Everything is checked before anything changes: raises ``RefusedError`` for weights the model lacks or has in another shape and,
    unless ``force``, for a model that is not the patch's base.
    """
    apply_all(modules, base, [patch], scale=scale, force=force)


def apply_all(modules: Modules, base: Mapping[str, str], patches: Sequence[Patch], *, scale: float = 1.0, force: bool = False) -> None:
    """Apply patches to the base they share: their changes are summed, and what only one value patch touches is copied as it is."""
    if not math.isfinite(scale):
        raise UsageError(f"a patch cannot be scaled by {scale}; give a finite number")
    old = live(modules)
    for patch in patches:
        _check(patch, old, base, force)
    if scale == 0:
        return  # not W + 0 * (V - W), which turns -0.0 into 0.0 and an infinite V into nan
    with torch.no_grad():
        for k, t in {k: _new(old[k], [(p.kind, p.tensors[k]) for p in patches if k in p.tensors], scale) for k in _keys(patches)}.items():
            old[k].copy_(t)


def subtract(modules: Modules, base: Mapping[str, str], patch: Patch, *, force: bool = False) -> None:
    """Go the opposite way: ``apply`` at scale -1. A delta that was applied is taken out again, up to rounding.

    A value patch only says where to arrive: make it a delta with ``to_delta`` while the base is still untouched.
    """
    apply(modules, base, patch, scale=-1.0, force=force)


def to_delta(patch: Patch, modules: Modules) -> Patch:
    """``patch`` as differences to ``modules``, its untouched base; adding them to the base gives its values bit for bit.

    For that they are a size wider than the weights (float32 for half precision, float64 for float32), unless no bit is lost without.
    """
    old = live(modules)
    _check(patch, old, {}, force=True)
    changes = {k: _narrow(_change(old[k], patch.kind, t, torch.float64).cpu()) for k, t in patch.tensors.items()}
    return replace(patch, tensors=changes, kind="delta")


def scaled(patch: Patch, factor: float) -> Patch:
    """A delta patch ``factor`` times as strong; raises ``UsageError`` for a value patch."""
    if patch.kind != "delta":
        raise UsageError("only a delta patch can be scaled by itself; make one with to_delta, or give the scale to apply")
    return replace(patch, tensors={k: t * factor for k, t in patch.tensors.items()})


def stack(patches: Sequence[Patch], modules: Modules) -> Patch:
    """One patch that does what ``patches`` do together on ``modules``, their untouched base.

    Value patches that share no tensor stay values, and then ``modules`` may be empty; else the differences are summed, in float64.
    Raises ``RefusedError`` for different bases.
    """
    base = _common(patches)
    meta = {"stack": json.dumps([dict(p.meta) for p in patches], sort_keys=True)}
    keys = _keys(patches)
    if all(p.kind == "value" for p in patches) and len(keys) == sum(len(p.tensors) for p in patches):
        return Patch(tensors={k: t for p in patches for k, t in p.tensors.items()}, base=base, meta=meta)
    deltas = [to_delta(p, modules).tensors for p in patches]
    summed = {k: reduce(torch.add, [d[k].double() for d in deltas if k in d]) for k in keys}
    return Patch(tensors={k: _narrow(t) for k, t in summed.items()}, kind="delta", base=base, meta=meta)


def without(whole: Patch, part: Patch, modules: Modules) -> Patch:
    """``whole``, a stack that holds ``part``, without it, on ``modules``, their untouched base.

    Weights that both give alike are left out, and then ``modules`` may be empty; else the differences are subtracted, in float64, so
    that what was stacked comes back bit for bit. Raises ``RefusedError`` for different bases, for a ``part`` that changes what
    ``whole`` leaves alone, and when nothing is left.
    """
    base = _common([whole, part])
    if extra := sorted(part.tensors.keys() - whole.tensors.keys()):
        raise RefusedError(f"the second patch changes '{extra[0]}' and the first does not, so it is no part of it; swap or check them")
    meta = {"whole": json.dumps(dict(whole.meta), sort_keys=True), "without": json.dumps(dict(part.meta), sort_keys=True)}
    if whole.kind == part.kind == "value" and all(torch.equal(whole.tensors[k], t) for k, t in part.tensors.items()):
        left = {k: t for k, t in whole.tensors.items() if k not in part.tensors}
        kind: Literal["value", "delta"] = "value"
    else:
        a, b = (to_delta(p, modules).tensors for p in (whole, part))
        rest = {k: t.double() - b[k].double() if k in b else t for k, t in a.items()}
        left, kind = {k: _narrow(t) for k, t in rest.items() if t.any()}, "delta"
    if not left:
        raise RefusedError("nothing is left of the first patch without the second; use the untouched base instead")
    return Patch(tensors=left, kind=kind, base={c: h for c, h in base.items() if any(k.startswith(f"{c}.") for k in left)}, meta=meta)


def check(patch: Patch, modules: Modules, base: Mapping[str, str], *, force: bool = False) -> None:
    """Raise ``RefusedError`` unless ``apply`` would take the patch."""
    _check(patch, live(modules), base, force)


def fit(path: Path, given: Mapping[str, Tensor], modules: Modules) -> dict[str, Tensor]:
    """The weights of an erased checkpoint that others made, ``given`` as they were in ``path``, by hub key.

    Understood are Diffusers names with or without "unet." before them, ``text_model.*`` of a CLIPTextModel, and AdvUnlearn's text
    encoders, which hold every weight twice. Raises ``RefusedError`` if a tensor has no place or another shape in ``modules``.
    """
    old = live(modules)
    given = {k: t for k, t in given.items() if not k.endswith("position_ids")}  # 0, 1, 2 …, which only old versions save
    if any(k.startswith("text_encoder.text_model.") for k in given):  # AdvUnlearn's wrapper: the bare names repeat the prefixed ones
        given = {k: t for k, t in given.items() if not k.startswith(("embedding.", "embeddings.", "encoder.", "final_layer_norm."))}
    found: dict[str, Tensor] = {}
    lost: list[str] = []
    for key, tensor in given.items():
        places = [p for p in (hub_key(q) for q in (key, *(f"{c}.{key}" for c in modules))) if p in old]
        fitting = [p for p in dict.fromkeys(places) if old[p].shape == tensor.shape]
        if len(fitting) > 1:
            raise RefusedError(f"'{key}' in {path} fits {' and '.join(fitting)}; put the component before its name")
        if places and not fitting:
            raise RefusedError(f"'{key}' in {path} has another shape, {list(tensor.shape)}, than here; load the base it was made from")
        if not fitting:
            lost.append(key)
        elif found.setdefault(fitting[0], tensor) is not tensor:
            raise RefusedError(f"{path} holds '{fitting[0]}' under two names; keep one of them")
    if not found:
        raise RefusedError(f"nothing in {path} fits this model; it must hold Diffusers or CLIPTextModel names of {', '.join(modules)}")
    if lost:
        raise RefusedError(f"{path} holds '{lost[0]}' and {len(lost) - 1} more that this model lacks; load the base it was made from")
    return found


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint: safetensors, or a pickle of tensors alone, which is opened without running code.

    Raises ``RefusedError`` for a file that is missing, damaged or holds anything else.
    """
    path = Path(path)
    return _unpickle(path) if _is_pickle(path) else _safetensors(path)[0]


def is_patch(path: str | Path) -> bool:
    """Whether a file is a patch of ours. Raises ``RefusedError`` for one that is missing or damaged."""
    return METADATA in header(path)


def header(path: str | Path) -> dict[str, str]:
    """What a safetensors file says of itself; {} for a pickle. Raises ``RefusedError`` for a file that is missing or damaged."""
    path = Path(path)
    if _is_pickle(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        raise RefusedError(f"{path} is damaged or no safetensors file; copy or download it again") from None


def _common(patches: Sequence[Patch]) -> dict[str, str]:
    """The base that patches share."""
    base: dict[str, str] = {}
    for patch in patches:
        for component in patch.components:
            if base.setdefault(component, patch.base[component]) != patch.base[component]:
                raise RefusedError(f"the patches were made for different '{component}'; stack only patches of one base")
    return base


def _umask() -> int:
    os.umask(mask := os.umask(0o022))  # it can only be read by setting it
    return mask


def _keys(patches: Sequence[Patch]) -> dict[str, None]:
    return dict.fromkeys(k for p in patches for k in p.tensors)


def _sha(tensor: Tensor, head: str) -> str:
    digest = hashlib.sha256(head.encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check(patch: Patch, old: Mapping[str, Tensor], base: Mapping[str, str], force: bool) -> None:
    for k, t in patch.tensors.items():
        if k not in old:
            raise RefusedError(f"the patch changes '{k}', which this model lacks; use it with a model of the family it was made for")
        if t.shape != old[k].shape or t.is_floating_point() != old[k].is_floating_point():
            raise RefusedError(f"the patch's '{k}' is {list(t.shape)} but the model's {list(old[k].shape)}; use it with its own base")
    wrong = [c for c in sorted(patch.components) if c not in base or patch.base.get(c) != base[c]]
    if wrong and not force:
        raise RefusedError(f"the patch was made for another '{wrong[0]}' than this model's; load its own base, or --force it onto this one")


def _change(old: Tensor, kind: str, t: Tensor, least: torch.dtype = torch.float32) -> Tensor:
    """The difference that a tensor of a patch makes to ``old``, at ``least`` or more."""
    wide = torch.promote_types(torch.promote_types(old.dtype, t.dtype), least)
    t = t.detach().to(old.device, wide)
    return t - old.detach().to(wide) if kind == "value" else t


def _narrow(t: Tensor) -> Tensor:
    """``t`` (float64) at float32 if that holds every bit of it."""
    return t.float() if torch.equal(t.float().double(), t) else t


def _new(old: Tensor, parts: list[tuple[Literal["value", "delta"], Tensor]], scale: float) -> Tensor:
    if len(parts) == 1 and parts[0][0] == "value" and scale == 1:
        return parts[0][1]
    change = reduce(torch.add, [_change(old, kind, t) for kind, t in parts])
    return old.to(change.dtype) + scale * change


def _is_pickle(path: Path) -> bool:
    """Whether the bytes are a pickle (or torch's zip of one), whatever the file is called. Raises ``RefusedError`` if there is no file."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise RefusedError(f"{path} cannot be read ({error.strerror}); give the path of a weights file") from None
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:] != b"{")  # safetensors: 8 bytes of length, then {


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError):
        raise RefusedError(f"{path} is damaged or no safetensors file; copy or download it again") from None
    if not tensors:
        raise RefusedError(f"{path} holds no tensors; copy or download it again")
    return tensors, metadata


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Tensors from a pickle by torch's restricted reader, which builds tensors and containers and calls nothing else."""
    try:
        with path.open("rb") as file:  # given a path, torch goes by its suffix
            loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged pickle can raise anything
        raise RefusedError(f"{path} is damaged or would run code when opened; ask its maker for a safetensors file") from None
    for name in ("state_dict", "model_state_dict"):  # what training scripts keep beside their optimiser's state
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in loaded.items()):
        raise RefusedError(f"{path} holds more than named tensors; save its state_dict alone as safetensors")
    return dict(loaded)
