"""UCE's closed form: a stationary point of its objective, with the limits the objective has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlearners.base import Task
from unlearners.errors import UsageError
from unlearners.methods.uce import UCE
from unlearners.neighbours import NAMED
from unlearners.targets.stable_diffusion import StableDiffusion

TASK = Task(name="t", kind="style", concepts=("zq",), anchors=("art",), preserve=("ink", "oil"))
FORMS = ("{}", "a {} sky")


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    """A tiny pipeline in float64; tests edit frozen copies of it."""
    return double(StableDiffusion.tiny(seed=7))


def double(target: StableDiffusion) -> StableDiffusion:
    for module in target.modules.values():
        module.double()
    return target


def edit(base: StableDiffusion, task: Task = TASK, **fields: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The new matrices by name, and what was logged."""
    target, rows = base.frozen(), []
    UCE(**({**NAMED, "templates": FORMS} | fields))(target, task, log=rows.append)
    (row,) = rows
    return {n: p.detach() for n, p in target.select("xattn-kv").items()}, row


def old(base: StableDiffusion) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in base.select("xattn-kv").items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-9) -> bool:
    return all(torch.allclose(a[n], b[n], rtol=0, atol=tolerance) for n in a)


def last(prompt: str) -> int:
    """The tiny tokenizer makes each letter a token and drops blanks; the start token is at 0, and so 1 is the end of an empty prompt."""
    return max(1, len(prompt.replace(" ", "")))


def rows_of(base: StableDiffusion, task: Task, tokens: str) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """(concept, guide) pairs and preserved vectors, gathered token by token."""
    pairs, kept = [], []
    for i, concept in enumerate(task.concepts):
        for form in FORMS:
            said, guide = form.format(concept), form.format(task.anchor(i)).strip()
            c, g = base.encode([said]).states[0], base.encode([guide]).states[0]
            at, to = last(said), last(guide)
            while at < len(c) and to < len(g):
                pairs.append((c[at], g[to]))
                at, to = at + 1, to + 1
                if tokens == "last":
                    break
    for prompt in ["", *(f.format(p) for p in task.preserve for f in FORMS)]:
        states = base.encode([prompt]).states[0]
        kept += [states[last(prompt)]] if tokens == "last" else list(states)
    return pairs, kept


def objective(
    W: Tensor, W_old: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], kept: Sequence[Tensor], alpha: float, beta: float, lamb: float
) -> Tensor:
    total = lamb * ((W - W_old) ** 2).sum()
    for c, g in pairs:
        total = total + alpha * ((W @ c - W_old @ g) ** 2).sum()
    for p in kept:
        total = total + beta * ((W @ p - W_old @ p) ** 2).sum()
    return total


scale = st.floats(0.05, 20)


@settings(max_examples=8)
@given(alpha=scale, beta=scale, lamb=scale, tokens=st.sampled_from(["all", "last"]))
def test_the_gradient_of_the_objective_is_zero(base: StableDiffusion, alpha: float, beta: float, lamb: float, tokens: str) -> None:
    new, _ = edit(base, erase_scale=alpha, preserve_scale=beta, lamb=lamb, tokens=tokens)
    with torch.no_grad():
        pairs, kept = rows_of(base, TASK, tokens)
    for name, W_old in list(old(base).items())[:3]:
        W = new[name].clone().requires_grad_()
        here = objective(W, W_old, pairs, kept, alpha, beta, lamb)
        (slope,) = torch.autograd.grad(here, W)
        start = W_old.clone().requires_grad_()
        there = objective(start, W_old, pairs, kept, alpha, beta, lamb)
        (steep,) = torch.autograd.grad(there, start)
        assert slope.norm() < 1e-8 * steep.norm()
        assert here < there


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_an_anchor_that_is_the_concept_changes_nothing(base: StableDiffusion, tokens: str) -> None:
    task = Task(name="t", kind="style", concepts=("zq",), anchors=("zq",), preserve=("ink",))
    new, row = edit(base, task, tokens=tokens)
    assert same(new, old(base))
    assert row["change"] < 1e-9


def test_a_large_lambda_holds_everything(base: StableDiffusion) -> None:
    strong, _ = edit(base, lamb=1e12)
    assert same(strong, old(base))
    changes = [edit(base, lamb=lamb)[1]["change"] for lamb in (0.1, 1, 10, 100)]
    assert changes == sorted(changes, reverse=True)


def test_no_erasing_is_no_change(base: StableDiffusion) -> None:
    assert same(edit(base, erase_scale=0.0)[0], old(base))


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_the_order_of_concepts_does_not_matter(base: StableDiffusion, tokens: str) -> None:
    one = Task(name="t", concepts=("zq", "xw", "k"), anchors=("art", "sky", ""), preserve=("ink", "oil"))
    two = Task(name="t", concepts=("k", "zq", "xw"), anchors=("", "art", "sky"), preserve=("oil", "ink"))
    assert same(edit(base, one, tokens=tokens)[0], edit(base, two, tokens=tokens)[0])


