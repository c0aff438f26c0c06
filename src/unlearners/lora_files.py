"""LoRA files: the change W' - W of a layer as a product of two thin matrices, in the names of PEFT, diffusers and kohya."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import ldm
from .errors import RefusedError

Naming = Literal["peft", "kohya"]
TOWERS = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
PAIR = re.compile(r"(.+?)[._](?:lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|lora_linear_layer\.(?:down|up))"
                  r"(?:\.default(?:_\d+)?)?\.weight")  # fmt: skip
DOWN = re.compile(r"lora_A|down\.(?:default(?:_\d+)?\.)?weight$")


def is_lora(keys: Mapping[str, Any]) -> bool:
    """Whether these are the names in a file of low-rank (or otherwise factored) changes."""
    return any(re.search(r"[._](lora|lokr|hada)_|\.lora\.(down|up)\.|_lora\.(down|up)\.", k) for k in keys)


def factor(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best product of ``rank`` for a change (out, in) or (out, in, k, k): down (rank, in[, k, k]) and up (out, rank[, 1, 1]).

    Truncated singular value decomposition in float64 (Eckart & Young 1936), the singular values shared evenly. Where the change has
    fewer than ``rank`` of them, the rest is zero.
    """
    flat = change.double().flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    r = min(rank, len(s))
    up, down = flat.new_zeros(len(flat), rank), flat.new_zeros(rank, flat.shape[1])
    up[:, :r], down[:r] = u[:, :r] * s[:r].sqrt(), s[:r].sqrt()[:, None] * v[:r]
    if change.dim() == 4:
        return down.view(rank, *change.shape[1:]), up[:, :, None, None]
    return down, up


def layers(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """{weight: layer} of those weights by hub key that a LoRA can change: Linear and Conv2d, not norms, biases or embeddings."""
    fits = {k: k.removesuffix(".weight") for k, t in tensors.items() if k.endswith(".weight") and t.dim() in (2, 4)}
    return {k: name for k, name in fits.items() if not name.rpartition(".")[2].endswith("embedding")}


def pair_names(layer: str, naming: Naming, original: Mapping[str, str]) -> dict[str, str]:
    """The file's names for a layer's {"down", "up"} and, for kohya, "alpha". ``original`` has SDXL's layers as kohya spells them."""
    if naming == "peft":
        return {"down": f"{layer}.lora_A.weight", "up": f"{layer}.lora_B.weight"}
    component, _, rest = layer.partition(".")
    head = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if original else "lora_te_", "text_encoder_2": "lora_te2_"}[component]
    name = head + original.get(layer, rest).replace(".", "_")
    return {"down": f"{name}.lora_down.weight", "up": f"{name}.lora_up.weight", "alpha": f"{name}.alpha"}


def original_layers(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """{layer: the original code's name} of a UNet's layers, which is how kohya names those of SDXL."""
    names = ldm.unet_names(k.removeprefix("unet.") for k in tensors if k.startswith("unet."))
    return {f"unet.{k.removesuffix('.weight')}": v.removesuffix(".weight") for k, v in names.items() if k.endswith(".weight")}


# --- reading ------------------------------------------------------------------------------------------------------
def changes(path: Path, given: Mapping[str, Tensor], live: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the LoRA in ``path`` adds to the weights ``live``, by hub key: alpha / rank * up @ down, at float32.

    ``settings`` are those that PEFT keeps beside the weights (``settings_of``). Raises ``RefusedError`` for another kind of factors
    (LoHa, LoKr, DoRA …), for half a pair, and for a layer that the model has not, or in another shape.
    """
    known = _aliases(live)
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in given.items():
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(tensor)
        elif found := PAIR.fullmatch(key):
            pairs.setdefault(found[1], {})["down" if DOWN.search(key) else "up"] = tensor
        else:
            raise RefusedError(f"{path} holds '{key}', which is no LoRA weight; merge it into a checkpoint with its own tool first")
    found_changes: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        weight = known.get(re.sub(r"^base_model\.model\.", "", name).replace(".processor.", "."))
        if weight is None:
            raise RefusedError(f"{path} changes '{name}', which this model lacks; load the base it was made for")
        if len(pair) != 2:
            raise RefusedError(f"{path} holds only one half of the pair for '{name}'; copy or download it again")
        if weight in found_changes:
            raise RefusedError(f"{path} changes '{weight}' under two names; keep one of them")
        down, up, shape = pair["down"].float(), pair["up"].float(), live[weight].shape
        if down.flatten(1).shape[1] != shape[1:].numel() or up.shape[0] != shape[0] or up.flatten(1).shape[1] != down.shape[0]:
            raise RefusedError(f"{path} changes '{weight}' of another shape than here, {list(shape)}; load the base it was made for")
        alpha = alphas.get(name, _alpha(settings, weight, down.shape[0]))
        found_changes[weight] = (alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1))).view(shape)
    if lost := sorted(alphas.keys() - pairs.keys()):
        raise RefusedError(f"{path} gives an alpha for '{lost[0]}' and no weights; copy or download it again")
    return found_changes


def settings_of(path: Path, metadata: Mapping[str, str], given: Mapping[str, Tensor]) -> dict[str, Any]:
    """PEFT's settings: in the file's header as diffusers writes it, or for PEFT's own names in adapter_config.json beside the file."""
    try:
        if "lora_adapter_metadata" in metadata:
            return dict(json.loads(metadata["lora_adapter_metadata"]))
        if any(k.startswith("base_model.model.") for k in given):
            return dict(json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise RefusedError(f"{path} does not say how strong it is; put its whole adapter_config.json beside it") from None
    return {}


def _alpha(settings: Mapping[str, Any], weight: str, rank: int) -> float:
    """The alpha that PEFT's settings give a layer; its rank when they say nothing."""
    component, _, layer = weight.removesuffix(".weight").partition(".")
    own = {k.removeprefix(f"{component}."): v for k, v in settings.items()}
    if own.get("use_dora") or own.get("use_rslora"):
        raise RefusedError("this LoRA was trained with DoRA or rank-stabilised scaling; merge it into a checkpoint with its own tool first")
    pattern = {k.lstrip("^"): v for k, v in (own.get("alpha_pattern") or {}).items()}
    at = next((v for k, v in pattern.items() if layer == k or layer.endswith(f".{k}")), None)
    return float(at if at is not None else own.get("lora_alpha", rank))


def _aliases(live: Mapping[str, Tensor]) -> dict[str, str]:
    """{what files call a layer: its weight by hub key}."""
    known: dict[str, str] = {}
    kohya = original_layers(live) if any(k.startswith("unet.") for k in live) else {}
    for weight, layer in layers(live).items():
        component, _, rest = layer.partition(".")
        known[layer] = weight
        heads = ("lora_unet_",) if component == "unet" else TOWERS.get(component, ())
        known |= {head + rest.replace(".", "_"): weight for head in heads}
        if component == "unet":
            known |= {rest: weight, f"lora_unet_{kohya[layer].replace('.', '_')}": weight}
            if rest.endswith(".to_out.0"):
                known |= {f"{at}{rest.removesuffix('.0')}": weight for at in ("unet.", "")}  # the old attention processors' name
        else:
            bare = rest.removeprefix("text_model.")
            known |= {f"{component}.{bare}": weight}
            for q, old in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
                if rest.endswith(f"self_attn.{q}"):
                    known[f"{component}.{rest.removesuffix(q)}{old}"] = weight
    return known
