"""RECE and SPEED in closed form: minima of their objectives, and the constraints they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlearners import closed_form, config
from unlearners.base import Method, Task, chosen, settle
from unlearners.errors import UsageError
from unlearners.methods.rece import RECE, revive
from unlearners.methods.speed import SPEED, constrained, felt, null_space
from unlearners.methods.uce import UCE
from unlearners.targets.stable_diffusion import StableDiffusion

TASK = Task(name="t", kind="style", concepts=("zq", "xw"), anchors=("art", "sky"), preserve=("ink", "oil"))
SEEDS = st.integers(0, 10_000)


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    """A tiny pipeline in float64; tests edit frozen copies of it."""
    return double(StableDiffusion.tiny(seed=7))


def double(target: StableDiffusion) -> StableDiffusion:
    for module in target.modules.values():
        module.double()
    return target


def edit(base: StableDiffusion, method: Method, task: Task = TASK) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Every weight by name, and what was logged."""
    target = base.frozen()
    rows: list[dict[str, float]] = []
    method(target, task, log=rows.append)
    return {n: p.detach() for n, p in target.named().items()}, rows


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- shared -------------------------------------------------------------------------------------------------------
@settings(max_examples=20)
@given(seed=SEEDS, alpha=st.floats(0.05, 20), beta=st.floats(0.05, 20), lamb=st.floats(0.05, 20))
def test_the_shared_solution_is_a_stationary_point(seed: int, alpha: float, beta: float, lamb: float) -> None:
    c, g, p, W_old = normal(seed, 4, 6), normal(seed + 1, 4, 6), normal(seed + 2, 3, 6), normal(seed + 3, 5, 6)
    M, B = closed_form.solve(c, g, p, alpha=alpha, beta=beta, lamb=lamb)
    W = (W_old @ M).requires_grad_()
    erase, keep = (c @ W.T - g @ W_old.T).square().sum(), (p @ (W - W_old).T).square().sum()
    (slope,) = torch.autograd.grad(alpha * erase + beta * keep + lamb * (W - W_old).square().sum(), W)
    assert slope.norm() < 1e-9 * (alpha + beta + lamb) * W_old.norm() * B.norm()
    assert closed_form.condition(B) == pytest.approx(float(torch.linalg.cond(B)), rel=1e-6)


@settings(max_examples=20)
@given(seed=SEEDS)
def test_effects_from_the_gram_matrix_are_those_of_the_matrices(seed: int) -> None:
    w = [normal(seed + i, 5 + i, 6) for i in range(3)]
    T, c, g, p = normal(seed + 9, 6, 6), normal(seed + 10, 4, 6), normal(seed + 11, 4, 6), normal(seed + 12, 3, 6)
    found = closed_form.effect(closed_form.gram(w), T, c, g, p)
    W_old = torch.cat(w)
    W = W_old @ T
    assert found["change"] == pytest.approx(float((W - W_old).norm() / W_old.norm()))
    assert found["erased"] == pytest.approx(float((c @ W.T - g @ W_old.T).norm() / ((c - g) @ W_old.T).norm()))
    assert found["moved"] == pytest.approx(float((p @ (W - W_old).T).norm() / (p @ W_old.T).norm()))


def test_prompts_are_read_alike_alone_and_in_batches(base: StableDiffusion) -> None:
    prompts = [*("abcdefghijklmnopqrstuvw"), "", "a zq sky", ""]
    many = closed_form.read(base, prompts)
    assert len(many) == len(set(prompts)) > closed_form.BATCH
    for prompt in ("a", "w", "", "a zq sky"):
        states, last = closed_form.read(base, [prompt])[prompt]
        assert torch.allclose(states, many[prompt][0], atol=1e-9)
        assert last == many[prompt][1] == max(1, len(prompt.replace(" ", "")))


