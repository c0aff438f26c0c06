"""Names and shapes of CLIP's weights in open_clip and in transformers, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import RefusedError

Tensors = Mapping[str, Tensor]
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""parts of a residual block: open_clip's name, transformers' name"""
WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TURNED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
"""projections, which are the transpose of each other"""
SIDES = {"": "text_model", "visual.": "vision_model"}
FUSED = ("q_proj", "k_proj", "v_proj")
"""what open_clip's in_proj stacks, in this order"""


def to_transformers(state: Tensors) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names. Raises ``RefusedError`` for one that a transformers CLIP has no place for."""
    state = {re.sub(r"^(module\.|text\.)", "", k): v for k, v in state.items() if not k.endswith("attn_mask")}
    out: dict[str, Tensor] = {}
    for name, w in state.items():
        if name in WHOLE:
            out[WHOLE[name]] = w
        elif name in TURNED:
            out[TURNED[name]] = w.T.contiguous()
        elif found := re.match(r"(visual\.|)transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$", name):
            side, n, part, kind = found.groups()
            if part not in BLOCK:
                raise RefusedError(f"a CLIP of transformers has no place for '{name}'; use one with ordinary transformer blocks (ViT)")
            out[f"{SIDES[side]}.encoder.layers.{n}.{BLOCK[part]}.{kind}"] = w
        elif found := re.match(r"(visual\.|)transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$", name):
            side, n, kind = found.groups()
            for q, piece in zip(FUSED, w.chunk(3), strict=True):
                out[f"{SIDES[side]}.encoder.layers.{n}.self_attn.{q}.{kind}"] = piece.contiguous()
        else:
            raise RefusedError(f"a CLIP of transformers has no place for '{name}'; use one with ordinary transformer blocks (ViT)")
    return out


def to_open_clip(state: Tensors) -> dict[str, Tensor]:
    """transformers' weights under open_clip's names; undoes ``to_transformers``."""
    whole, turned = {v: k for k, v in WHOLE.items()}, {v: k for k, v in TURNED.items()}
    block, sides = {v: k for k, v in BLOCK.items()}, {v: k for k, v in SIDES.items()}
    out: dict[str, Tensor] = {}
    for name, w in state.items():
        if name in whole:
            out[whole[name]] = w
        elif name in turned:
            out[turned[name]] = w.T.contiguous()
        elif found := re.match(r"(\w+)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", name):
            side, n, part, kind = found.groups()
            at = f"{sides[side]}transformer.resblocks.{n}."
            if part in block:
                out[f"{at}{block[part]}.{kind}"] = w
            elif part.endswith("q_proj"):
                fused = [state[f"{side}.encoder.layers.{n}.self_attn.{q}.{kind}"] for q in FUSED]
                out[f"{at}attn.in_proj_{kind}"] = torch.cat(fused)
        elif not name.endswith("position_ids"):
            raise RefusedError(f"open_clip has no place for '{name}'; export it for transformers instead")
    return out


def config(found: Mapping[str, Any]) -> dict[str, Any]:
    """The transformers CLIP configuration of an open_clip one. Raises ``RefusedError`` for towers that transformers' CLIP cannot hold."""
    v, t = found["vision_cfg"], found["text_cfg"]
    odd = [k for k in ("timm_model_name", "hf_model_name") if v.get(k) or t.get(k)]
    if odd or not isinstance(v.get("layers"), int) or found.get("multimodal_cfg"):
        raise RefusedError("this open_clip model is no plain ViT with a plain text transformer; use one such as ViT-B-32 or ViT-L-14")
    act = "quick_gelu" if found.get("quick_gelu") else "gelu"
    vocabulary = t.get("vocab_size", 49408)
    return {
        "projection_dim": found["embed_dim"],
        "vision_config": {
            "hidden_size": v["width"], "intermediate_size": int(v["width"] * v.get("mlp_ratio", 4.0)), "num_hidden_layers": v["layers"],
            "num_attention_heads": v["width"] // v.get("head_width", 64), "image_size": v["image_size"], "patch_size": v["patch_size"],
            "hidden_act": act, "projection_dim": found["embed_dim"],
        },
        "text_config": {
            "hidden_size": t["width"], "intermediate_size": int(t["width"] * t.get("mlp_ratio", 4.0)), "num_hidden_layers": t["layers"],
            "num_attention_heads": t["heads"], "max_position_embeddings": t.get("context_length", 77), "vocab_size": vocabulary,
            "hidden_act": act, "projection_dim": found["embed_dim"],
            "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 0,
        },
    }  # fmt: skip
