"""UCE's equation written a second time, one token and one matrix after the other, with an inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unlearners.base import Task
from unlearners.methods.uce import UCE
from unlearners.targets.stable_diffusion import StableDiffusion

CONCEPTS, GUIDES, KEEP = ("zq", "xw"), ("art", ""), ("ink", "oil", "k")
FORMS = ("{}", "a {} sky")


def naive(W_old: Tensor, texts: dict[str, Tensor], tokens: str, alpha: float, beta: float, lamb: float) -> Tensor:
    """W = (sum alpha v c' + sum beta v p' + lambda W_old)(sum alpha c c' + sum beta p p' + lambda I)^-1 (paper, eq. 7)."""
    d = W_old.shape[1]
    left, right = lamb * W_old.clone(), lamb * torch.eye(d, dtype=torch.float64)
    for concept, guide in zip(CONCEPTS, GUIDES, strict=True):
        for form in FORMS:
            said, instead = form.format(concept), form.format(guide) if guide else ""
            i, j = max(1, len(said.replace(" ", ""))), max(1, len(instead.replace(" ", "")))
            for _ in range(1 if tokens == "last" else 24 - max(i, j)):
                c, g = texts[said][i], texts[instead][j]
                for a in range(W_old.shape[0]):
                    left[a] += alpha * (W_old[a] @ g) * c
                right += alpha * torch.outer(c, c)
                i, j = i + 1, j + 1
    for prompt in ["", *(form.format(p) for p in KEEP for form in FORMS)]:
        end = max(1, len(prompt.replace(" ", "")))
        for position in [end] if tokens == "last" else range(24):
            p = texts[prompt][position]
            for a in range(W_old.shape[0]):
                left[a] += beta * (W_old[a] @ p) * p
            right += beta * torch.outer(p, p)
    return left @ torch.linalg.inv(right)


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("xl", [False, True])
def test_uce_is_the_papers_equation(tokens: str, xl: bool) -> None:
    target = StableDiffusion.tiny(seed=2, xl=xl)
    said = {"", *(f.format(w).strip() for w in (*CONCEPTS, *GUIDES, *KEEP) for f in FORMS)}
    with torch.no_grad():
        texts = {p: target.encode([p]).states[0].double() for p in said}
    before = {n: p.detach().clone().double() for n, p in target.named().items()}
    task = Task(name="t", concepts=CONCEPTS, anchors=GUIDES, preserve=KEEP)
    UCE(tokens=tokens, erase_scale=1.5, preserve_scale=0.7, lamb=0.3, templates=FORMS)(target, task)  # type: ignore[arg-type]
    edited = [n for n in before if ".attn2.to_k." in n or ".attn2.to_v." in n]
    assert len(edited) == 8
    for name, p in target.named().items():
        if name not in edited:
            assert torch.equal(p.double(), before[name])
            continue
        wanted = naive(before[name], texts, tokens, 1.5, 0.7, 0.3)
        assert (p.double() - wanted).abs().max() < 1e-6 * wanted.abs().max()
        assert (wanted - before[name]).norm() > 1e-3 * wanted.norm()