# --- RECE ---------------------------------------------------------------------------------------------------------
@settings(max_examples=25)
@given(seed=SEEDS, lamb=st.floats(1e-4, 10))
def test_the_derived_embedding_minimises_its_objective(seed: int, lamb: float) -> None:
    """sum_W ||W_0 T c' - W_0 c||^2 + lambda ||c'||^2: no slope at c', and nothing near it is better."""
    w, T, c = [normal(seed + i, 5, 6) for i in range(3)], normal(seed + 5, 6, 6), normal(seed + 6, 2, 6)

    def objective(x: Tensor) -> Tensor:
        return torch.stack([((x @ T.T - c) @ W.T).square().sum() for W in w]).sum() + lamb * x.square().sum()

    found = revive(closed_form.gram(w), T, c, lamb).requires_grad_()
    (slope,) = torch.autograd.grad(objective(found), found)
    (steep,) = torch.autograd.grad(objective(start := torch.zeros_like(c, requires_grad=True)), start)
    assert slope.norm() < 1e-8 * steep.norm()
    nearby = found.detach() + 1e-2 * normal(seed + 7, 2, 6)
    assert objective(found) < objective(nearby)


def test_without_lambda_and_without_an_edit_the_embedding_is_the_concept() -> None:
    K, c = closed_form.gram([normal(1, 9, 6)]), normal(2, 3, 6)
    assert torch.allclose(revive(K, torch.eye(6, dtype=torch.float64), c, 1e-12), c, atol=1e-6)


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_no_rounds_is_uce(base: StableDiffusion, tokens: Any) -> None:
    a, rows = edit(base, RECE(rounds=0, tokens=tokens, erase_scale=2.0, lamb=0.3))
    b, (row,) = edit(base, UCE(tokens=tokens, erase_scale=2.0, lamb=0.3))
    assert gap(a, b) < 1e-12
    assert rows == [pytest.approx(row)]


def test_a_round_is_another_edit_and_makes_reviving_harder(base: StableDiffusion) -> None:
    new, rows = edit(base, RECE(rounds=4, derive=1e-3))
    assert len(rows) == 5
    assert gap(new, edit(base, UCE())[0]) > 1e-4
    revived = [row["revived"] for row in rows[1:]]
    assert revived == sorted(revived)
    assert revived[0] < revived[-1]


@pytest.mark.parametrize(("kind", "rounds", "derive"), [("nsfw", 3, 0.1), ("style", 1, 1e-3), ("object", 1, 0.1), ("identity", 1, 0.1)])
def test_the_defaults_are_the_papers_for_the_kind(base: StableDiffusion, kind: Any, rounds: int, derive: float) -> None:
    task = Task(name="t", kind=kind, concepts=("zq",), anchors=("art",))
    assert gap(edit(base, RECE(), task)[0], edit(base, RECE(rounds=rounds, derive=derive), task)[0]) == 0
    assert gap(edit(base, RECE(), task)[0], edit(base, RECE(rounds=rounds, derive=10 * derive), task)[0]) > 0


def test_what_rece_chose_is_in_the_record_and_the_old_numbers_still_ask_for_it(base: StableDiffusion) -> None:
    for method in (RECE(), RECE(rounds="auto", derive="auto"), RECE(rounds=-1, derive=0.0)):
        told = chosen(method, settle(method, base, Task(name="t", kind="nsfw", concepts=("zq",), anchors=("art",), preserve=("cat",))))
        assert (told["rounds"], told["derive"]) == (3, 0.1)
    assert {"rounds": -1, "derive": 0.0}.items() <= config.to_dict(RECE()).items(), "old run folders keep their name"
    with pytest.raises(UsageError, match="no automatic value of 'rounds' for a task of kind 'class'"):
        settle(RECE(), base, Task(name="t", kind="class", concepts=("zq",), anchors=("art",), preserve=("cat",)))


def test_rece_from_every_position_of_the_phrase(base: StableDiffusion) -> None:
    assert gap(edit(base, RECE())[0], edit(base, RECE(positions="prompt"))[0]) > 1e-6