def test_several_concepts_are_all_erased(base: StableDiffusion) -> None:
    task = Task(name="t", concepts=("zq", "xw"), anchors=("art",), preserve=())
    new, row = edit(base, task, tokens="last", erase_scale=1e6, lamb=1e-3)
    assert row["erased"] < 1e-3
    for concept in task.concepts:
        c = base.encode([concept]).states[0][last(concept)]
        g = base.encode(["art"]).states[0][last("art")]
        for name, W_old in old(base).items():
            assert (new[name] @ c - W_old @ g).norm() < 1e-2 * (W_old @ c - W_old @ g).norm()


def test_more_alpha_erases_more_and_more_beta_moves_less(base: StableDiffusion) -> None:
    erased = [edit(base, erase_scale=alpha)[1]["erased"] for alpha in (0.01, 0.1, 1, 10, 100)]
    assert erased == sorted(erased, reverse=True)
    assert 0 < erased[-1] < erased[0] < 1
    moved = [edit(base, preserve_scale=beta)[1]["moved"] for beta in (0.01, 0.1, 1, 10, 100)]
    assert moved == sorted(moved, reverse=True)


def test_last_and_all_tokens_are_different_edits(base: StableDiffusion) -> None:
    assert not same(edit(base, tokens="all")[0], edit(base, tokens="last")[0])


def test_strength_is_a_share_of_the_step(base: StableDiffusion) -> None:
    start, whole = old(base), edit(base)[0]
    nothing, row = edit(base, strength=0.0)
    assert all(torch.equal(nothing[n], start[n]) for n in start)
    assert row["change"] == 0
    half = edit(base, strength=0.5)[0]
    assert same(half, {n: (start[n] + whole[n]) / 2 for n in start})


def test_an_empty_anchor_is_the_empty_prompt(base: StableDiffusion) -> None:
    """In ``last`` mode the concept's last token is sent to the end-of-text token of ""."""
    task = Task(name="t", concepts=("zq",), preserve=())
    new, row = edit(base, task, templates=("{}",), tokens="last", erase_scale=1e6, preserve_scale=1e-9, lamb=1e-6)
    c, g = base.encode(["zq"]).states[0][2], base.encode([""]).states[0][1]
    for name, W_old in old(base).items():
        assert torch.allclose(new[name] @ c, W_old @ g, atol=1e-4)
    assert row["erased"] < 1e-3


def test_only_values(base: StableDiffusion) -> None:
    target = base.frozen()
    UCE(params=r"unet\..*\.attn2\.to_v")(target, TASK)
    changed = {n for n, p in target.named().items() if not torch.equal(p, base.named()[n])}
    assert changed == set(base.select(r"unet\..*\.attn2\.to_v"))


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_sdxl(tokens: str) -> None:
    """Both text encoders' states, side by side, are the vectors; the same objective is stationary."""
    xl = double(StableDiffusion.tiny(seed=3, xl=True))
    new, row = edit(xl, tokens=tokens, erase_scale=1.0, preserve_scale=0.5, lamb=0.5)
    with torch.no_grad():
        pairs, kept = rows_of(xl, TASK, tokens)
    assert pairs[0][0].shape == (32,)
    name, W_old = next(iter(old(xl).items()))
    W = new[name].clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(W, W_old, pairs, kept, 1.0, 0.5, 0.5), W)
    assert slope.norm() < 1e-8
    assert 0 < row["erased"] < 1


def test_beta_is_chosen_by_the_number_of_preserved_prompts(base: StableDiffusion) -> None:
    none = Task(name="t", concepts=("zq",), anchors=("art",))
    assert same(edit(base, none)[0], edit(base, none, preserve_scale=1.0)[0])  # "" alone: 1 / 1
    many = Task(name="t", concepts=("zq",), anchors=("art",), preserve=tuple("abcdefghi"))
    assert same(edit(base, many)[0], edit(base, many, preserve_scale=0.1)[0])  # 19 prompts: the floor


@pytest.mark.parametrize(
    "wrong", [{"lamb": 0.0}, {"lamb": -1.0}, {"erase_scale": -1.0}, {"preserve_scale": -1.0}, {"templates": ("no place",)}]
)
def test_settings_without_a_solution_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        UCE(**wrong)


@pytest.mark.parametrize("params", ["full", "selfattn", "text_encoder"])
def test_weights_that_do_not_read_text_are_refused_untouched(sd: Callable[..., Any], params: str) -> None:
    target = sd()
    before = {n: p.clone() for n, p in target.named().items()}
    with pytest.raises(UsageError, match="xattn-kv"):
        UCE(params=params)(target, TASK)
    assert all(torch.equal(p, before[n]) for n, p in target.named().items())
