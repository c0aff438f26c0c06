"""ESD: what it teaches, where its states come from, and which weights it may touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearners.base import Task
from unlearners.diffusion import Cond, TrajectoryPool
from unlearners.errors import UsageError
from unlearners.methods import esd
from unlearners.methods.esd import ESD
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.tasks import from_concept

TASK = Task(name="t", kind="style", concepts=("zq",), prompts=("zq", "a zq sky"))
QUICK: dict[str, Any] = {"steps": 3, "sampler_steps": 4, "lr": 1e-3}


class Spy:
    """What one run of ESD compared and which states it compared at."""

    def __init__(self) -> None:
        self.student: list[Tensor] = []
        self.goal: list[Tensor] = []
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []
        self.rows: list[dict[str, float]] = []
        self.target: Any = None


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, sd: Callable[..., Any]) -> Callable[..., Spy]:
    """``run(**fields)``: a quick ESD on a tiny pipeline of its own, spied upon."""
    mse, states = F.mse_loss, esd.states

    def go(task: Task = TASK, *, model: Any = None, **fields: Any) -> Spy:
        spy = Spy()

        def compare(e: Tensor, goal: Tensor) -> Tensor:
            spy.student.append(e.detach().clone())
            spy.goal.append(goal.clone())
            return mse(e, goal)

        def see(*parts: Any, **how: Any) -> Any:
            x, t, k = states(*parts, **how)
            spy.x.append(x)
            spy.t.append(t)
            return x, t, k

        monkeypatch.setattr(F, "mse_loss", compare)
        monkeypatch.setattr(esd, "states", see)
        spy.target = model if model is not None else sd()
        ESD(**(QUICK | {"time": "grid"} | fields))(spy.target, task, seed=3, log=spy.rows.append)
        return spy

    return go


def changed(target: Any, fresh: Any) -> set[str]:
    return {n for n, p in target.named().items() if not torch.equal(p, fresh.named()[n])}


@torch.no_grad()
def predict(sd: Callable[..., Any], spy: Spy, i: int, prompt: str) -> Tensor:
    """The untouched model's prediction at the state of update ``i``."""
    old = sd()
    out: Tensor = old.eps(spy.x[i], spy.t[i], old.encode([prompt]))
    return out


ONE = Task(name="t", concepts=("zq",))


# --- the target ---------------------------------------------------------------------------------------------------
def test_eta_zero_teaches_the_unconditional_prediction(run: Callable[..., Spy], sd: Callable[..., Any]) -> None:
    spy = run(ONE, eta=0.0)
    for i in range(3):
        assert torch.allclose(spy.goal[i], predict(sd, spy, i, ""), atol=1e-6)


@pytest.mark.parametrize("eta", [0.5, 1.0, 3.0])
def test_eta_is_the_papers_and_one_less_than_the_release_s(run: Callable[..., Spy], sd: Callable[..., Any], eta: float) -> None:
    spy = run(ONE, eta=eta)
    for i in range(3):
        e_0, e_c = predict(sd, spy, i, ""), predict(sd, spy, i, "zq")
        assert torch.allclose(spy.goal[i], e_0 - eta * (e_c - e_0), atol=1e-6)
        assert torch.allclose(spy.goal[i], e_c - (eta + 1) * (e_c - e_0), atol=1e-6)


def test_the_first_loss_grows_with_the_square_of_one_plus_eta(run: Callable[..., Spy]) -> None:
    """Before the first update the student still says eps_0(c), which is (1 + eta)(e_c - e_0) away from the goal."""
    first = {eta: run(ONE, eta=eta, steps=1).rows[0] for eta in (0.0, 1.0, 2.0)}
    assert first[1.0]["loss"] == pytest.approx(4 * first[0.0]["loss"], rel=1e-3)
    assert first[2.0]["loss"] == pytest.approx(9 * first[0.0]["loss"], rel=1e-3)
    assert all(row["distance"] == 0 for row in first.values())


def test_erase_from_takes_the_concept_out_of_another_prompt(run: Callable[..., Spy], sd: Callable[..., Any]) -> None:
    spy = run(ONE, erase_from="sky", eta=1.5)
    for i in range(3):
        e_0, e_c, e_from = (predict(sd, spy, i, p) for p in ("", "zq", "sky"))
        assert torch.allclose(spy.goal[i], e_from - 2.5 * (e_c - e_0), atol=1e-6)
    assert torch.allclose(spy.student[0], predict(sd, spy, 0, "sky"), atol=1e-6)  # the student sees the other prompt
    plain = run(Task(name="t", concepts=("sky",)), steps=1)
    assert torch.equal(spy.x[0], plain.x[0])  # and so does the sampler