# --- SPEED --------------------------------------------------------------------------------------------------------
@settings(max_examples=25)
@given(seed=SEEDS, rho=st.floats(1e-3, 10))
def test_the_step_leaves_the_preserved_and_the_invariants_alone(seed: int, rho: float) -> None:
    d = 12
    c, g, r, C_2 = normal(seed, 2, d), normal(seed + 1, 2, d), normal(seed + 2, 4, d), normal(seed + 3, 2, d)
    P = null_space(r, 1e-9)
    assert torch.allclose(P @ P, P, atol=1e-9)
    assert torch.allclose(P, P.T)
    assert float(P.trace()) == pytest.approx(d - 4)
    A, D = c.T @ c, (g - c).T @ c
    step = constrained(A, D, P, C_2, rho)
    size = float(step.norm())
    assert (step @ r.T).norm() < 1e-8 * (1 + size)
    assert (step @ C_2.T).norm() < 1e-8 * (1 + size)
    # the papers' own letters
    eye = torch.eye(d, dtype=torch.float64)
    M = torch.linalg.inv(A @ P + rho * eye)
    Q = eye - M @ C_2.T @ torch.linalg.inv(C_2 @ P @ M @ C_2.T) @ C_2 @ P
    assert torch.allclose(step, D @ P @ Q @ M, atol=1e-7 * (1 + size))


@settings(max_examples=25)
@given(seed=SEEDS)
def test_with_little_rho_the_concept_becomes_its_anchor(seed: int) -> None:
    c, g, r, C_2 = normal(seed, 2, 12), normal(seed + 1, 2, 12), normal(seed + 2, 4, 12), normal(seed + 3, 2, 12)
    step = constrained(c.T @ c, (g - c).T @ c, null_space(r, 1e-9), C_2, 1e-9)
    assert torch.allclose(c @ step.T, g - c, atol=1e-3)


def test_an_invariant_that_is_preserved_already_is_no_second_constraint() -> None:
    c, g, r = normal(1, 2, 12), normal(2, 2, 12), normal(3, 4, 12)
    P, A, D = null_space(r, 1e-9), c.T @ c, (g - c).T @ c
    free = constrained(A, D, P, torch.zeros(1, 12, dtype=torch.float64), 1.0)
    assert torch.allclose(constrained(A, D, P, r[:2], 1.0), free, atol=1e-9)
    assert free.norm() > 0.1


def test_the_filter_keeps_what_moves_at_least_as_far_as_the_mean() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 9.0], [2.0, 7.0], [0.0, 9.0]], dtype=torch.float64)
    step = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert felt(step, x).tolist() == [False, True, True, False]
    assert felt(step, x[:1]).tolist() == [True]
    assert felt(0 * step, x).all()


PLAIN: dict[str, Any] = {"augment": 0, "filtered": False, "null": 1e-9}


def test_speed_keeps_its_promises_on_a_pipeline(base: StableDiffusion) -> None:
    new, (row,) = edit(base, SPEED(**PLAIN, rho=1e-6))
    assert row["erased"] < 1e-4
    assert max(row["moved"], row["fixed"]) < 1e-6
    changed = {n for n, p in base.named().items() if not torch.equal(p, new[n])}
    assert changed == set(base.select(r"unet\..*\.attn2\.to_v"))
    texts = closed_form.read(base, ["zq", "art", "ink"])
    c, g, r = (texts[p][0][texts[p][1]] for p in ("zq", "art", "ink"))
    for name in changed:
        W_old, W = base.named()[name], new[name]
        assert (W @ c - W_old @ g).norm() < 1e-3 * (W_old @ c - W_old @ g).norm()
        assert (W @ r - W_old @ r).norm() < 1e-6 * (W_old @ r).norm()


