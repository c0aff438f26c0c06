"""Zero-shot CLIP (Radford et al., ICML 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Judge, Task
from ..diffusion import batches
from ..errors import UnlearnError
from ..zoo import canvas


@dataclass(frozen=True, kw_only=True)
class ClipZeroShot(Judge):
    """Chooses the label whose description is nearest to the picture in CLIP's space.

        label = argmax over candidates l of cos(CLIP_image(x), CLIP_text(template(l)))

    Candidates of the domain to be forgotten: the task's concepts, anchors and preserve, and what its probes name there; of other
    domains: what the probes name. A domain without candidates gets "". Where nothing but the concepts, or a single label, is known
    the rival is ``other``, and for nsfw it is always ``safe``; both give the label "".
    It needs no trained classifier, so it serves any concept, and it is weaker than one: check it on the original model first.
    """

    paper: ClassVar[str] = "arXiv:2103.00020"

    model: str = "openai/clip-vit-base-patch32"
    """hub id or local folder of a CLIPModel; "canvas" is the bundled one"""
    style: str = "an image in {} style"
    """description of a style"""
    object: str = "an image of a {}"
    """description of an object"""
    identity: str = "an image of {}"
    """description of a person or character"""
    nsfw: str = "{}"
    """description of unsafe content"""
    safe: str = "a safe picture"
    """what unsafe content is told from"""
    other: str = "a picture"
    """what a concept without any known alternative is told from"""
    batch: int = 64
    """pictures read at once"""

    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        kind = task.kind if domain == task.axis else domain
        template = {"style": self.style, "identity": self.identity, "nsfw": self.nsfw}.get(kind, self.object)
        labels = candidates(task, domain)
        if not labels:
            return [""] * len(images)
        texts = [template.format(label) for label in labels]
        if kind == "nsfw" or len(labels) == 1 or set(labels) <= set(task.concepts):
            labels, texts = [*labels, ""], [*texts, self.safe if kind == "nsfw" else self.other]
        text = embed_texts(self.model, texts)  # (N, P)
        image = torch.cat([embed_images(self.model, images[part]) for part in batches(len(images), self.batch)])  # (B, P)
        return [labels[i] for i in (image @ text.T).argmax(-1).tolist()]


def candidates(task: Task, domain: str) -> list[str]:
    """The labels a picture can get in ``domain``, each once, in a fixed order."""
    own = (*task.concepts, *task.anchors, *task.preserve) if domain == task.axis else ()
    named = (p.truth[domain] for p in task.probes if domain in p.truth)
    return [label for label in dict.fromkeys((*own, *named)) if label.strip()]


@lru_cache(maxsize=2)
def load_clip(name: str) -> tuple[Any, Any]:
    """The ``CLIPModel`` and ``CLIPProcessor`` called ``name``, on the GPU where there is one; "canvas" is the bundled pair."""
    from transformers import CLIPModel, CLIPProcessor

    source = str(canvas.FOLDER / "clip") if name == "canvas" else name
    try:
        model: Any = CLIPModel.from_pretrained(source)
        processor: Any = CLIPProcessor.from_pretrained(source)
    except OSError as error:
        raise UnlearnError(f"CLIP '{name}' could not be loaded; connect once, or give a local folder or 'canvas' as its model") from error
    return model.float().requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


@torch.no_grad()
def embed_images(name: str, images: Tensor) -> Tensor:
    """Unit-length CLIP embeddings (B, P) of pictures (B, 3, H, W) in [0, 1], on the CPU. They are read as 8-bit pictures, like files."""
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
