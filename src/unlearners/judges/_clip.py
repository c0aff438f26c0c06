"""CLIP's two towers, for judges and metrics that compare pictures with texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UnlearnError
from ..files import quiet
from ..finite import finite
from ..zoo import canvas


@lru_cache(maxsize=2)
def load_clip(name: str) -> tuple[Any, Any]:
    """The ``CLIPModel`` and ``CLIPProcessor`` called ``name``, on the GPU where there is one; "canvas" is the bundled pair."""
    from transformers import CLIPModel, CLIPProcessor

    source = str(canvas.FOLDER / "clip") if name == "canvas" else name
    try:
        with quiet():
            model: Any = CLIPModel.from_pretrained(source)
            processor: Any = CLIPProcessor.from_pretrained(source)
    except OSError as error:
        raise UnlearnError(f"CLIP '{name}' could not be loaded; connect once, or give a local folder or 'canvas' as its model") from error
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UnlearnError(f"CLIP '{name}' is damaged or is no CLIPModel; copy it again, or give 'canvas' as its model") from error
    return model.float().requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


@torch.no_grad()
def embed_images(name: str, images: Tensor) -> Tensor:
    """Unit-length CLIP embeddings (B, P) of pictures (B, 3, H, W) in [0, 1], on the CPU. They are read as 8-bit pictures, like files.

    Raises ``NonFiniteError`` for pictures that are not finite.
    """
    finite(images)
    model, processor = load_clip(name)
    pixels = processor.image_processor(list((images.float() * 255).round().byte().cpu()), return_tensors="pt")["pixel_values"]
    x = model.visual_projection(model.vision_model(pixel_values=pixels.to(model.device)).pooler_output)
    return (x / x.norm(dim=-1, keepdim=True)).cpu()  # type: ignore[no-any-return]


@torch.no_grad()
def embed_texts(name: str, texts: Sequence[str]) -> Tensor:
    """Unit-length CLIP embeddings (N, P) of texts, on the CPU; each is cut to CLIP's context."""
    model, processor = load_clip(name)
    length = model.config.text_config.max_position_embeddings
    ids = processor.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt").to(model.device)
    x = model.text_projection(model.text_model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).pooler_output)
    return (x / x.norm(dim=-1, keepdim=True)).cpu()  # type: ignore[no-any-return]