def test_more_rho_is_less_of_a_step(base: StableDiffusion) -> None:
    changes = [edit(base, SPEED(**PLAIN, rho=rho))[1][0]["change"] for rho in (1e-3, 1.0, 1e2, 1e4)]
    assert changes == sorted(changes, reverse=True)


def test_means_are_rho_times_the_number_of_concepts(base: StableDiffusion) -> None:
    assert gap(edit(base, SPEED(**PLAIN, average=True, rho=1.0))[0], edit(base, SPEED(**PLAIN, rho=2.0))[0]) < 1e-9


# --- both ---------------------------------------------------------------------------------------------------------
METHODS = [RECE(), RECE(tokens="last"), SPEED(), SPEED(tokens="all")]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_order_of_concepts_does_not_matter(base: StableDiffusion, method: Any) -> None:
    one = Task(name="t", kind="nsfw", concepts=("zq", "xw", "k"), anchors=("art", "sky", ""), preserve=("ink", "oil"))
    two = Task(name="t", kind="nsfw", concepts=("k", "zq", "xw"), anchors=("", "art", "sky"), preserve=("ink", "oil"))
    assert gap(edit(base, method, one)[0], edit(base, method, two)[0]) < 1e-7


@pytest.mark.parametrize("kind", [RECE, SPEED])
def test_no_strength_is_no_change(base: StableDiffusion, kind: Any) -> None:
    start = {n: p.detach() for n, p in base.named().items()}
    assert gap(edit(base, kind(strength=0.0))[0], start) == 0
    whole, half = edit(base, kind())[0], edit(base, kind(strength=0.5))[0]
    assert gap(whole, start) > 1e-4
    assert gap(half, {n: (start[n] + whole[n]) / 2 for n in start}) < 1e-9


@pytest.mark.parametrize("kind", [RECE, SPEED])
def test_an_anchor_that_is_the_concept_changes_little_or_nothing(base: StableDiffusion, kind: Any) -> None:
    """SPEED has nothing to do; RECE's embedding is the concept made smaller by lambda alone."""
    task = Task(name="t", kind="style", concepts=("zq",), anchors=("zq",), preserve=("ink",))
    method = SPEED() if kind is SPEED else RECE(derive=1e-12)
    assert gap(edit(base, method, task)[0], {n: p.detach() for n, p in base.named().items()}) < 1e-6


@pytest.mark.parametrize("layout", [{"xl": True}, {"prediction": "v_prediction"}], ids=str)
@pytest.mark.parametrize("method", [RECE(), SPEED()], ids=["rece", "speed"])
def test_other_layouts(layout: dict[str, Any], method: Any) -> None:
    """SDXL's two text encoders side by side are the vectors; v-prediction changes nothing in the text."""
    target = double(StableDiffusion.tiny(seed=3, **layout))
    new, rows = edit(target, method)
    assert rows[-1]["change"] > 0
    assert rows[-1]["erased"] < 1
    assert {n for n, p in target.named().items() if not torch.equal(p, new[n])} == set(target.select(method.params))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RECE(round_lamb=0.0),
        lambda: RECE(rounds=-2),
        lambda: RECE(derive=-1.0),
        lambda: RECE(templates=("no place",)),
        lambda: SPEED(null=0.0),
        lambda: SPEED(rho=0.0),
        lambda: SPEED(invariants=0),
        lambda: SPEED(templates=("no place",)),
    ],
)
def test_settings_without_a_solution_are_refused(wrong: Any) -> None:
    with pytest.raises(UsageError):
        wrong()


@pytest.mark.parametrize("kind", [RECE, SPEED])
@pytest.mark.parametrize("params", ["full", "selfattn", "text_encoder"])
def test_weights_that_do_not_read_text_are_refused_untouched(base: StableDiffusion, kind: Any, params: str) -> None:
    target = base.frozen()
    with pytest.raises(UsageError, match="use params"):
        kind(params=params)(target, TASK)
    assert gap({n: p.detach() for n, p in target.named().items()}, {n: p.detach() for n, p in base.named().items()}) == 0