def test_v_prediction_is_taught_in_v(run: Callable[..., Spy], sd: Callable[..., Any]) -> None:
    """Guidance is linear in the network's output, whatever it predicts."""
    spy = run(ONE, model=sd(prediction="v_prediction"))
    old = sd(prediction="v_prediction")
    with torch.no_grad():
        v_0, v_c = (old.eps(spy.x[0], spy.t[0], old.encode([p])) for p in ("", "zq"))
    assert torch.allclose(spy.goal[0], 2 * v_0 - v_c, atol=1e-6)


def test_training_lowers_the_loss(run: Callable[..., Spy]) -> None:
    rows = run(ONE, steps=40, lr=1e-2, x_from="frozen", pool=1, refresh=1000, batch=8).rows
    assert sum(r["loss"] for r in rows[-5:]) < 0.5 * sum(r["loss"] for r in rows[:5])
    assert rows[-1]["distance"] > 0


# --- states -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("extra", [{}, {"pool": 2, "refresh": 1, "batch": 2}])
def test_x_from(run: Callable[..., Spy], extra: dict[str, Any]) -> None:
    """The frozen model's states do not depend on what is learnt; the current model's do from the first update on."""
    with_ = {x: [run(x_from=x, lr=lr, **extra).x for lr in (1e-9, 1e-1)] for x in ("current", "frozen")}
    frozen, current = with_["frozen"], with_["current"]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*frozen, strict=True))
    assert torch.equal(current[0][0], current[1][0])
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*current, strict=True))


def test_the_current_model_samples_with_the_text_encoder_in_training(run: Callable[..., Spy]) -> None:
    slow, fast = (run(params="text_encoder", lr=lr, steps=4).x for lr in (1e-9, 1e-1))
    assert torch.equal(slow[0], fast[0])
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(slow, fast, strict=True))


@pytest.mark.parametrize("pipeline", ["ddim", "pipeline"])
@pytest.mark.parametrize(("time", "low", "high"), [("centered", -125, 125), ("bucket", 0, 250)])
def test_times_lie_on_the_sampler_s_grid_or_within_its_step(run: Callable[..., Spy], pipeline: str, time: str, low: int, high: int) -> None:
    grid = {751, 501, 251, 1}
    spy = run(sampler=pipeline, steps=8, batch=2)
    assert {int(t) for ts in spy.t for t in ts} <= grid
    model = spy.target
    told: list[int] = []
    eps = type(model).eps

    def listen(self: Any, x_t: Tensor, t: Any, cond: Cond) -> Tensor:
        if torch.is_grad_enabled():  # the student
            told.extend(int(one) for one in t)
        return eps(self, x_t, t, cond)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "eps", listen)
        spy = run(sampler=pipeline, steps=8, batch=2, time=time, model=model)
    drawn = [int(t) for ts in spy.t for t in ts]
    assert len(told) == len(drawn) == 16
    assert all(low <= s - t < high and 0 <= s < 1000 for s, t in zip(told, drawn, strict=True))
    assert told != drawn


def test_the_pool_gives_matching_states_times_and_prompts() -> None:
    class Model:
        """Adds up what it is told, so that a state says its prompt and its time."""

        latent_shape, device = (1, 1, 1), torch.device("cpu")

        def eps(self, x: Tensor, t: Any, cond: Cond) -> Tensor:
            return cond.states.sum((1, 2)).view(-1, 1, 1, 1).expand_as(x)

    class Scheduler:
        init_noise_sigma = 0.0

        def set_timesteps(self, steps: int, device: Any) -> None:
            self.timesteps = torch.arange(steps, 0, -1)

        def scale_model_input(self, x: Tensor, t: Any) -> Tensor:
            return x

        def step(self, e: Tensor, t: Any, x: Tensor) -> Any:
            return type("Out", (), {"prev_sample": x + e})

    pool, cond = TrajectoryPool(), Cond(torch.tensor([[[1.0]], [[10.0]], [[100.0]]]))
    pool.fill(Model(), cond, Cond(torch.zeros(3, 1, 1)), torch.tensor([4, 5, 6]), scheduler=Scheduler(), steps=5, guidance=1)
    x, t, prompt = pool.draw(200)
    assert x.shape == (200, 1, 1, 1)
    assert set(t.tolist()) == {1, 2, 3, 4, 5}
    assert set(prompt.tolist()) == {4, 5, 6}
    value = {4: 1, 5: 10, 6: 100}
    assert all(float(a) == (5 - int(b)) * value[int(c)] for a, b, c in zip(x, t, prompt, strict=True))
    twin = TrajectoryPool()
    twin.load_state_dict(pool.state_dict())
    torch.manual_seed(0)
    one = pool.draw(7)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(one, twin.draw(7), strict=True))
    assert twin.age == pool.age == 2


