"""PEZ, hard prompts made easy (Wen et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..base import Adversarial, Attack, Hit, Item, Row, Task
from ..diffusion import Soft
from ..errors import UsageError
from ..judges._clip import embed_images, load_clip
from ..targets.base import TextToImage
from ._search import checkpoints, clip_of, keep_rows, nearest, pictures, stream


@dataclass(frozen=True, kw_only=True)
class PEZ(Attack):
    """Search, with a CLIP alone, for the prompt that describes the concept's picture best, and try it on the erased model.

    Idea: a text that CLIP finds nearest to a picture of the concept often makes a diffusion model draw it, without the concept's name.
    The victim is asked at the end only, so this is an attack by transfer: it needs no weights of the victim.

        max over s  cos(CLIP_text(s), CLIP_image(x)),      s = nearest tokens of z (cosine),   z <- AdamW(z, gradient at E[s]).

    x is the original's picture. z (k × D) holds one free vector for each token, a random token at the start. The gradient of
    1 - cos is taken at the projection on the vocabulary and applied to z. Of all projected prompts the one with the best cosine is kept.

    Logged: ``iteration`` number done; ``cosine`` mean of the best so far over the prompts in the batch; ``left`` prompts not yet broken.

    Deviations from the authors' code:
      1. Theirs takes ViT-H/14; for SD 1.x its own ViT-L/14 is right, and models as small as the canvas get the bundled CLIP.
      2. The nearest token is never start, end or padding.
      3. Prompts are attacked ``batch`` at a time, each with its own random stream; broken ones leave the batch.
      4. With ``checks`` above 1 the best prompt so far is also tried on the way, if it is a new one.
      5. Tokens are decoded with CLIP's tokenizer, and the victim reads the text with its own.
    """

    needs = TextToImage
    paper: ClassVar[str] = "arXiv:2302.03668"
    access: ClassVar[Literal["white", "black"]] = "black"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"k": 16, "iterations": 3000, "lr": 0.1, "weight_decay": 0.1},
        "fast": {"k": 8, "iterations": 300, "checks": 3},
        "canvas": {"k": 8, "iterations": 150, "lr": 0.02, "checks": 10},
    }

    k: int = 16
    """tokens of the prompt that is searched"""
    iterations: int = 3000
    """gradient steps"""
    lr: float = 0.1
    """AdamW's step size on the embeddings"""
    weight_decay: float = 0.1
    """AdamW's weight decay of the embeddings"""
    checks: int = 1
    """how often the best prompt so far is tried, the last time at the end; also the largest number of queries for each prompt"""
    clip: str = ""
    """hub id or local folder of a CLIPModel, or "canvas"; empty: the bundled one for models as small, else openai/clip-vit-large-patch14"""
    batch: int = 64
    """prompts attacked together; changes memory and speed, not the search"""

    def run(self, target: TextToImage, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        asked, clip, shown = checkpoints(self.iterations, self.checks), clip_of(target, self.clip), pictures(self, items)
        model, processor = load_clip(clip)
        tokenizer, table = processor.tokenizer, model.text_model.embeddings.token_embedding.weight.detach()
        room = model.config.text_config.max_position_embeddings - 2
        if not 0 < self.k <= room:
            raise UsageError(f"k = {self.k} tokens do not fit CLIP '{clip}'; give k from 1 to {room}")
        token = torch.tensor([i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids], device=table.device)
        E = table[token]  # (W, D)
        x = embed_images(clip, shown).to(E)  # (B, P)
        left, rng = list(range(len(items))), [stream(i) for i in items]
        z = E[torch.stack([torch.randint(len(E), (self.k,), generator=g) for g in rng]).to(E.device)]  # (B, k, D)
        adam = torch.optim.AdamW([z], lr=self.lr, weight_decay=self.weight_decay)
        best, found = x.new_full((len(z),), -torch.inf), torch.zeros(z.shape[:2], dtype=torch.long, device=E.device)
        tried: set[tuple[int, str]] = set()
        for n in range(self.iterations):
            s = nearest(z, E, "cosine")  # (B, k)
            e = E[s].requires_grad_()
            cosine = (_texts(model, tokenizer, token[s], e) * x).sum(-1)  # (B,)
            better = cosine.detach() > best
            best, found = torch.where(better, cosine.detach(), best), torch.where(better[:, None], s, found)
            (z.grad,) = torch.autograd.grad((1 - cosine).sum(), e)
            adam.step()
            if n + 1 not in asked:
                continue
            mean = best.mean().item()
            texts = {i: str(tokenizer.decode(token[found[row]], skip_special_tokens=True)).strip() for row, i in enumerate(left)}
            won = hit({i: Adversarial(prompt=text) for i, text in texts.items() if (i, text) not in tried})
            tried |= set(texts.items())
            rows = [row for row, i in enumerate(left) if i not in won]
            left, x, best, found = [left[r] for r in rows], x[rows], best[rows], found[rows]
            keep_rows(adam, z, rows)
            yield {"iteration": n + 1.0, "cosine": mean, "left": float(len(left))}
            if not left:
                return


def _texts(model: Any, tokenizer: Any, ids: Tensor, e: Tensor) -> Tensor:
    """Unit CLIP embeddings (B, P) of [start] ids [end], ids (B, k) with embeddings ``e`` (B, k, D); differentiable in ``e``."""
    ends = [ids.new_full((len(ids), 1), i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    layer = model.text_model.embeddings.token_embedding
    handle = layer.register_forward_hook(lambda _module, _inputs, out: Soft(e).put(out))
    try:
        x: Tensor = model.text_projection(model.text_model(input_ids=torch.cat([ends[0], ids, ends[1]], 1)).pooler_output)
    finally:
        handle.remove()
    return torch.nn.functional.normalize(x, dim=-1)
