"""Two updates of Concept Ablation written a second time with the bare modules: noise, the anchor's prediction, AdamW."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from unlearners import latents
from unlearners.base import Task
from unlearners.methods.concept_ablation import ConceptAblation
from unlearners.targets.stable_diffusion import StableDiffusion

SEED, B, N, LR, DECAY = 11, 3, 4, 1e-4, 0.01
SAID, ANCHORS = ("a zq", "zq sky"), ("a cat", "cat sky")


def update(pipe: Any, z: Tensor, trained: list[str], kind: str, prior: float) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of two updates, and the weights after them."""
    unet, acp = pipe.unet, pipe.scheduler.alphas_cumprod.double()

    def text(prompts: list[str]) -> Tensor:
        ids = pipe.tokenizer(prompts, padding="max_length", max_length=24, return_tensors="pt").input_ids
        states: Tensor = pipe.text_encoder(ids)[0]
        return states

    def eps(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        out: Tensor = unet(x, t, encoder_hidden_states=c).sample
        return out

    weights = {n: p for n, p in unet.named_parameters() if n in trained}
    for p in weights.values():
        p.requires_grad_()
    opt = torch.optim.AdamW(weights.values(), lr=LR * B, weight_decay=DECAY)
    torch.manual_seed(SEED)
    order: list[int] = []
    losses = []
    for _ in range(2):

        def drawn() -> tuple[list[int], Tensor, Tensor, Tensor]:
            order[:] = order or torch.randperm(N).tolist()
            rows = order[:B]
            del order[:B]
            noise, t = torch.randn_like(z[rows]), torch.randint(1000, (len(rows),))
            a = acp[t].view(-1, 1, 1, 1)
            return rows, a.sqrt() * z[rows] + (1 - a).sqrt() * noise, t, noise

        rows, x, t, noise = drawn()
        wanted = noise
        if kind == "model":
            with torch.no_grad():
                wanted = eps(x, t, text([ANCHORS[i % 2] for i in rows]))
        loss = ((eps(x, t, text([SAID[i % 2] for i in rows])) - wanted) ** 2).mean()
        if prior:
            rows, x, t, noise = drawn()
            loss = loss + prior * ((eps(x, t, text([ANCHORS[i % 2] for i in rows])) - noise) ** 2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in weights.items()}


@pytest.mark.parametrize(("kind", "prior"), [("model", 0.0), ("noise", 0.0), ("model", 0.7)])
def test_two_updates_are_the_papers(kind: Literal["model", "noise"], prior: float) -> None:
    target, copy = StableDiffusion.tiny(seed=4), StableDiffusion.tiny(seed=4)
    for model in (target, copy):
        for module in model.modules.values():
            module.double()
    task = Task(name="t", kind="identity", concepts=("zq",), anchors=("cat",))
    z = latents.drawn(target, ANCHORS, N).latent.double().clone()
    rows: list[dict[str, float]] = []
    method = ConceptAblation(variant=kind, steps=2, batch=B, lr=LR, weight_decay=DECAY, prior=prior, pictures=N, prompts=("a {}", "{} sky"))
    method(target, task, seed=SEED, log=rows.append)
    trained = [n for n, _ in copy.pipe.unet.named_parameters() if ".attn2.to_k." in n or ".attn2.to_v." in n]
    losses, weights = update(copy.pipe, z, trained, kind, prior)
    assert [r["loss"] for r in rows] == pytest.approx(losses, rel=1e-5)  # the scheduler computes in float32
    assert min(losses) > 0
    named = target.named()
    assert len(weights) == len(trained) > 0
    for name, wanted in weights.items():
        assert torch.allclose(named[f"unet.{name}"], wanted, rtol=0, atol=1e-2 * LR), name
