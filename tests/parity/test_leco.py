"""LECO written a second time with the bare UNet: the LoRA as a sum of matrices, DDIM, the loss, AdamW; the curves must agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from unlearners import optim
from unlearners.base import Task
from unlearners.methods.leco import LECO
from unlearners.targets.stable_diffusion import StableDiffusion

S, LR, G, GUIDANCE, RANK, ALPHA, DECAY, STEPS = 5, 2e-2, 1.4, 3.0, 4, 1.0, 0.01, 6


def curve(pipe: Any, said: str, factors: dict[str, Tensor], sign: float) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the merged weights after ``STEPS`` updates of ``factors`` (A and B of each weight), from the current random state."""
    unet, acp = pipe.unet, pipe.scheduler.alphas_cumprod.double()
    frozen = {n: p.detach() for n, p in unet.named_parameters()}
    theta = {n: p.clone().requires_grad_() for n, p in factors.items()}
    names = sorted({n.partition(".lora_")[0] for n in theta})

    def merged() -> dict[str, Tensor]:
        scale = ALPHA / RANK
        return {
            f"{n}.weight": frozen[f"{n}.weight"] + scale * theta[f"{n}.lora_B.default.weight"] @ theta[f"{n}.lora_A.default.weight"]
            for n in names
        }

    def text(prompt: str) -> Tensor:
        ids = pipe.tokenizer([prompt], padding="max_length", max_length=24, return_tensors="pt").input_ids
        states: Tensor = pipe.text_encoder(ids)[0].detach()
        return states

    def eps(weights: dict[str, Tensor], x: Tensor, t: int, c: Tensor) -> Tensor:
        out: Tensor = functional_call(unet, weights, (x, torch.tensor([t])), {"encoder_hidden_states": c}).sample
        return out

    c, null = text(said), text("")
    stride = 1000 // S
    times = [1 + stride * i for i in reversed(range(S))]
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in theta.items()}
    losses = []
    for step in range(1, STEPS + 1):
        torch.randint(1, (1,))  # which prompt: there is one
        stop = int(torch.randint(1, S, ()))
        x = torch.randn(1, 4, 8, 8).double()
        with torch.no_grad():
            W = merged()
            for t in times[:stop]:
                e = eps(W, x, t, null) + GUIDANCE * (eps(W, x, t, c) - eps(W, x, t, null))
                a, b = acp[t], acp[t - stride] if t >= stride else acp[0]
                x_0 = (x - (1 - a).sqrt() * e) / a.sqrt()
                x = b.sqrt() * x_0 + (1 - b).sqrt() * e
            t = times[stop]
            e_0, e_c = eps(frozen, x, t, null), eps(frozen, x, t, c)
        loss = ((eps(merged(), x, t, c) - (e_0 + sign * G * (e_c - e_0))) ** 2).mean()
        slopes = torch.autograd.grad(loss, list(theta.values()))
        losses.append(loss.item())
        with torch.no_grad():
            for (n, p), g in zip(theta.items(), slopes, strict=True):
                m, v = moments[n]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.mul_(1 - LR * DECAY).sub_(LR * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    return losses, {n: w.detach() for n, w in merged().items()}


@pytest.mark.parametrize(("action", "sign"), [("erase", -1.0), ("enhance", 1.0)])
def test_the_loss_curve_is_that_of_a_plain_loop(action: str, sign: float, monkeypatch: pytest.MonkeyPatch) -> None:
    target, copy = StableDiffusion.tiny(seed=4), StableDiffusion.tiny(seed=4)
    for model in (target, copy):
        for module in model.modules.values():
            module.double()
    factors: dict[str, Tensor] = {}
    rng: list[Tensor] = []
    make = optim.make

    def begin(*parts: Any, **fields: Any) -> Any:
        """Note where training begins: the factors A and B and the random state."""
        found = {n.removeprefix("unet."): p.detach().clone() for n, p in target.named().items() if p.requires_grad}
        factors.update(found)
        rng.append(torch.get_rng_state())
        return make(*parts, **fields)

    monkeypatch.setattr(optim, "make", begin)
    rows: list[dict[str, float]] = []
    method = LECO(steps=STEPS, lr=LR, g=G, action=action, guidance=GUIDANCE, sampler_steps=S, rank=RANK, alpha=ALPHA)  # type: ignore[arg-type]
    method(target, Task(name="t", concepts=("zq",)), seed=11, log=rows.append)
    assert factors
    assert all(float(p.abs().sum()) == 0 for n, p in factors.items() if ".lora_B." in n)
    torch.set_rng_state(rng[0])
    losses, weights = curve(copy.pipe, "zq", factors, sign)
    assert [r["loss"] for r in rows] == pytest.approx(losses, rel=1e-3)  # the scheduler computes in float32
    assert losses[0] != pytest.approx(losses[-1], rel=1e-2)
    named = target.named()
    for name, wanted in weights.items():
        assert torch.allclose(named[f"unet.{name}"], wanted, rtol=0, atol=2e-3 * LR), name
