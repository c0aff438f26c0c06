"""Erased models that others published, as the patches they are: partial and full UNets, text encoders, CompVis checkpoints, LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import ldm, lora_files, patch
from .patch import Modules, Patch

# What a whole checkpoint holds beside the weights that are edited: the VAE, averaged weights, the noise schedule, CLIP's temperature.
BESIDE = re.compile(
    r"(model_ema|first_stage_model|loss)\..+|.*position_ids|.*logit_scale|(betas|alphas_cumprod(_prev)?|sqrt_.+|log_one_minus_.+"
    r"|posterior_.+|logvar|lvlb_weights|scale_factor|denoiser\.sigmas)"
)
LDM = re.compile(r"((model\.)?diffusion_model\.)?(input_blocks|middle_block|output_blocks)\.|cond_stage_model\.|conditioner\.embedders\.")
FORMS = {"lora": "LoRA", "ldm": "original (CompVis) names", "diffusers": "diffusers names", "patch": "patch"}


def form(names: Mapping[str, object]) -> str:
    """What these names of tensors are: "lora", "ldm" (the original code's) or "diffusers" (also a text encoder's own)."""
    if lora_files.is_lora(names):
        return "lora"
    return "ldm" if any(LDM.match(k) for k in names) else "diffusers"


def read(path: str | Path, modules: Modules, base: Mapping[str, str]) -> Patch:
    """A patch file of ours, or a file that others made as the patch it is for ``modules``, whose ``base_hash`` is ``base``.

    Raises ``RefusedError`` for a file that is damaged, would run code, does not fit, or from which nothing would be loaded.
    """
    path = Path(path)
    if patch.is_patch(path):
        return patch.load(path)
    given, metadata = patch.read_tensors(path), patch.header(path)
    kind = form(given)
    if kind == "lora":
        tensors = lora_files.changes(path, given, patch.live(modules), lora_files.settings_of(path, metadata, given))
    else:
        tensors = patch.fit(path, _renamed(given, modules) if kind == "ldm" else given, modules)
    touched = {k.partition(".")[0] for k in tensors}
    meta = {"foreign": path.name, "form": FORMS[kind]}
    return Patch(tensors=tensors, kind="delta" if kind == "lora" else "value", base={c: base[c] for c in touched}, meta=meta)


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
