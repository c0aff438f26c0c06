"""Erased models that others published, as the patches they are: partial and full UNets, text encoders, CompVis checkpoints, LoRA."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import ldm, lora_files, patch
from .errors import RefusedError
from .patch import PICKLES, Modules, Patch

# What a whole checkpoint holds beside the weights that are edited: the VAE, averaged weights, the noise schedule, CLIP's temperature.
BESIDE = re.compile(
    r"(model_ema|first_stage_model|loss)\..+|.*position_ids|.*logit_scale|(betas|alphas_cumprod(_prev)?|sqrt_.+|log_one_minus_.+"
    r"|posterior_.+|logvar|lvlb_weights|scale_factor|denoiser\.sigmas)"
)
LDM = re.compile(r"((model\.)?diffusion_model\.)?(input_blocks|middle_block|output_blocks)\.|cond_stage_model\.|conditioner\.embedders\.")
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
STANDARD = ("model", "diffusion_pytorch_model", "pytorch_model", "weights")
"""what programs call the one weights file of a folder, beside which others may hold the same in another precision"""
FORMS = {"lora": "LoRA", "ldm": "original (CompVis) names", "diffusers": "diffusers names", "patch": "patch"}


def form(names: Mapping[str, object]) -> str:
    """What these names of tensors are: "lora", "ldm" (the original code's) or "diffusers" (also a text encoder's own)."""
    if lora_files.is_lora(names):
        return "lora"
    return "ldm" if any(LDM.match(k) for k in names) else "diffusers"


def read(path: str | Path, modules: Modules, base: Mapping[str, str]) -> Patch:
    """A patch file of ours, or a file that others made as the patch it is for ``modules``, whose ``base_hash`` is ``base``.

    ``path`` may be the folder of one component, as diffusers and transformers write it. Raises ``RefusedError`` for a file that is
    damaged, would run code, does not fit, or from which nothing would be loaded.
    """
    path = Path(path)
    files = held(path)
    if patch.is_patch(files[0]):
        return patch.load(files[0])
    given = {k: t for f in files for k, t in patch.read_tensors(f).items()}
    metadata = patch.header(files[0])
    kind = form(given)
    if kind == "lora":
        tensors = lora_files.changes(path, given, patch.live(modules), lora_files.settings_of(files[0], metadata, given))
    else:
        tensors = patch.fit(path, _renamed(given, modules) if kind == "ldm" else given, modules)
    touched = {k.partition(".")[0] for k in tensors}
    meta = {"foreign": path.name, "form": FORMS[kind]}
    return Patch(tensors=tensors, kind="delta" if kind == "lora" else "value", base={c: base[c] for c in touched}, meta=meta)


def held(path: Path) -> list[Path]:
    """The weights file in a folder of one component, or all its shards; a file itself. Safetensors go before pickles.

    Raises ``RefusedError`` for a folder without weights, with a shard too few, or with several files that may be meant.
    """
    if not path.is_dir():
        return [path]
    for kinds in ({".safetensors"}, PICKLES):
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in kinds and f.is_file())
        named = [f for f in files if f.stem in STANDARD]
        shards = {f: m for f in files if (m := SHARD.fullmatch(f.stem))}
        if shards and not named and len({(m[1], m[2]) for m in shards.values()}) == 1:
            if len(shards) != (whole := int(next(iter(shards.values()))[2])):
                raise RefusedError(f"{path} holds {len(shards)} of {whole} parts of its weights; copy or download it again")
            return list(shards)
        if len(named or files) == 1:
            return named or files
        if files:
            raise RefusedError(f"{path} holds {files[0].name} and {len(files) - 1} more files of weights; give the one that is meant")
    raise RefusedError(f"{path} holds no file of weights; give a diffusers folder, a run folder, or a .safetensors or .pt file")


def digest(path: Path) -> str:
    """SHA-256 (hex) of a weights file; of a folder, over the names and hashes of all weights files in it, unless it has but one."""
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in {".safetensors", *PICKLES}) if path.is_dir() else [path]
    rows = [(f.relative_to(path).as_posix(), _sha(f)) for f in files]
    return rows[0][1] if len(rows) == 1 else hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in rows).encode()).hexdigest()


def _sha(path: Path) -> str:
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                found.update(part)
    except OSError as error:
        raise RefusedError(f"{path} cannot be read ({error.strerror}); give the path of a weights file") from None
    return found.hexdigest()


def _renamed(given: Mapping[str, Tensor], modules: Modules) -> dict[str, Tensor]:
    """Weights under the original code's names by hub key; names that mean nothing here stay, to be refused."""
    live = patch.live(modules)
    unet = {v: k for k, v in ldm.unet_names(k.removeprefix("unet.") for k in live if k.startswith("unet.")).items()}
    made: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {"text_encoder": {}, "text_encoder_2": {}}
    for key, tensor in given.items():
        bare = re.sub(r"^(model\.)?diffusion_model\.", "", key)
        if BESIDE.fullmatch(key):
            continue
        if bare in unet:
            made[f"unet.{unet[bare]}"] = tensor
        elif key.startswith((ldm.CLIP, ldm.CLIP_XL)):
            made[patch.hub_key(f"text_encoder.{key.removeprefix(ldm.CLIP).removeprefix(ldm.CLIP_XL)}")] = tensor
        elif key.startswith((ldm.OPENCLIP, ldm.OPENCLIP_XL)):
            tower = "text_encoder" if key.startswith(ldm.OPENCLIP) else "text_encoder_2"
            joined[tower][key.removeprefix(ldm.OPENCLIP).removeprefix(ldm.OPENCLIP_XL)] = tensor
        else:
            made[key] = tensor
    for tower, state in joined.items():
        # SD 2.x reads the last state but one, so diffusers holds neither the last layer nor the projection behind it.
        depth = len({k.split(".")[4] for k in live if k.startswith(f"{tower}.text_model.encoder.layers.")})
        kept = {k: t for k, t in state.items() if not k.startswith(f"transformer.resblocks.{depth}.")}
        if f"{tower}.text_projection.weight" not in live:
            kept.pop("text_projection", None)
        made |= {f"{tower}.{k}": t for k, t in ldm.from_openclip(kept).items()}
    return made


def file(spec: str | Path) -> Path:
    """The patch of a run folder, or a file itself."""
    return Path(spec) / "weights.safetensors" if Path(spec).is_dir() else Path(spec)


def facts(path: Path) -> dict[str, Any]:
    """What a file says of itself, without a model: kind, form, base, tensors, size, what made it."""
    ours = patch.is_patch(path)
    found = patch.load(path) if ours else None
    tensors = found.tensors if found else patch.read_tensors(path)
    made = {"kind": found.kind, "form": FORMS["patch"]} if found else {"kind": "foreign", "form": FORMS[form(tensors)]}
    counts: dict[str, int] = {}
    for t in tensors.values():
        counts[str(t.dtype).removeprefix("torch.")] = counts.get(str(t.dtype).removeprefix("torch."), 0) + t.numel()
    about = {"file": str(path), **made, "base": dict(found.base) if found else {}, "tensors": len(tensors), "numbers": counts}
    return about | {"bytes": path.stat().st_size, "made by": dict(found.meta) if found else {}}
