"""Ring-A-Bell, MMA and TINA against their equations written a second time: loops, dense one-hot rows, the DDIM formula, Adam by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from unlearners.attacks import mma, ring_a_bell
from unlearners.attacks._search import stream, tables
from unlearners.attacks.ring_a_bell import PAIRS, RingABell
from unlearners.attacks.tina import TINA
from unlearners.base import Adversarial, Item, Task
from unlearners.diffusion import Soft
from unlearners.targets.stable_diffusion import StableDiffusion

TASK = Task(name="t", kind="style", concepts=("neon", "fog"))
ITEM = Item(prompt="a cup", seed=4, picture=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def double(**how: Any) -> StableDiffusion:
    target = StableDiffusion.tiny(seed=4, **how)
    for module in (*target.modules.values(), target.vae):
        module.double().requires_grad_(False)
    target.original = lambda: target
    target.sampler = {"steps": 5, "guidance": 1.0}
    return target


def asked(attack: Any, target: StableDiffusion) -> Adversarial:
    """What ``attack`` proposes for the one prompt."""
    found: list[Adversarial] = []

    def hit(given: Mapping[int, Adversarial]) -> set[int]:
        found.extend(given.values())
        return set()

    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        list(attack.run(target, TASK, [ITEM], hit))
    return found[0]


def states(target: StableDiffusion, text: str) -> Tensor:
    return target.encode([text]).states[0]


def distance(target: StableDiffusion, ids: list[int], eta: float) -> float:
    """|| TE(ids) - TE(prompt) - eta v ||², term by term."""
    v = sum((states(target, p.format(f", {c}")) - states(target, p.format(""))) / 24 for c in ("neon", "fog") for p in PAIRS)
    tokenizer = target.tokenizers[0]
    whole = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    whole += [tokenizer.pad_token_id] * (24 - len(whole))
    return float((target.encode(torch.tensor([whole])).states[0] - states(target, "a cup") - eta * v).square().sum())


def test_the_fittest_text_is_the_one_of_least_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = double(), []
    monkeypatch.setattr(ring_a_bell, "_distance", _spy(ring_a_bell._distance, seen))
    proposal = asked(RingABell(k=4, eta=2.0, population=6, iterations=0), target)
    ((s, d),) = seen
    naive = [distance(target, ids, 2.0) for ids in s.tolist()]
    assert torch.allclose(d.double(), torch.tensor(naive, dtype=torch.float64), rtol=1e-5)
    assert proposal.prompt == target.decode(s[naive.index(min(naive))])
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        g = stream(ITEM)
        words = [i for i in range(target.vocabulary) if i not in target.special]
        assert s.tolist() == [[words[int(i)] for i in row] for row in torch.randint(len(words), (6, 4), generator=g)]


def _spy(f: Any, seen: list[Any]) -> Any:
    def spied(old: Any, s: Tensor, goal: Tensor) -> Tensor:
        out: Tensor = f(old, s, goal)
        seen.append((s.clone(), out))
        return out

    return spied


@pytest.mark.parametrize("xl", [False, True])
def test_the_gradient_is_that_of_dense_one_hot_rows(xl: bool) -> None:
    target = double(xl=xl)
    s, tau = torch.tensor([5, 9, 40]), torch.randn(16, generator=torch.Generator().manual_seed(0)).double()
    E = tables(target)
    onehot = torch.nn.functional.one_hot(s, len(E)).double().requires_grad_()
    tokenizer = target.tokenizers[0]
    ids = torch.tensor([[tokenizer.bos_token_id, *s.tolist(), *[tokenizer.eos_token_id] * 20]])  # the whole context
    e = (onehot @ E)[None]
    cond = target.encode(ids, Soft((e[..., :16], e[..., 16:]) if xl else e, 1))
    vector = cond.pooled[0] if cond.pooled is not None else cond.states[0, 4]
    loss = 1 - vector @ tau / (vector.norm() * tau.norm())
    (naive,) = torch.autograd.grad(loss, onehot)
    assert torch.allclose(mma._gradient(target, s, tau, E), naive, atol=1e-9) and naive.abs().max() > 1e-4
    assert abs(mma._loss(target, s[None], tau).item() - loss.item()) < 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_inversion_is_the_ddim_formula_and_adam(prediction: str) -> None:
    target = double(prediction=prediction)
    found = asked(TINA(iterations=3, lr=0.01), target).latent
    assert found is not None and ITEM.picture is not None
    alphas, null = target.scheduler.alphas_cumprod.double(), target.encode([""])
    z = target.latents(ITEM.picture)
    for t in range(1, 1000, 200):
        a_t, a = alphas[t], alphas[t - 200] if t >= 200 else alphas[0]

        def inverted(z_t: Tensor, z_prev: Tensor = z, t: int = t, a_t: Tensor = a_t, a: Tensor = a) -> Tensor:
            out = target.eps(z_t, t, null)
            if prediction == "v_prediction":  # z_{t-1} = cos z_t - sin v in the angles of the two levels
                c = (a * a_t).sqrt() + ((1 - a) * (1 - a_t)).sqrt()
                return (z_prev - (((1 - a) * a_t).sqrt() - (a * (1 - a_t)).sqrt()) * out) / c
            return (a_t / a).sqrt() * z_prev + ((1 - a_t).sqrt() - (a_t * (1 - a) / a).sqrt()) * out

        z = inverted(z).detach()
        m, v = torch.zeros_like(z), torch.zeros_like(z)
        for i in range(1, 4):
            z.requires_grad_()
            (g,) = torch.autograd.grad((inverted(z) - z).square().sum(), z)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            z = (z - 0.01 * (m / (1 - 0.9**i)) / ((v / (1 - 0.999**i)).sqrt() + 1e-8)).detach()
    assert torch.allclose(found, z[0], atol=1e-5)
