"""P4D and PEZ against their loops written a second time: one prompt, float64, AdamW by hand, cosines one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from unlearners.attacks import _search, p4d, pez
from unlearners.attacks._search import stream
from unlearners.attacks.p4d import P4D
from unlearners.attacks.pez import PEZ
from unlearners.base import Adversarial, Item, Task
from unlearners.diffusion import Soft
from unlearners.judges._clip import load_clip
from unlearners.targets.stable_diffusion import StableDiffusion

SEED, LR, DECAY, STEPS = 7, 0.1, 0.1, 3
TASK = Task(name="t", concepts=("house",))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        yield


def adamw(z: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    z = z * (1 - LR * DECAY)
    return z - LR * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8), m, v


def closest(z: Tensor, E: Tensor) -> list[int]:
    return [max(range(len(E)), key=lambda i: float(row @ E[i] / row.norm() / E[i].norm())) for row in z]


def spied(monkeypatch: pytest.MonkeyPatch, module: object) -> list[Tensor]:
    """Every z that ``module`` projects."""
    seen: list[Tensor] = []
    project = _search.nearest

    def look(z: Tensor, E: Tensor, metric: object) -> Tensor:
        seen.append(z.clone())
        return project(z, E, metric)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "nearest", look)
    return seen


def refuse(given: Mapping[int, Adversarial]) -> set[int]:
    return set()


@pytest.mark.parametrize("variant", ["n", "k"])
def test_p4d_equals_the_naive_loop(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    victim, original = StableDiffusion.tiny(seed=4), StableDiffusion.tiny(seed=5)
    for module in (*victim.modules.values(), *original.modules.values(), victim.vae):
        module.double()
    victim.original = lambda: original
    item = Item(prompt="a house", seed=1, picture=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    seen = spied(monkeypatch, p4d)
    attack = P4D(variant=variant, n=3, k=2, iterations=STEPS, check=STEPS, lr=LR, weight_decay=DECAY)  # type: ignore[arg-type]
    (row,) = attack.run(victim, TASK, [item], refuse)

    g, tokenizer = stream(item), victim.tokenizers[0]
    table = victim.embed().detach()
    usual = [i for i in range(len(tokenizer)) if i not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    E = table[usual]
    own = tokenizer("a house", add_special_tokens=False)["input_ids"]
    body: list[int | None] = [None] * 3
    if variant == "k":
        body = []
        for i, token in enumerate(own):
            body += [None, token] if i % 2 == 0 else [token]
    free = [i for i, token in enumerate(body) if token is None]
    z = E[torch.randint(len(E), (len(free),), generator=g)]
    m, v, total = torch.zeros_like(z), torch.zeros_like(z), 0.0
    x_0 = victim.latents(item.picture)  # type: ignore[arg-type]
    for step in range(1, STEPS + 1):
        assert torch.allclose(seen[step - 1][0], z, atol=1e-9)
        chosen = closest(z, E)
        filled = list(body)
        for place, c in zip(free, chosen, strict=True):
            filled[place] = usual[c]
        ids = [tokenizer.bos_token_id, *filled, tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (24 - len(ids))
        t = int(torch.randint(0, 1000, (1,), generator=g))
        noise = torch.randn(x_0.shape[1:], generator=g)[None].double()
        a = victim.scheduler.alphas_cumprod[t].double()
        x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
        e = E[chosen].clone().requires_grad_()
        spread = table[torch.tensor(ids)][None].clone()
        for n, place in enumerate(free):
            spread = torch.cat([spread[:, : 1 + place], e[None, n : n + 1], spread[:, 2 + place :]], 1)
        cond = victim.encode(torch.tensor([ids]), Soft(spread, 0))
        with torch.no_grad():
            goal = original.eps(x_t, t, original.encode(["a house"]))
        loss = torch.nn.functional.mse_loss(victim.eps(x_t, t, cond), goal)
        (grad,) = torch.autograd.grad(loss, e)
        z, m, v = adamw(z, grad, m, v, step)
        total += loss.item() / STEPS
    assert torch.allclose(seen[STEPS][0], z, atol=1e-9) and row["loss"] == pytest.approx(total, rel=1e-5)
    assert (seen[STEPS][0] - seen[0][0]).abs().max() > LR, "the search moved"


def test_pez_equals_the_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_clip("canvas")
    model = deepcopy(model).cpu().double()
    monkeypatch.setattr(pez, "load_clip", lambda name: (model, processor))
    item = Item(prompt="a house", seed=1, picture=torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    seen = spied(monkeypatch, pez)
    attack = PEZ(k=3, iterations=STEPS, lr=LR, weight_decay=DECAY, clip="canvas")
    found: list[str | None] = []

    def hit(given: Mapping[int, Adversarial]) -> set[int]:
        found.extend(a.prompt for a in given.values())
        return set()

    (row,) = attack.run(SimpleNamespace(latent_shape=(4, 16, 16)), TASK, [item], hit)  # type: ignore[arg-type]

    tokenizer, layer = processor.tokenizer, model.text_model.embeddings.token_embedding
    usual = [i for i in range(len(tokenizer)) if i not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    E, length = layer.weight.detach()[usual], model.config.text_config.max_position_embeddings
    image = pez.embed_images("canvas", item.picture).double()[0]  # type: ignore[arg-type]
    z = E[torch.randint(len(E), (3,), generator=stream(item))]
    m, v, best, text = torch.zeros_like(z), torch.zeros_like(z), -1.0, ""
    for step in range(1, STEPS + 1):
        assert torch.allclose(seen[step - 1][0], z, atol=1e-9)
        chosen = closest(z, E)
        ids = [tokenizer.bos_token_id, *(usual[c] for c in chosen), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (length - len(ids))
        e = E[chosen].clone().requires_grad_()
        states = torch.cat([layer.weight.detach()[ids[:1]], e, layer.weight.detach()[ids[4:]]])[None]
        with monkeypatch.context() as patched:
            patched.setattr(layer, "forward", lambda _ids, states=states: states)
            out = model.text_projection(model.text_model(input_ids=torch.tensor([ids])).pooler_output)[0]
        cosine = out @ image / out.norm() / image.norm()
        if cosine.item() > best:
            best, text = cosine.item(), tokenizer.decode([usual[c] for c in chosen]).strip()
        (grad,) = torch.autograd.grad(1 - cosine, e)
        z, m, v = adamw(z, grad, m, v, step)
    assert found == [text] and row["cosine"] == pytest.approx(best, abs=1e-6)
    assert (z - seen[0][0]).abs().max() > LR, "the search moved"
