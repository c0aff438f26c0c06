"""The original code's names for Stable Diffusion's weights, worked out from diffusers' names.

The original UNet numbers its layers in one row, down and up; diffusers numbers blocks, and layers within a block. OpenCLIP text
encoders (SD 2.x, the second of SDXL) keep query, key and value in one matrix. Nothing here depends on sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import UsageError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."  # SD 1.x, SD 2.x
CLIP_XL, OPENCLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."  # both of SDXL's
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias", "text_projection.weight": "text_projection",
}  # fmt: skip
TEXT_PARTS = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def _lost(key: str) -> UsageError:
    return UsageError(f"the original layout has no name for '{key}' of this model; export it as diffusers instead")


# --- UNet ---------------------------------------------------------------------------------------------------------
def unet_names(keys: Iterable[str]) -> dict[str, str]:
    """{diffusers name: original name} of a UNet's weights, both without a prefix; ``UsageError`` for a weight that has none there."""
    keys = list(keys)
    first = {k.split(".")[3] for k in keys if k.startswith("down_blocks.0.resnets.")}
    attends = {k.split(".")[1] for k in keys if re.match(r"up_blocks\.\d+\.attentions\.", k)}
    return {k: _unet(k, len(first) + 1, attends) for k in keys}


def _unet(key: str, span: int, attends: set[str]) -> str:
    """The name of one weight. ``span``: places a block takes in the row; ``attends``: the up blocks that have attention."""
    for ours, theirs in ENDS.items():
        if key.startswith(f"{ours}."):
            return theirs + key.removeprefix(ours)
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key):
        kind, n, rest = found[1], int(found[2]), found[3]
        return f"middle_block.{2 * n}.{_resnet(rest, key)}" if kind == "resnets" else f"middle_block.{2 * n + 1}.{rest}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key)
    if not found:
        raise _lost(key)
    block, kind, n, rest = int(found[2]), found[3], int(found[4]), found[5]
    if found[1] == "down":
        at = 1 + block * span + (span - 1 if kind == "downsamplers" else n)
        row = f"input_blocks.{at}"
    else:
        at = block * span + (span - 1 if kind == "upsamplers" else n)
        row = f"output_blocks.{at}"
    if kind == "resnets":
        return f"{row}.0.{_resnet(rest, key)}"
    if kind == "attentions":
        return f"{row}.1.{rest}"
    if kind == "downsamplers":
        return f"{row}.0.op.{rest.removeprefix('conv.')}"
    return f"{row}.{2 if found[2] in attends else 1}.{rest}"


def _resnet(rest: str, key: str) -> str:
    part, _, tail = rest.partition(".")
    if part not in RESNET:
        raise _lost(key)
    return f"{RESNET[part]}.{tail}"


# --- VAE ----------------------------------------------------------------------------------------------------------
def vae_names(keys: Iterable[str]) -> dict[str, str]:
    """{diffusers name: original name} of a VAE's weights, both without a prefix; the decoder's blocks are counted from the end there."""
    keys = list(keys)
    blocks = 1 + max(int(k.split(".")[2]) for k in keys if k.startswith("decoder.up_blocks."))
    return {k: _vae(k, blocks) for k in keys}


def _vae(key: str, blocks: int) -> str:
    if re.match(r"(post_)?quant_conv\.|(en|de)coder\.conv_(in|out)\.", key):
        return key
    if found := re.fullmatch(r"((?:en|de)coder)\.conv_norm_out\.(.+)", key):
        return f"{found[1]}.norm_out.{found[2]}"
    if found := re.fullmatch(r"((?:en|de)coder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
        return f"{found[1]}.mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}"
    if found := re.fullmatch(r"((?:en|de)coder)\.mid_block\.resnets\.(\d+)\.(.+)", key):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3].replace('conv_shortcut', 'nin_shortcut')}"
    if found := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(resnets|downsamplers)\.(\d+)\.(.+)", key):
        row = f"encoder.down.{found[1]}"
    elif found := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", key):
        row = f"decoder.up.{blocks - 1 - int(found[1])}"
    else:
        raise _lost(key)
    if found[2] == "resnets":
        return f"{row}.block.{found[3]}.{found[4].replace('conv_shortcut', 'nin_shortcut')}"
    return f"{row}.{found[2].removesuffix('rs')}.{found[4]}"


def vae_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's weights under their original names, where the attention's matrices are 1 × 1 convolutions."""
    names = vae_names(state)
    return {names[k]: t[:, :, None, None] if "attentions" in k and t.dim() == 2 else t for k, t in state.items()}


# --- OpenCLIP text encoders ---------------------------------------------------------------------------------------
def to_openclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's weights (``text_model.`` before them or not) as OpenCLIP names and joins them."""
    state = {k.removeprefix("text_model."): t for k, t in state.items()}
    made: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in TEXT_TOP:
            made[TEXT_TOP[key]] = tensor.T if key.startswith("text_projection") else tensor
            continue
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if not found:
            raise _lost(key)
        layer, part, kind = f"transformer.resblocks.{found[1]}", found[2], found[3]
        if part in TEXT_PARTS:
            made[f"{layer}.{TEXT_PARTS[part]}.{kind}"] = tensor
        elif part == "self_attn.q_proj":
            three = [state[key.replace("q_proj", f"{c}_proj")] for c in "qkv"]
            made[f"{layer}.attn.in_proj_{kind}"] = torch.cat(three)
        elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise _lost(key)
    return made


def from_openclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back, to names with ``text_model.``; names that OpenCLIP's text encoder does not have are left as they are."""
    tops, parts = ({v: k for k, v in names.items()} for names in (TEXT_TOP, TEXT_PARTS))
    made: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in tops:
            name = tops[key]
            made[name if name.startswith("text_projection") else f"text_model.{name}"] = (
                tensor.T.contiguous() if key == "text_projection" else tensor
            )
            continue
        found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", key)
        layer = f"text_model.encoder.layers.{found[1]}" if found else ""
        if found and found[2] in parts:
            made[f"{layer}.{parts[found[2]]}.{found[3]}"] = tensor
        elif found and found[2] == "attn.in_proj":
            made |= {f"{layer}.self_attn.{c}_proj.{found[3]}": t.clone() for c, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            made[key] = tensor
    return made
