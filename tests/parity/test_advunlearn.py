"""AdvUnlearn's loop written a second time, naively, with the bare modules in float64: no pool, one prompt and one state at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unlearners.base import Task
from unlearners.methods.advunlearn import AdvUnlearn
from unlearners.targets.stable_diffusion import StableDiffusion

SEED, S, M, LR, ALPHA, K, WARMUP, N, ETA, GAMMA, GUIDANCE = 5, 4, 2, 1e-2, 1e-2, 3, 1, 5, 1.3, 0.7, 3.0
LINES = ["ab", "a cd", "ef gh"]
KEPT = ["", *LINES]


class Naive:
    """The models, the sampler and the loop, one tensor after another."""

    def __init__(self, pipe: Any, prediction: str, attack: str, place: str) -> None:
        self.unet, self.text, self.tokenizer = pipe.unet, pipe.text_encoder, pipe.tokenizer
        self.acp = pipe.scheduler.alphas_cumprod.double()
        self.v, self.attack, self.place = prediction == "v_prediction", attack, place
        self.E = self.text.get_input_embeddings().weight.detach().clone()

    def ids(self, prompt: str) -> list[int]:
        """Token ids without start, end and padding."""
        found: list[int] = self.tokenizer(prompt).input_ids[1:-1]
        return found

    def states(self, tokens: list[int], delta: Tensor | None = None, slot: int = 1) -> Tensor:
        """Text states (1, 24, d) of [start, tokens, end, end ...], with the one embedding ``delta`` (1, d) in ``slot``."""
        first, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        row = [first, *tokens] + [end] * (23 - len(tokens))

        def swap(_m: Any, _i: Any, out: Tensor) -> Tensor:
            return out if delta is None else torch.cat([out[:, :slot], delta[None], out[:, slot + 1 :]], 1)

        handle = self.text.get_input_embeddings().register_forward_hook(swap)
        out: Tensor = self.text(torch.tensor([row]))[0]
        handle.remove()
        return out

    def adversarial(self, tokens: list[int], delta: Tensor) -> Tensor:
        n, room = len(tokens), [0]
        if self.place == "prefix":
            return self.states(room + tokens, delta, 1)
        if self.place == "suffix":
            return self.states(tokens + room, delta, 1 + n)
        return self.states(room, delta, 1)  # replace

    def eps(self, x: Tensor, t: int, c: Tensor) -> Tensor:
        out: Tensor = self.unet(x, torch.tensor([t]), encoder_hidden_states=c).sample
        return out

    @torch.no_grad()
    def state(self, c: Tensor, null: Tensor, trajectory: int, step: int) -> tuple[Tensor, int, Tensor, Tensor]:
        """x_t, t, e_c and e_0 before ``step`` of a trajectory, sampled from scratch."""
        g = torch.Generator().manual_seed(SEED + 1_000_003 * trajectory)
        x = torch.randn(4, 8, 8, generator=g)[None].double()
        stride = 1000 // S
        times = [1 + stride * i for i in reversed(range(S))]
        for t in times[:step]:
            e_0, e_c = self.eps(x, t, null), self.eps(x, t, c)
            out = e_0 + GUIDANCE * (e_c - e_0)
            a, b = self.acp[t], self.acp[t - stride] if t >= stride else self.acp[0]
            x_0 = a.sqrt() * x - (1 - a).sqrt() * out if self.v else (x - (1 - a).sqrt() * out) / a.sqrt()
            e = a.sqrt() * out + (1 - a).sqrt() * x if self.v else out
            x = b.sqrt() * x_0 + (1 - b).sqrt() * e
        t = times[step]
        return x, t, self.eps(x, t, c), self.eps(x, t, null)

    def run(self, concept: str) -> list[dict[str, float]]:
        tokens = self.ids(concept)
        with torch.no_grad():
            null, c = self.states([]), self.states(tokens)
            others = [self.states(self.ids(p)) for p in KEPT]
        theta = [p for n, p in self.text.named_parameters() if ".layers." in n or "final_layer_norm" in n]
        for p in theta:
            p.requires_grad_()
        adam = torch.optim.Adam(theta, lr=LR)
        rows: list[dict[str, float]] = []
        left: list[int] = []
        torch.manual_seed(SEED)
        for i in range(N):
            torch.randint(1, ())  # which concept: there is one
            row: dict[str, float] = {}
            delta = None
            if i >= WARMUP:
                delta = self.E[torch.randint(len(self.tokenizer), (1, 1))[0]].clone().requires_grad_()
                mover = torch.optim.Adam([delta], lr=ALPHA)
                for _ in range(K):
                    u = int(torch.rand(1, dtype=torch.float64) * M * S)
                    x, t, e_c, _ = self.state(c, null, u // S, u % S)
                    loss = ((self.eps(x, t, self.adversarial(tokens, delta)) - e_c) ** 2).mean()
                    mover.zero_grad()
                    delta.grad = torch.autograd.grad(loss, delta)[0]
                    if self.attack == "adam":
                        mover.step()
                    else:
                        delta.data -= ALPHA * delta.grad.sign()
                row["attack"] = loss.item()
                delta = delta.detach()
            while len(left) < 2:
                left += torch.randperm(len(KEPT)).tolist()
            dealt, left = left[:2], left[2:]
            luck = torch.rand(3, dtype=torch.float64).tolist()
            at = int(luck[0] * M * S)
            x, t, e_c, e_0 = self.state(c, null, at // S, at % S)
            student = self.states(tokens) if delta is None else self.adversarial(tokens, delta)
            erase = ((self.eps(x, t, student) - (e_0 - ETA * (e_c - e_0))) ** 2).mean()
            keep = torch.zeros(())
            for p, v in zip(dealt, luck[1:], strict=True):
                x, t, e_p, _ = self.state(others[p], null, M + p, int(v * S))
                keep = keep + ((self.eps(x, t, self.states(self.ids(KEPT[p]))) - e_p) ** 2).mean() / 2
            loss = erase + GAMMA * keep
            adam.zero_grad()
            loss.backward()
            adam.step()
            rows.append({"loss": loss.item(), "erase": erase.item(), "retain": keep.item(), **row})
        return rows


@pytest.fixture
def listed(tmp_path: Path) -> str:
    path = tmp_path / "kept.txt"
    path.write_text("\n".join(LINES))
    return str(path)


@pytest.mark.parametrize(
    ("prediction", "attack", "place"),
    [("epsilon", "adam", "prefix"), ("epsilon", "pgd", "suffix"), ("v_prediction", "adam", "replace")],
)
def test_the_loss_curve_is_that_of_the_plain_loop(sd: Callable[..., Any], listed: str, prediction: str, attack: Any, place: Any) -> None:
    ours, copy = sd(seed=4, prediction=prediction), StableDiffusion.tiny(seed=4, prediction=prediction)
    for model in (ours, copy):
        for module in model.modules.values():
            module.double()
    rows: list[dict[str, float]] = []
    method = AdvUnlearn(
        steps=N, lr=LR, eta=ETA, gamma=GAMMA, retain_batch=2, retain_set=listed, nearest=0.0, null_share="listed",
        attack=attack, attack_steps=K, attack_lr=ALPHA, place=place, warmup=WARMUP, guidance=GUIDANCE, sampler_steps=S, trajectories=M,
    )  # fmt: skip
    method(ours, Task(name="t", concepts=("zq",)), seed=SEED, log=rows.append)
    wanted = Naive(copy.pipe, prediction, attack, place).run("zq")
    for row, plain in zip(rows, wanted, strict=True):
        for name, value in plain.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-12), name  # the scheduler and delta are float32
    assert rows[-1]["retain"] > 0
    named, bare = ours.named(), dict(copy.pipe.text_encoder.named_parameters())
    for name, p in bare.items():
        assert torch.allclose(named[f"text_encoder.{name}"], p, rtol=0, atol=1e-2 * LR), name