def test_the_pool_is_sampled_anew_after_refresh_updates(run: Callable[..., Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    fills: list[list[int]] = []
    fill = TrajectoryPool.fill

    def count(self: Any, target: Any, cond: Any, null: Any, prompt: Tensor, **how: Any) -> None:
        fills.append(prompt.tolist())
        fill(self, target, cond, null, prompt, **how)

    monkeypatch.setattr(TrajectoryPool, "fill", count)
    run(pool=4, refresh=3, steps=7, batch=2)
    assert [sorted(f) for f in fills] == [[0, 0, 1, 1]] * 3  # before updates 1, 4 and 7; both prompts alike
    fills.clear()
    many = Task(name="t", concepts=("zq",), prompts=tuple("abcdef"))
    run(many, pool=2, refresh=1, steps=20)
    assert {k for f in fills for k in f} == set(range(6))  # a small pool leaves no prompt out for good
    assert all(len(set(f)) == 2 for f in fills)


def test_without_a_pool_every_update_samples(run: Callable[..., Spy]) -> None:
    spy = run(steps=4)
    assert all(x.shape == (1, 4, 8, 8) for x in spy.x)
    assert len({float(x.sum()) for x in spy.x}) == 4


# --- weights ------------------------------------------------------------------------------------------------------
def test_noxattn_leaves_cross_attention_output_and_time_alone(run: Callable[..., Spy], sd: Callable[..., Any]) -> None:
    moved = changed(run(params="noxattn").target, sd())
    assert moved
    assert all(n.startswith("unet.") for n in moved)
    assert not [n for n in moved if any(part in n for part in (".attn2.", "conv_out", "conv_norm_out", "time_embedding"))]
    for part in (".attn1.", ".ff.", "resnets", "conv_in", ".norm2."):
        assert [n for n in moved if part in n], part


@pytest.mark.parametrize(("params", "part"), [("xattn", ".attn2."), ("selfattn", ".attn1."), ("xattn-kv", ".attn2.to_"), ("full", "unet.")])
def test_the_variants(run: Callable[..., Spy], sd: Callable[..., Any], params: str, part: str) -> None:
    moved = changed(run(params=params).target, sd())
    assert moved
    assert all(part in n for n in moved)


@pytest.mark.parametrize("xl", [False, True])
def test_the_text_encoder_alone(run: Callable[..., Spy], sd: Callable[..., Any], xl: bool) -> None:
    moved = changed(run(params="text_encoder", model=sd(xl=xl)).target, sd(xl=xl))
    assert {n.partition(".")[0] for n in moved} == ({"text_encoder", "text_encoder_2"} if xl else {"text_encoder"})
    assert not [n for n in moved if "embedding" in n]


def test_one_layer_of_the_text_encoder(run: Callable[..., Spy], sd: Callable[..., Any]) -> None:
    moved = changed(run(params="text_encoder:layers=0").target, sd())
    assert moved
    assert all(".layers.0." in n for n in moved)


def test_sdxl(run: Callable[..., Spy], sd: Callable[..., Any]) -> None:
    moved = changed(run(model=sd(xl=True)).target, sd(xl=True))
    assert moved
    assert all(".attn2." in n for n in moved)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"sampler_steps": 0}, {"refresh": 0}, {"pool": -1}])
def test_impossible_budgets_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        ESD(**wrong)


def test_the_presets_are_what_they_say() -> None:
    assert ESD(**ESD.presets["paper"]) == ESD()
    release = ESD(**ESD.presets["release"])
    assert (release.steps, release.lr, release.x_from, release.time) == (200, 5e-5, "frozen", "grid")


def test_it_asks_for_text_to_image() -> None:
    assert issubclass(StableDiffusion, ESD.needs)


def test_half_precision_models_train_float32_masters() -> None:
    target = StableDiffusion.load("tiny", dtype=torch.bfloat16)
    start = {n: p.clone() for n, p in target.named().items()}
    seen: set[torch.dtype] = set()
    ESD(steps=6, lr=1e-4, sampler_steps=4)(
        target, from_concept("zq", "style"), log=lambda _: seen.update(p.dtype for p in target.select("xattn").values())
    )
    assert seen == {torch.float32}
    assert {p.dtype for p in target.named().values()} == {torch.bfloat16}
    moved = [n for n, p in target.named().items() if not torch.equal(p, start[n])]
    assert moved and all(".attn2." in n for n in moved)
    assert torch.isfinite(target.sample(["zq"], [1], steps=2)).all()
