"""FMN: pictures, pseudo-tokens, positions, what is starved and what comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearners import attention, session
from unlearners.base import Task
from unlearners.errors import UsageError
from unlearners.inversion import Inversion, find
from unlearners.methods.fmn import FMN, names

TASK = Task(name="t", kind="object", concepts=("zq",))
TWO = Task(name="t", kind="object", concepts=("zq", "b c"), preserve=("d",))
QUICK: dict[str, Any] = {"steps": 3, "iterations": 3, "pictures": 2, "lr": 1e-3}


def ids_where(target: Any, method: FMN, task: Task, prompt: str) -> list[int]:
    return method.positions(target, task, prompt, []).nonzero().flatten().tolist()


# --- attention ----------------------------------------------------------------------------------------------------
def test_processors_come_back_even_after_an_error(sd: Callable[..., Any]) -> None:
    unet = sd().modules["unet"]
    before = dict(unet.attn_processors)
    with attention.explicit(unet):
        assert {n for n, p in unet.attn_processors.items() if p is not before[n]} == {n for n in before if ".attn2." in n}
    assert unet.attn_processors == before
    with pytest.raises(ZeroDivisionError), attention.explicit(unet):
        _ = 1 / 0
    assert unet.attn_processors == before


def test_the_probabilities_are_differentiable_and_of_the_latest_pass(sd: Callable[..., Any]) -> None:
    target = sd()
    x, c = torch.randn(1, *target.latent_shape), target.encode(["zq"])
    with attention.explicit(target.modules["unet"]) as seen:
        target.eps(x, 1, c)
        first = dict(seen)
        states = c.states.clone().requires_grad_()
        target.eps(x, 900, type(c)(states))
    assert first.keys() == seen.keys()
    assert all(not torch.equal(first[n], seen[n]) for n in seen)
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[0, 1] = True
    (slope,) = torch.autograd.grad(attention.at(seen, mask).norm(), states)
    assert slope.abs().sum() > 0


# --- inversion ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", [{}, {"xl": True}, {"prediction": "v_prediction"}], ids=["sd", "xl", "v"])
def test_pseudo_tokens_learn_and_nothing_else_moves(sd: Callable[..., Any], layout: dict[str, Any]) -> None:
    target, fresh = sd(**layout), sd(**layout)
    target.trainable("full")
    torch.manual_seed(0)
    ti = Inversion(target, ["zq", "b"], k=3, lr=0.05, weight_decay=0.0, norm=0.0)
    assert [e.shape for e in ti.e] == [(2, 3, 16)] * (2 if layout.get("xl") else 1)
    table = target.embed()
    assert torch.equal(ti.e[0][0, :2].detach(), table[target.tokens(["zq"])[0, 1:3]])  # the name's tokens, then noise
    x, who = torch.randn(2, *target.latent_shape), torch.tensor([0, 1])

    def error() -> float:
        torch.manual_seed(1)
        noise, t = torch.randn(x.shape), torch.tensor([500, 700])
        with torch.no_grad():
            out = target.eps(target.add_noise(x, noise, t), t, ti.encode(who)) - target.goal(x, noise, t)
        return float(out.square().mean())

    start = error()
    for _ in range(30):
        ti.step(x, who)
    assert error() < start
    assert all(p.grad is None and torch.equal(p, fresh.named()[n]) for n, p in target.named().items())


def test_each_concept_is_inverted_as_it_would_be_alone(sd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = sd()
    both, alone = Inversion(target, ["zq", "b"], k=2), Inversion(target, ["zq"], k=2)
    alone.e[0].data.copy_(both.e[0].data[:1])
    x = torch.randn(3, *target.latent_shape)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.ones(x.shape))
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.full(size, 400))
    both.step(x, torch.tensor([0, 1, 1]))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.ones(1, *x.shape[1:]))
    alone.step(x[:1], torch.tensor([0]))
    assert torch.allclose(both.e[0][:1], alone.e[0], atol=1e-5)


def test_lengths_go_to_the_norm_and_the_rate_warms_up(sd: Callable[..., Any]) -> None:
    target = sd()
    ti = Inversion(target, ["zq"], k=2, lr=1e-2, warmup=4, norm=0.4)
    x, who = torch.randn(1, *target.latent_shape), torch.tensor([0])
    rates = []
    for _ in range(6):
        ti.step(x, who)
        rates.append(ti.opt.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert ti.length() == pytest.approx(0.4, abs=1e-5)  # at lr 0.01 the share is 1


# --- positions ----------------------------------------------------------------------------------------------------
def test_positions(sd: Callable[..., Any]) -> None:
    target = sd()
    assert find(target, "a zq b zq", "zq") == [2, 3, 5, 6]
    assert ids_where(target, FMN(), TASK, "a zq b") == [2, 3, 5]
    assert ids_where(target, FMN(pooler="off"), TASK, "a zq b") == [2, 3]
    assert ids_where(target, FMN(pooler="padding"), TASK, "a zq b") == [2, 3, *range(5, 24)]
    assert ids_where(target, FMN(pooler="off"), TASK, "by m") == [1, 2, 3]  # it names nothing: the whole of it
    with pytest.raises(UsageError, match="shorten"):
        find(target, "a b c d e f g h i j k l m n o p q r s t u v w zq", "zq")
    with pytest.raises(UsageError, match="write the concept in words"):
        find(target, "a", " ")


def test_the_concept_that_a_prompt_names() -> None:
    task = Task(name="t", concepts=("cat", "catfish", "cat show"))
    assert [names(task, p) for p in ("a Cat", "a catfish", "the cat show", "a dog")] == [0, 1, 2, 0]


def test_the_prompt_with_pseudo_tokens(sd: Callable[..., Any]) -> None:
    target = sd()
    ti = Inversion(target, ["zq"], template="by {} b", k=3)
    assert ti.prompt == "by x x x b" and ti.slots == [3, 4, 5]
    assert Inversion(target, ["zq"], template="by{}b", k=3).prompt == ti.prompt
    assert target.tokens([ti.prompt])[0, 3:6].unique().numel() == 1
    Inversion(target, ["zq"], template="{}", k=22)
    with pytest.raises(UsageError, match="lower k"):
        Inversion(target, ["zq"], template="{}", k=23)


# --- the method ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", [{}, {"xl": True}, {"prediction": "v_prediction"}], ids=["sd", "xl", "v"])
def test_several_concepts_on_every_layout(sd: Callable[..., Any], layout: dict[str, Any]) -> None:
    target, fresh = sd(**layout), sd(**layout)
    rows: list[dict[str, float]] = []
    before = dict(target.modules["unet"].attn_processors)
    FMN(**QUICK, batch=3, params="xattn", keep=1.0, keep_pictures=2)(target, TWO, log=rows.append)
    moved = {n for n, p in target.named().items() if not torch.equal(p, fresh.named()[n])}
    assert moved and all(".attn2." in n for n in moved)
    assert [r["stage"] for r in rows] == [1, 1, 1, 2, 2, 2]
    assert rows[3]["kept"] == pytest.approx(0, abs=1e-10) and rows[5]["kept"] > 0
    assert target.modules["unet"].attn_processors == before


def test_training_starves_the_concept_s_tokens(sd: Callable[..., Any]) -> None:
    rows: list[dict[str, float]] = []
    FMN(inversion=False, pictures=0, steps=40, lr=1e-2, params="xattn")(sd(), TASK, log=rows.append)
    assert {r["stage"] for r in rows} == {2}
    assert sum(r["attention"] for r in rows[-5:]) < 0.5 * sum(r["attention"] for r in rows[:5])


def test_keep_holds_what_is_to_stay(sd: Callable[..., Any]) -> None:
    kept = {}
    for keep in (1e-6, 1e4):
        rows: list[dict[str, float]] = []
        FMN(inversion=False, pictures=0, steps=20, lr=1e-2, keep=keep, keep_pictures=2)(sd(), TWO, log=rows.append)
        kept[keep] = rows[-1]["kept"]
    assert kept[1e4] < 0.5 * kept[1e-6]


@pytest.mark.parametrize("stop", [2, 4])
def test_killed_in_either_stage_it_resumes(sd: Callable[..., Any], stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", 0.0)
    whole, killed, resumed = sd(), sd(), sd()
    method = FMN(**QUICK, batch=2)
    rows: list[dict[str, float]] = []
    method(whole, TWO, seed=5, log=rows.append)
    seen: list[dict[str, float]] = []

    def die(row: dict[str, float]) -> None:
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(row)

    killed.session = session.FolderSession(tmp_path, None)
    with pytest.raises(KeyboardInterrupt):
        method(killed, TWO, seed=5, log=die)
    resumed.session = session.FolderSession(tmp_path, None)
    after: list[dict[str, float]] = []
    method(resumed, TWO, seed=5, log=after.append)
    assert after == rows[stop:]
    assert all(torch.equal(p, resumed.named()[n]) for n, p in whole.named().items())


def test_refusals(sd: Callable[..., Any]) -> None:
    for wrong in ({"steps": 0}, {"batch": 0}, {"k": 0}, {"pictures": -1}, {"keep": -1.0}, {"pictures": 0}, {"template": "a photo"}):
        with pytest.raises(UsageError):
            FMN(**wrong)
    with pytest.raises(UsageError, match="use params full or xattn"):
        FMN(inversion=False, pictures=0, steps=1, params=r"unet\.conv_out")(sd(), TASK)
