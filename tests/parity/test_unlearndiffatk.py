"""UnlearnDiffAtk against the published loop written a second time: one prompt, dense one-hot rows, Adam by hand, bisection."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from unlearners.attacks import unlearndiffatk
from unlearners.attacks._search import stream
from unlearners.attacks.unlearndiffatk import UnlearnDiffAtk
from unlearners.base import Adversarial, Item, Task
from unlearners.diffusion import Soft
from unlearners.targets.stable_diffusion import StableDiffusion

K = 2
largest: list[float] = []


class StraightThrough(torch.autograd.Function):
    """Forward: the sampled one-hot rows. Backward: the gradient, clipped to [-1, 1], as if the rows were u."""

    @staticmethod
    def forward(ctx: object, u: Tensor, onehot: Tensor) -> Tensor:
        return onehot.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        largest.append(gradient.abs().max().item())
        return torch.nn.functional.hardtanh(gradient), None


def bisect(row: Tensor) -> Tensor:
    low, high = row.min() - 1, row.max()
    for _ in range(100):
        tau = (low + high) / 2
        if (row - tau).clamp(0, 1).sum() > 1:
            low = tau
        else:
            high = tau
    return (row - high).clamp(0, 1)


def double(xl: bool = False) -> StableDiffusion:
    target = StableDiffusion.tiny(seed=4, xl=xl)
    for module in (*target.modules.values(), target.vae):
        module.double()
    return target


def naive(target: StableDiffusion, item: Item, steps: list[tuple[int, int]], seed: int) -> Tensor:
    """u (k, V) after ``steps``, a list of (timestep, iterations)."""
    torch.manual_seed(seed)
    g = stream(item)
    towers = [m for name, m in target.modules.items() if name.startswith("text_encoder")]
    tables = [m.get_input_embeddings().weight.detach() for m in towers]  # type: ignore[operator]
    V = len(target.tokenizers[0])
    u = torch.full((K, V), 1 / V, dtype=torch.float64)
    m, v, step = torch.zeros_like(u), torch.zeros_like(u), 0
    assert item.picture is not None
    z = target.latents(item.picture)
    prompt = [i for i in target.tokens([item.prompt])[0].tolist() if i not in target.special]
    tokenizer = target.tokenizers[0]
    for t, iterations in steps:
        for _ in range(iterations):
            r = torch.rand(K, 1, generator=g)
            chosen = [int((u[i].cumsum(0) <= r[i].double() * u[i].sum()).sum()) for i in range(K)]
            onehot = torch.nn.functional.one_hot(torch.tensor(chosen), V).double()
            variable = u.clone().requires_grad_()
            rows = StraightThrough.apply(variable, onehot)
            e = tuple((rows @ table[:V])[None] for table in tables)
            ids = [tokenizer.bos_token_id, *chosen, *prompt, tokenizer.eos_token_id]
            ids += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))
            noise = torch.randn(z.shape[1:], generator=g)[None].double()
            a = target.scheduler.alphas_cumprod[t].double()
            out = target.eps(a.sqrt() * z + (1 - a).sqrt() * noise, t, target.encode(torch.tensor([ids]), Soft(e)))
            torch.nn.functional.mse_loss(out, noise).backward()
            assert variable.grad is not None
            step += 1
            grad = variable.grad + 0.1 * u
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            u = u - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            u = torch.stack([bisect(row) for row in u])
    return u


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "xl"])
@pytest.mark.parametrize("gain", [1.0, 1e4])
def test_two_iterations_at_two_timesteps_equal_the_naive_loop(monkeypatch: pytest.MonkeyPatch, gain: float, xl: bool) -> None:
    """``gain`` scales the network's output, so that once the gradient stays below the clip and once it does not."""
    target = double(xl)
    eps = target.eps
    monkeypatch.setattr(target, "eps", lambda x, t, cond: gain * eps(x, t, cond))
    for p in target.named().values():
        p.requires_grad_(False)
    item = Item(prompt="a house", seed=1, picture=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    variables: list[Tensor] = []
    project = unlearndiffatk.simplex

    def spied(u: Tensor) -> Tensor:
        variables.append(project(u))
        return variables[-1]

    proposed: list[str | None] = []

    def hit(given: Mapping[int, Adversarial]) -> set[int]:
        proposed.extend(a.prompt for a in given.values())
        return set()

    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        monkeypatch.setattr(unlearndiffatk, "simplex", spied)
        attack = UnlearnDiffAtk(k=K, timesteps=2, iterations=2)
        rows = list(attack.run(target, Task(name="t", concepts=("house",)), [item], hit))
        assert [r["t"] for r in rows] == [250.0, 750.0]
        largest.clear()
        first, last = naive(target, item, [(250, 2)], 7), naive(target, item, [(250, 2), (750, 2)], 7)
    assert len(variables) == 4 and (max(largest) > 1) == (gain > 1)
    assert torch.allclose(variables[1][0], first, atol=1e-5) and torch.allclose(variables[3][0], last, atol=1e-5)
    assert (last - 1 / last.shape[1]).abs().max() > 1e-3, "the search moved"
    assert proposed == [f"{target.decode(u.argmax(-1))} a house".strip() for u in (first, last)]
