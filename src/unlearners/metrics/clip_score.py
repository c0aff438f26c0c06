"""CLIP score (Hessel et al., EMNLP 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import Metric, Outputs, Request, Score, Task
from ..diffusion import batches
from ..judges._clip import embed_images, embed_texts
from ..targets.base import TextToImage

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ClipScore(Metric):
    """CLIP score: how well pictures without the concept still fit their prompts, as mean cosine × 100.

    Idea: utility of the edited model on prompts that have nothing to do with the concept.

        CLIP score = 100 / n · sum over probes not naming the concept and seeds of cos(CLIP_image(x), CLIP_text(prompt))

    Logged: the mean, mean ± 1.96 standard errors, n = pictures, and the value of each picture.

    Deviations from the authors' code:
      1. Plain cosine × 100 as the unlearning literature reports it (0.311 there is 31.1 here); Hessel et al. use 2.5 · max(cos, 0).
      2. ViT-B/32 by default, and the bundled CLIP on the canvas; scores of different CLIPs cannot be compared.
      3. The prompt is encoded as it is, without "A photo depicts".
    """

    needs = TextToImage
    higher_is_better: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2104.08718"

    model: str = ""
    """hub id or local folder of a CLIPModel, or "canvas"; empty: the bundled one on the canvas, else openai/clip-vit-base-patch32"""

    def requests(self, target: TextToImage, task: Task) -> list[Request]:
        return [r for p in task.probes if not task.names_concept(p) for r in task.pictures(p)]

    def score(self, target: TextToImage, task: Task, outputs: Outputs) -> Score:
        name = self.model or ("canvas" if target.base["name"] in ("canvas", "canvas-finetuned") else "openai/clip-vit-base-patch32")
        requests = self.requests(target, task)
        if not requests:
            return Score(value=math.nan, n=0)
        prompts = list(dict.fromkeys(r.prompt for r in requests))
        text = torch.cat([embed_texts(name, prompts[part]) for part in batches(len(prompts), BATCH)])
        image = torch.cat([embed_images(name, outputs.images(requests[part])) for part in batches(len(requests), BATCH)])
        rows = [prompts.index(r.prompt) for r in requests]
        values = 100 * (image * text[rows]).sum(-1).double()  # (n,)
        mean, n = values.mean().item(), len(values)
        half = 1.96 * values.std().item() / math.sqrt(n) if n > 1 else math.nan
        return Score(value=mean, n=n, low=mean - half, high=mean + half, per_item=tuple(values.tolist()))
