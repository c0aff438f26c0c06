"""Explicit attention against the fused kernels, and the loss of Forget-Me-Not written a second time from queries and keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unlearners import attention
from unlearners.base import Task
from unlearners.diffusion import Cond
from unlearners.methods.fmn import FMN
from unlearners.targets.stable_diffusion import StableDiffusion

LAYOUTS: list[dict[str, Any]] = [{}, {"xl": True}, {"prediction": "v_prediction"}]
SEED, LR = 7, 1e-3


@pytest.mark.parametrize("layout", LAYOUTS, ids=["sd", "xl", "v"])
@torch.no_grad()
def test_explicit_attention_gives_the_fused_output(layout: dict[str, Any]) -> None:
    target = StableDiffusion.tiny(**layout)
    x, c = torch.randn(3, *target.latent_shape), target.encode(["zq", "a zq sky", ""])
    fused = target.eps(x, 400, c)
    with attention.explicit(target.modules["unet"]) as seen:
        plain = target.eps(x, 400, c)
    assert torch.allclose(plain, fused, rtol=0, atol=1e-5)
    assert len(seen) == len([n for n, _ in target.modules["unet"].named_modules() if n.endswith("attn2")]) > 0
    for p in seen.values():
        assert p.shape[0] == 3 and p.shape[-1] == 24
        assert torch.allclose(p.sum(-1), torch.ones(()), atol=1e-5)


def naive(target: Any, x_t: Tensor, t: Tensor, cond: Cond, where: list[list[int]]) -> Tensor:
    """|| A || from what goes into the projections: one layer, picture, head, pixel and position after the other."""
    inputs: list[tuple[Any, Tensor, Tensor]] = []
    layers = [m for n, m in target.modules["unet"].named_modules() if n.endswith("attn2")]
    hooks = [
        m.register_forward_pre_hook(lambda m, a, k: inputs.append((m, a[0], k["encoder_hidden_states"])), with_kwargs=True) for m in layers
    ]
    target.eps(x_t, t, cond)
    for hook in hooks:
        hook.remove()
    total = torch.zeros((), dtype=torch.float64)
    for layer, pixels, text in inputs:
        d = layer.to_q.out_features // layer.heads
        for b, positions in enumerate(where):
            q, k = layer.to_q(pixels[b]), layer.to_k(text[b])
            for h in range(layer.heads):
                part = slice(h * d, (h + 1) * d)
                e = (q[:, part] @ k[:, part].T / d**0.5).exp()  # (pixels, L)
                for i in positions:
                    total = total + ((e[:, i] / e.sum(1)) ** 2).sum()
    return total.sqrt()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["sd", "xl", "v"])
def test_the_norm_of_a_batch_whose_rows_differ_in_positions(layout: dict[str, Any]) -> None:
    target = StableDiffusion.tiny(seed=2, **layout)
    x, t, c = torch.randn(3, *target.latent_shape), torch.tensor([5, 300, 900]), target.encode(["zq", "a zq sky", "b"])
    where = [[1, 2, 3], [2], [1, 5, 9, 23]]
    mask = torch.zeros(3, 24, dtype=torch.bool)
    for row, positions in enumerate(where):
        mask[row, positions] = True
    with attention.explicit(target.modules["unet"]) as seen:
        target.eps(x, t, c)
    assert attention.at(seen, mask).norm().item() == pytest.approx(naive(target, x, t, c, where).item(), rel=1e-5)


def test_one_update_is_the_papers() -> None:
    """Without inversion, on a zero latent: the loss, and AdamW's first step with clipping."""
    target, copy = StableDiffusion.tiny(seed=4), StableDiffusion.tiny(seed=4)
    for model in (target, copy):
        for module in model.modules.values():
            module.double()
    rows: list[dict[str, float]] = []
    method = FMN(params="xattn", inversion=False, pictures=0, steps=1, lr=LR, weight_decay=0.1, clip=0.01)
    method(target, Task(name="t", kind="object", concepts=("zq",)), seed=SEED, log=rows.append)

    torch.manual_seed(SEED)
    torch.randn(1, 4, 16)  # the unused embeddings' start
    torch.randint(1, (1,))  # which prompt: there is one
    torch.randint(1, (1,))  # which latent
    t = torch.randint(1000, (1,))
    a = copy.scheduler.alphas_cumprod[t].double()
    x_t = (1 - a).sqrt() * torch.randn(1, 4, 8, 8).double()
    w = {n: p.requires_grad_() for n, p in copy.select("xattn").items()}
    said = "a photo of zq"  # one token a letter: a, photo, of, then z and q at 9 and 10, and the end
    assert copy.tokens([said])[0].tolist()[11:13] == [copy.tokenizers[0].eos_token_id] * 2
    loss = naive(copy, x_t, t, copy.encode([said]), [[9, 10, 11]])
    slopes = torch.autograd.grad(loss, list(w.values()), allow_unused=True)
    assert rows[0] == pytest.approx({"stage": 2, "loss": loss.item(), "attention": rows[0]["attention"]}, rel=1e-6)
    size = torch.cat([g.flatten() for g in slopes if g is not None]).norm()
    assert size > 0.01  # it is clipped
    named, moved = target.named(), 0
    for (name, p), g in zip(w.items(), slopes, strict=True):
        if g is None:  # values and outputs of the last layer come after all the attention
            assert torch.equal(named[name], p)
            continue
        g = g * 0.01 / (size + 1e-6)
        wanted = p * (1 - 0.1 * LR) - LR * g / (g.abs() + 1e-8)
        assert torch.allclose(named[name], wanted, rtol=0, atol=1e-3 * LR), name
        moved += 1
    assert moved > 0
