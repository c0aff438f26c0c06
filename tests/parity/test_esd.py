"""One update of ESD written a second time with the bare modules: DDIM, guidance, the paper's target, Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unlearners.base import Task
from unlearners.methods.esd import ESD
from unlearners.targets.stable_diffusion import StableDiffusion

SEED, S, LR, ETA, GUIDANCE = 11, 5, 1e-3, 1.7, 3.0


def step(pipe: Any, said: str, trained: list[str]) -> tuple[float, dict[str, Tensor]]:
    """The loss and the weights after one update of the UNet's weights ``trained``, as the paper and its 2023 code have it."""
    unet, acp = pipe.unet, pipe.scheduler.alphas_cumprod.double()

    def text(prompt: str) -> Tensor:
        ids = pipe.tokenizer([prompt], padding="max_length", max_length=24, return_tensors="pt").input_ids
        states: Tensor = pipe.text_encoder(ids)[0]
        return states

    def eps(x: Tensor, t: int, c: Tensor) -> Tensor:
        out: Tensor = unet(x, torch.tensor([t]), encoder_hidden_states=c).sample
        return out

    torch.manual_seed(SEED)
    torch.randint(1, (1,))  # which prompt: there is one
    stop = int(torch.randint(S, ()))
    x = torch.randn(1, 4, 8, 8).double()
    stride = 1000 // S
    times = [1 + stride * i for i in reversed(range(S))]
    with torch.no_grad():
        c, null = text(said), text("")
        for t in times[:stop]:
            e = eps(x, t, null) + GUIDANCE * (eps(x, t, c) - eps(x, t, null))
            a, b = acp[t], acp[t - stride] if t >= stride else acp[0]
            x_0 = (x - (1 - a).sqrt() * e) / a.sqrt()
            x = b.sqrt() * x_0 + (1 - b).sqrt() * e
        t = min(max(times[stop] + int(torch.randint(stride, (1,))) - stride // 2, 0), 999)  # within half a step around x_t's own time
        e_0, e_c = eps(x, t, null), eps(x, t, c)
    weights = {n: p for n, p in unet.named_parameters() if n in trained}
    for p in weights.values():
        p.requires_grad_()
    wanted = e_0 - ETA * (e_c - e_0)
    loss = ((eps(x, t, c) - wanted) ** 2).mean()
    slopes = torch.autograd.grad(loss, list(weights.values()))
    # Adam's first step: both moments, corrected for their start, are g and g^2
    return loss.item(), {n: (p - LR * g / (g.square().sqrt() + 1e-8)).detach() for (n, p), g in zip(weights.items(), slopes, strict=True)}


@pytest.mark.parametrize(("params", "part"), [("xattn", "attn2"), ("selfattn", "attn1")])
def test_one_update_is_the_papers(params: str, part: str) -> None:
    target, copy = StableDiffusion.tiny(seed=4), StableDiffusion.tiny(seed=4)
    for model in (target, copy):
        for module in model.modules.values():
            module.double()
    rows: list[dict[str, float]] = []
    method = ESD(params=params, steps=1, lr=LR, eta=ETA, guidance=GUIDANCE, sampler_steps=S)
    method(target, Task(name="t", concepts=("zq",)), seed=SEED, log=rows.append)
    trained = [n for n, _ in copy.pipe.unet.named_parameters() if f".{part}." in n]
    loss, weights = step(copy.pipe, "zq", trained)
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-5)  # the scheduler computes in float32
    assert loss > 0
    named = target.named()
    assert len(weights) == len(trained) > 0
    for name, wanted in weights.items():
        assert torch.allclose(named[f"unet.{name}"], wanted, rtol=0, atol=1e-3 * LR), name
