"""AdvUnlearn: prompts with embeddings inside, the attack, what is retained, the pool on disk, and which weights move."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from unlearners import keep, pool, retain
from unlearners.base import Task, settle
from unlearners.diffusion import Soft
from unlearners.errors import UsageError
from unlearners.methods._soft import encode, placed, tables
from unlearners.methods.advunlearn import AdvUnlearn
from unlearners.session import FolderSession
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.tasks import from_concept

TASK = Task(name="t", kind="style", concepts=("zq",))
QUICK: dict[str, Any] = {
    "steps": 3, "lr": 1e-3, "warmup": 1, "attack_steps": 2, "sampler_steps": 3, "trajectories": 2, "retain_batch": 2, "nearest": 0.0,
}  # fmt: skip


@pytest.fixture
def listed(tmp_path: Path) -> str:
    path = tmp_path / "kept.txt"
    path.write_text("ab\na cd\nef gh\n")
    return str(path)


@pytest.fixture
def run(sd: Callable[..., Any], listed: str) -> Callable[..., Any]:
    """``run(**fields)``: the trained model and its log."""

    def go(task: Task = TASK, *, model: Any = None, **fields: Any) -> Any:
        rows: list[dict[str, float]] = []
        target = model if model is not None else sd()
        AdvUnlearn(**(QUICK | {"retain_set": listed} | fields))(target, task, seed=3, log=rows.append)
        return target, rows

    return go


def moved(target: Any, fresh: Any) -> set[str]:
    return {n for n, p in target.named().items() if not torch.equal(p, fresh.named()[n])}


def same(a: Any, b: Any) -> bool:
    return not moved(a, b)


# --- prompts ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("xl", [False, True])
def test_a_prompt_with_its_own_embeddings_in_place_is_the_prompt(sd: Callable[..., Any], xl: bool) -> None:
    model = sd(xl=xl)
    ids = model.tokens(["zq sky", "ab", "cde"])
    at = torch.tensor([[1, 2], [-1, -1], [3, -1]])
    with torch.no_grad():
        own = tuple(table[ids.gather(1, at.clamp(min=0))] for table in tables(model))
        plain, put = model.encode(ids), model.encode(ids, Soft(own, at))
    assert torch.equal(plain.states, put.states)
    assert torch.equal(plain.states, model.encode(["zq sky", "ab", "cde"]).states)


@pytest.mark.parametrize("xl", [False, True])
def test_a_row_of_minus_one_stays_plain_and_gets_no_gradient(sd: Callable[..., Any], xl: bool) -> None:
    model = sd(xl=xl)
    ids = model.tokens(["zq", "ab"])
    values = tuple(torch.randn(2, 1, t.shape[1], requires_grad=True) for t in tables(model))
    out = model.encode(ids, Soft(values, torch.tensor([[1], [-1]])))
    assert torch.allclose(out.states[1], model.encode(["ab"]).states[0], atol=1e-6)
    assert not torch.allclose(out.states[0], model.encode(["zq"]).states[0], atol=1e-3)
    for g in torch.autograd.grad(out.states.square().sum(), values):
        assert g[0].abs().sum() > 0
        assert not g[1].any()


def test_slots_by_number_are_slots_by_index(sd: Callable[..., Any]) -> None:
    model = sd()
    ids, e = model.tokens(["zq", "ab"]), torch.randn(2, 2, 16)
    with torch.no_grad():
        a, b = model.encode(ids, Soft(e, 2)), model.encode(ids, Soft(e, torch.tensor([[2, 3]] * 2)))
    assert torch.equal(a.states, b.states)


def test_the_padding_of_each_of_sdxl_s_encoders_is_its_own(sd: Callable[..., Any]) -> None:
    model = sd(xl=True)
    pad, ids = 7, model.tokens(["zq"])
    model.tokenizers[1] = type("Other", (), {"pad_token_id": pad})()
    end = int((ids[0] == model.tokenizers[0].eos_token_id).nonzero()[0])
    other = model._padded(ids)
    assert torch.equal(other[0, : end + 1], ids[0, : end + 1])
    assert set(other[0, end + 1 :].tolist()) == {pad}


@pytest.mark.parametrize(
    ("place", "k", "wanted", "at"),
    [
        ("prefix", 1, "S.zqE", [1]),
        ("prefix", 3, "S...zqE", [1, 2, 3]),
        ("suffix", 2, "Szq..E", [3, 4]),
        ("mid", 2, "Sz..qE", [2, 3]),
        ("insert", 1, "Sz.qE", [2]),
        ("insert", 3, "S...zqE", [1, 2, 3]),
        ("per-k-words", 2, "S.zq.E", [1, 4]),
        ("replace", 2, "S..E", [1, 2]),
        ("add", 5, "SzqE", [1, 2]),
    ],
)
def test_where_delta_goes(sd: Callable[..., Any], place: Any, k: int, wanted: str, at: list[int]) -> None:
    model = sd()
    ids, slots = placed(model, "zq", place, k)
    plain = model.tokens(["zq"])[0]
    start, z, q, end = plain[:4].tolist()
    letters = {"S": start, "z": z, "q": q, "E": end}
    assert slots.tolist() == at
    assert len(ids) == len(plain)
    room = set(at) if place != "add" else set()
    expected = [letters.get(c, -1) for c in wanted] + [end] * (len(plain) - len(wanted))
    assert [-1 if i in room else int(v) for i, v in enumerate(ids)] == expected
    assert not {int(ids[i]) for i in at} & {start, end}  # the pooled state is looked for at the first end token


def test_ids_under_delta_do_not_count_and_adding_nothing_is_the_prompt(sd: Callable[..., Any]) -> None:
    model = sd()
    (ids, at), delta = placed(model, "zq", "prefix", 1), (torch.randn(1, 16),)
    other = ids.clone()
    other[1] = 5
    with torch.no_grad():
        assert torch.equal(encode(model, (ids, at), delta, "prefix").states, encode(model, (other, at), delta, "prefix").states)
        nothing = encode(model, placed(model, "zq", "add", 1), (torch.zeros(2, 16),), "add", model.tokens(["ab"]))
        assert torch.allclose(nothing.states, model.encode(["zq", "ab"]).states, atol=1e-6)


def test_words_for_tokens_cuts_the_concept(sd: Callable[..., Any]) -> None:
    model = sd()
    whole, cut = (placed(model, "zq", "prefix", 1, words=w)[0].tolist() for w in (False, True))
    z, q = model.tokens(["zq"])[0, 1:3].tolist()
    assert whole[2:4] == [z, q]
    assert cut[2] == z and q not in cut[2:]


@pytest.mark.parametrize("concept", ["", "x" * 22, "x" * 200])
def test_a_concept_without_tokens_or_with_too_many_is_refused(sd: Callable[..., Any], concept: str) -> None:
    with pytest.raises(UsageError, match=r"no token|too long"):
        placed(sd(), concept, "prefix", 1)


# --- the attack ---------------------------------------------------------------------------------------------------
class Fixed(pool.Pool):
    """A pool that always draws the same state, so that losses compare."""

    def draw(self, prompts: Any) -> pool.States:
        return pool.States(self.x[:1], self.t[:1], self.e_c[:1], self.e_0[:1])


def fixed(model: Any) -> Fixed:
    found = pool._built(model, ["zq"], [], pool.Recipe(steps=3, guidance=3.0, trajectories=1))
    return Fixed(found, model.device)


def attack_loss(model: Any, states: Fixed, spot: Any, delta: Any, place: Any) -> float:
    x, t, e_c, _ = states.draw([0])
    with torch.no_grad():
        return float((model.eps(x, t, encode(model, spot, delta, place)) - e_c).square().mean())


@pytest.mark.parametrize("attack", ["adam", "pgd"])
@pytest.mark.parametrize("place", ["prefix", "mid", "insert", "per-k-words", "replace", "add"])
def test_the_attack_lowers_its_loss(sd: Callable[..., Any], attack: Any, place: Any) -> None:
    model = sd()
    states, spot = fixed(model), placed(model, "zq", place, 1)
    losses = []
    for K in (1, 40):
        torch.manual_seed(0)
        method = AdvUnlearn(attack=attack, attack_steps=K, attack_lr=3e-2 if K > 1 else 1e-9, place=place)
        delta, _ = method.attacked(model, states, 0, spot, None)
        losses.append(attack_loss(model, states, spot, delta, place))
    assert losses[1] < 0.7 * losses[0]


def test_the_attack_s_delta_is_the_moved_one_unless_stale(sd: Callable[..., Any]) -> None:
    model = sd()
    states, spot = fixed(model), placed(model, "zq", "prefix", 1)
    starts, ends = [], []
    kinds: tuple[Any, ...] = ((), ("stale",))
    for slips in kinds:
        torch.manual_seed(0)
        starts.append(tables(model)[0][torch.randint(model.vocabulary, (1, 1))][0])
        torch.manual_seed(0)
        ends.append(AdvUnlearn(attack="fgsm", slips=slips).attacked(model, states, 0, spot, None)[0][0])
    assert torch.equal(ends[1], starts[1])  # one stale step is the untouched token
    assert torch.allclose((ends[0] - starts[0]).abs(), torch.full_like(ends[0], 1e-3), atol=1e-6)


def test_gradients_are_zeroed_between_steps_unless_summed(sd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = sd()
    states, spot = fixed(model), placed(model, "zq", "prefix", 1)
    seen: dict[Any, list[torch.Tensor]] = {}
    raw: dict[Any, list[torch.Tensor]] = {}
    grad, step = torch.autograd.grad, torch.optim.Adam.step
    kinds: tuple[Any, ...] = ((), ("sum",))
    for slips in kinds:
        used, own = seen.setdefault(slips, []), raw.setdefault(slips, [])

        def listen(loss: Any, inputs: Any, *, own: Any = own, **how: Any) -> Any:
            found = grad(loss, inputs, **how)
            own.append(found[0].clone())
            return found

        def note(self: Any, *, used: Any = used) -> Any:
            used.append(self.param_groups[0]["params"][0].grad.clone())
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", listen)
            patch.setattr(torch.optim.Adam, "step", note)
            torch.manual_seed(0)
            AdvUnlearn(attack_steps=3, slips=slips).attacked(model, states, 0, spot, None)
    assert all(torch.equal(a, b) for a, b in zip(seen[()], raw[()], strict=True))
    total = torch.stack(raw[("sum",)]).cumsum(0)
    assert all(torch.allclose(a, b) for a, b in zip(seen[("sum",)], total, strict=True))
    assert all(p.grad is None for p in model.named().values())


def test_more_restarts_never_find_a_worse_delta(sd: Callable[..., Any]) -> None:
    model = sd()
    states, spot = fixed(model), placed(model, "zq", "prefix", 1)
    torch.manual_seed(0)
    many, loss = AdvUnlearn(attack_steps=2, restarts=6, attack_batch=1).attacked(model, states, 0, spot, None)
    assert attack_loss(model, states, spot, many, "prefix") == pytest.approx(float(loss), rel=1e-4)
    torch.manual_seed(0)
    starts = tables(model)[0][torch.randint(model.vocabulary, (6, 1))]
    single = [attack_loss(model, states, spot, (s,), "prefix") for s in starts]
    assert float(loss) <= min(single) * 1.01


def test_latest_begins_where_the_attack_last_was(sd: Callable[..., Any]) -> None:
    model = sd()
    states, spot = fixed(model), placed(model, "zq", "prefix", 1)
    last = (torch.full((1, 16), 0.3),)
    delta, _ = AdvUnlearn(attack="fgsm", init="latest").attacked(model, states, 0, spot, last)
    assert torch.allclose(delta[0], last[0], atol=1.1e-3)
    delta, _ = AdvUnlearn(attack="fgsm", init="random").attacked(model, states, 0, spot, last)
    assert not torch.allclose(delta[0], last[0], atol=1.1e-3)


@pytest.mark.parametrize(
    ("every", "fresh"), [(1, [1, 1, 1, 1, 1, 1]), (2, [1, 0, 1, 0, 1, 0]), (4, [1, 0, 0, 0, 1, 0]), (99, [1, 0, 0, 0, 0, 0])]
)
def test_delta_serves_until_the_next_attack(run: Callable[..., Any], every: int, fresh: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.Tensor] = []
    real = encode

    def see(model: Any, spot: Any, delta: Any, place: Any, plain: Any) -> Any:
        used.append(delta[0].clone())
        return real(model, spot, delta, place, plain)

    monkeypatch.setattr("unlearners.methods.advunlearn.encode", see)
    _, rows = run(steps=8, warmup=2, attack_every=every)
    assert ["attack" in row for row in rows] == [False] * 2 + [bool(f) for f in fresh]
    assert [not torch.equal(a, b) for a, b in pairwise(used)] == [bool(f) for f in fresh[1:]]


def test_every_concept_is_attacked_before_its_delta_is_used(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    struck: list[int] = []
    real = AdvUnlearn.attacked

    def note(self: Any, target: Any, states: Any, c: int, *rest: Any) -> Any:
        struck.append(c)
        return real(self, target, states, c, *rest)

    monkeypatch.setattr(AdvUnlearn, "attacked", note)
    run(replace(TASK, concepts=("zq", "wx")), steps=12, warmup=0, attack_every=99)
    assert sorted(struck) == [0, 1]


# --- settings by kind ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "gamma", "kept"),
    [("nsfw", 0.3, "everyday+people"), ("style", 0.5, "everyday"), ("object", 0.5, "everyday"), ("identity", 0.5, "everyday")],
)
def test_gamma_and_what_stays_go_by_kind(sd: Callable[..., Any], kind: Any, gamma: float, kept: str) -> None:
    found = settle(AdvUnlearn(), sd(), replace(TASK, kind=kind))
    assert (found.gamma, found.retain_set, found.null_share) == (gamma, kept, 0.2)
    assert settle(AdvUnlearn(gamma=0.7, retain_set="scenes"), sd(), replace(TASK, kind=kind)).gamma == 0.7
    canvas = settle(AdvUnlearn(**AdvUnlearn.presets["canvas"]), sd(), replace(TASK, kind=kind))
    assert (canvas.gamma, canvas.retain_set, canvas.null_share) == (0.3, "canvas+preserve", "listed"), "as the committed tables"


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (0.2, [1, 1, 1, 1, 1, 1]),
        (0.1, [0, 1, 0, 1, 0, 1]),
        (0.3, [1, 2, 1, 2, 1, 2]),
        (0.0, [0, 0, 0, 0, 0, 0]),
        (1.0, [5, 5, 5, 5, 5, 5]),
    ],
)
def test_the_empty_prompt_has_a_share_of_its_own(share: float, wanted: list[int]) -> None:
    class Dealer:
        """Deals anything but the first, in order."""

        def deal(self, n: int, among: range) -> list[int]:
            assert 3 not in among
            return list(among)[:n]

    method = AdvUnlearn(null_share=share)
    dealt = [method.dealt(Dealer(), range(3, 12), i) for i in range(6)]  # type: ignore[arg-type]
    assert all(len(d) == 5 for d in dealt) and [d.count(3) for d in dealt] == wanted


def test_a_share_holds_the_empty_prompt_that_guidance_starts_from(run: Callable[..., Any], sd: Callable[..., Any]) -> None:
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(64, *sd().latent_shape, generator=g), torch.randint(1000, (64,), generator=g)

    def unconditional(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.eps(x, t, model.encode([""]).repeat(64))
        return found

    own, how = unconditional(sd()), {"steps": 60, "lr": 1e-3, "gamma": 5.0, "attack_steps": 0}
    drift = [float((unconditional(run(null_share=s, **how)[0]) - own).square().mean()) for s in (0.5, 0.0)]
    assert drift[0] < 0.5 * drift[1]


# --- the loss -----------------------------------------------------------------------------------------------------
def test_the_first_loss_goes_with_eta_and_nothing_is_to_retain_yet(run: Callable[..., Any]) -> None:
    first = {eta: run(eta=eta, steps=1)[1][0] for eta in (0.0, 1.0, 2.0)}
    assert first[1.0]["erase"] == pytest.approx(4 * first[0.0]["erase"], rel=1e-3)
    assert first[2.0]["erase"] == pytest.approx(9 * first[0.0]["erase"], rel=1e-3)
    assert all(row["retain"] < 1e-9 for row in first.values())


def test_gamma_zero_is_no_retaining_and_no_attack_is_esd(run: Callable[..., Any]) -> None:
    none, zero = run(retain="none"), run(gamma=0.0)
    assert same(none[0], zero[0])
    assert all("retain" not in row for row in none[1] + zero[1])
    plain = run(attack_steps=0)
    assert all("attack" not in row for row in plain[1])
    assert not same(plain[0], run()[0])
    assert same(plain[0], run(warmup=99)[0])


def test_iter_retains_by_an_update_of_its_own(run: Callable[..., Any]) -> None:
    a, b = run(retain="iter", gamma=1.0), run(retain="iter", gamma=0.0)
    assert same(a[0], b[0])
    assert all(row["loss"] == row["erase"] and row["retain"] > 0 for row in a[1])
    assert not same(a[0], run()[0])


def test_retaining_holds_the_kept_prompts(run: Callable[..., Any], sd: Callable[..., Any]) -> None:
    fresh, kept = sd(), ["ab", "a cd", "ef gh", ""]
    with torch.no_grad():
        drift = [
            float((run(steps=60, lr=2e-3, retain=r, gamma=5.0, attack_steps=1)[0].encode(kept).states - fresh.encode(kept).states).norm())
            for r in ("reg", "none")
        ]
    assert drift[0] < 0.7 * drift[1]


@pytest.mark.parametrize("preset", list(AdvUnlearn.presets))
@pytest.mark.parametrize("kind", [{"xl": True}, {"prediction": "v_prediction"}])
def test_every_preset_on_sdxl_and_v_prediction(run: Callable[..., Any], sd: Callable[..., Any], kind: Any, preset: str) -> None:
    fields = dict(AdvUnlearn.presets[preset]) | QUICK | {"k": 1}
    two = from_concept(("zq", "wx y"), "style", preserve=("ab",))
    target, rows = run(replace(two, prompts=("zq", "wx y")), model=sd(**kind), **fields)
    assert "attack" in rows[-1]
    assert {n.partition(".")[0] for n in moved(target, sd(**kind))} == {c for c in target.modules if c.startswith("text_encoder")}


@pytest.mark.parametrize(
    ("params", "inside"),
    [
        ("text_encoder", lambda n: n.startswith("text_encoder.") and ("layers." in n or "final_layer_norm" in n)),
        ("text_encoder:layers=1", lambda n: ".layers.1." in n),
        ("xattn", lambda n: n.startswith("unet.") and ".attn2." in n),
    ],
)
def test_exactly_the_weights_named_move(run: Callable[..., Any], sd: Callable[..., Any], params: str, inside: Any) -> None:
    target, _ = run(params=params)
    names = moved(target, sd())
    assert names
    assert all(inside(n) for n in names)
    # the last layer's text states are all that is lacking: a key's bias shifts every score alike
    assert all(n in names or n.endswith("k_proj.bias") for n in target.named() if inside(n))


def test_half_precision_trains_float32_weights_on_a_pool_of_half_the_size(sd: Callable[..., Any], listed: str, home: Path) -> None:
    model, fresh = (StableDiffusion.load("tiny", dtype=torch.bfloat16) for _ in range(2))
    dtypes: list[torch.dtype] = []
    rows: list[dict[str, float]] = []

    def log(row: dict[str, float]) -> None:
        rows.append(row)
        dtypes.append(next(iter(model.select("text_encoder").values())).dtype)

    AdvUnlearn(**(QUICK | {"retain_set": listed, "lr": 1e-2}))(model, TASK, log=log)
    assert set(dtypes) == {torch.float32}
    assert moved(model, fresh) and rows[0]["erase"] > 0
    (file,) = home.iterdir()
    with safe_open(file, framework="pt") as there:
        assert {there.get_tensor(n).dtype for n in ("x", "e_c", "e_0")} == {torch.bfloat16}


def test_no_gradient_of_the_unet_and_no_second_one(
    run: Callable[..., Any], sd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sd()
    monkeypatch.setattr(type(model), "frozen", lambda *_a: pytest.fail("a frozen copy was made"))
    steps: list[bool] = []
    real = torch.optim.Adam.step

    def step(self: Any, *rest: Any) -> Any:
        steps.append(all(p.grad is None and not p.requires_grad for p in model.modules["unet"].parameters()))
        return real(self, *rest)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    run(model=model)
    assert steps and all(steps)


# --- retain prompts -----------------------------------------------------------------------------------------------
def test_our_list_is_long_and_names_nothing_twice() -> None:
    names = retain.everyday()
    assert len(names) >= 250
    assert len({n.lower() for n in names}) == len(names)
    assert all(n.isascii() and n == n.strip() and n for n in names)


@pytest.mark.parametrize(
    ("concept", "synonyms", "gone", "stays"),
    [
        ("fish", (), {"fish"}, {"goldfish", "cup"}),
        ("Watches", ("clocks",), {"watch", "pocket watch", "clock", "alarm clock"}, {"stopwatch"}),
        ("berry", ("strawberries",), {"strawberry"}, {"cherry"}),
        ("garbage truck", (), set(), {"trash can"}),
        ("a glass of wine", (), {"wine glass", "glasses", "glass jar"}, {"bottle"}),
    ],
)
def test_words_of_the_concept_go_in_singular_and_plural(
    sd: Callable[..., Any], concept: str, synonyms: tuple[str, ...], gone: set[str], stays: set[str]
) -> None:
    task = Task(name="t", concepts=(concept,), synonyms=synonyms)
    kept = retain.prompts(sd(), task, nearest=0.0)
    assert kept[0] == "" and len(set(kept)) == len(kept)
    names = {p.removeprefix("a photo of ") for p in kept}
    assert not gone & names and stays <= names


def test_the_nearest_by_the_model_s_own_embeddings_go(sd: Callable[..., Any], tmp_path: Path) -> None:
    model, path = sd(), tmp_path / "kept.txt"
    lines = [f"a photo of {w}" for w in ("bcd", "wq", "mno", "zw", "hij", "klm", "uvw", "efg", "rst", "ijk")]
    path.write_text("\n".join(lines))
    states = retain._embedded(model, [*lines, "a photo of zq"])
    states = torch.nn.functional.normalize(states - states[:-1].mean(0), dim=1)
    order = (states[:-1] @ states[-1]).argsort(descending=True).tolist()
    kept = retain.prompts(model, TASK, str(path), nearest=0.3)
    assert set(kept) == {"", *(lines[i] for i in order[3:])}


def test_embeddings_are_those_at_the_end_token(sd: Callable[..., Any]) -> None:
    model = sd()
    found = retain._embedded(model, ["zq", "abcd"])
    with torch.no_grad():
        states = model.encode(["zq", "abcd"]).states
    assert torch.equal(found, torch.stack([states[0, 3], states[1, 5]]))


def test_neighbours_are_said_as_the_concept_is() -> None:
    task = Task(name="t", kind="style", concepts=("neon",), prompts=("neon style", "a neon picture"), preserve=("mosaic", "sketch"))
    assert retain.neighbours(task) == ["mosaic style", "a mosaic picture", "sketch style", "a sketch picture"]
    assert retain.neighbours(replace(task, prompts=())) == ["mosaic", "sketch"]


@pytest.mark.parametrize("line", ["a photo of a Fish", "two fishes swim", "trout soup"])
def test_a_list_that_asks_for_the_concept_is_refused(sd: Callable[..., Any], tmp_path: Path, line: str) -> None:
    path = tmp_path / "kept.txt"
    path.write_text(f"a cup\n{line}\n")
    with pytest.raises(UsageError, match="to be forgotten"):
        retain.prompts(sd(), Task(name="t", concepts=("fish",), synonyms=("trout",)), str(path))


def test_a_filter_that_leaves_nothing_and_a_missing_file_are_refused(sd: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("a tow truck\na fire truck\n")
    with pytest.raises(UsageError, match="no retain prompt is left"):
        retain.prompts(sd(), Task(name="t", concepts=("garbage truck",)), str(path))
    with pytest.raises(UsageError, match="is no file"):
        retain.prompts(sd(), TASK, str(tmp_path / "none.txt"))


NAMED = ("everyday", "objects", "people", "scenes", "styles")


@pytest.mark.parametrize("name", NAMED)
def test_our_sets_by_name(sd: Callable[..., Any], name: str) -> None:
    kept = retain.prompts(sd(), TASK, name, 0.0)
    assert kept[0] == "" and len(kept) > 60 and len(set(kept)) == len(kept)
    assert all(p.endswith(" style") if name == "styles" else p.startswith("a photo of ") for p in kept[1:])
    both = retain.prompts(sd(), TASK, f"{name}+people", 0.0)
    assert set(kept) <= set(both) and "a photo of a nurse" in both


def test_words_of_a_template_are_no_reason_to_leave_a_prompt_out(sd: Callable[..., Any]) -> None:
    task = Task(name="t", kind="style", concepts=("photo style",))
    assert len(retain.prompts(sd(), task, "objects", 0.0)) > 300
    left = retain.prompts(sd(), Task(name="t", concepts=("mosaic style",)), "styles", 0.0)
    assert len(left) > 100 and "mosaic style" not in left


def test_without_the_filter_nothing_is_left_out(sd: Callable[..., Any], tmp_path: Path) -> None:
    task, path = Task(name="t", concepts=("fish",)), tmp_path / "kept.txt"
    path.write_text("a photo of a fish\na cup\n")
    whole = retain.prompts(sd(), task, f"everyday+{path}", 0.5, filtered=False)
    assert {"a photo of a fish", "a photo of fish", "a photo of goldfish", "a cup"} <= set(whole)
    assert len(whole) == 1 + len(retain.everyday()) + 2
    assert len(retain.prompts(sd(), task, "everyday", 0.5)) < 0.6 * len(whole)
    with pytest.raises(UsageError, match="to be forgotten"):
        retain.prompts(sd(), task, str(path))


def test_the_papers_sets_by_name(sd: Callable[..., Any]) -> None:
    coco, imagenet = (retain.prompts(sd(), TASK, name, 0.0) for name in ("coco_object", "imagenet"))
    assert len(coco) == 81 and {"a photo of bicycle", "a photo of toothbrush"} <= set(coco)
    assert 990 < len(imagenet) <= 1001 and "a photo of tench" in imagenet
    assert "a photo of tench" not in retain.prompts(sd(), Task(name="t", concepts=("tench",)), "imagenet", 0.0)


def test_the_release_s_table_of_prompts_is_read(sd: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "coco_object_retain.csv"
    path.write_text("case_num,source,prompt\n1,coco_object,a photo of chair\n2,coco_object,a photo of fridge\n")
    assert retain.prompts(sd(), TASK, str(path), 0.0) == ["", "a photo of chair", "a photo of fridge"]
    path.write_text("case_num,source\n1,coco_object\n")
    with pytest.raises(UsageError, match="no column 'prompt'"):
        retain.prompts(sd(), TASK, str(path), 0.0)


def test_class_names_of_a_data_set_of_the_hub(sd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def builder(name: str, chosen: str | None) -> Any:
        asked.append((name, chosen))
        if "nowhere" in name:
            raise ConnectionError("offline")
        features = {"label": datasets.ClassLabel(names=["cup", "zq vase"])} if "bare" not in name else None
        return SimpleNamespace(info=SimpleNamespace(features=features))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    assert retain.prompts(sd(), TASK, "hub:us/things:small", 0.0) == ["", "a photo of cup"]
    assert asked == [("us/things", "small")]
    for name, message in (("hub:us/nowhere", r"cannot be read \(offline\)"), ("hub:us/bare", "has no class names")):
        with pytest.raises(UsageError, match=message):
            retain.prompts(sd(), TASK, name, 0.0)


# --- the pool -----------------------------------------------------------------------------------------------------
RECIPE = pool.Recipe(steps=4, guidance=3.0, trajectories=3)
SAID, OTHERS = ["zq", "zq sky"], ["", "ab"]


def opened(model: Any, said: Any = SAID, others: Any = OTHERS, recipe: pool.Recipe = RECIPE, **how: Any) -> tuple[pool.Pool, pool.Spent]:
    torch.manual_seed(1)
    return pool.opened(model, said, others, recipe, **how)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNLEARNERS_CACHE", str(tmp_path))
    return tmp_path / "pools"


def equal(a: pool.Pool, b: pool.Pool) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("x", "t", "e_c", "e_0", "first"))


def test_targets_are_the_model_s_own_predictions(sd: Callable[..., Any], home: Path) -> None:
    model = sd()
    found, _ = opened(model)
    prompts = [*SAID, *OTHERS]
    assert found.first.tolist() == [0, 8, 16, 20, 24]  # two trajectories of each concept prompt, one of each other, four states each
    for p, prompt in enumerate(prompts):
        x, t, e_c, e_0 = found.draw([p] * 5)
        with torch.no_grad():
            assert torch.allclose(e_c, model.eps(x, t, model.encode([prompt]).repeat(5)), atol=1e-5)
            if p < 2:
                assert torch.allclose(e_0, model.eps(x, t, model.encode([""]).repeat(5)), atol=1e-5)
    assert set(found.t.tolist()) == {751, 501, 251, 1}


def test_late_times_are_later_and_the_targets_are_of_them(sd: Callable[..., Any], home: Path) -> None:
    model = sd()
    (plain, _), (late, _) = opened(model), opened(model, recipe=replace(RECIPE, told="late"))
    assert torch.equal(plain.x, late.x)
    gap = late.t - plain.t
    assert bool(((gap >= 499) & (gap < 749) | (late.t == 999)).all())
    x, t, e_c, _ = late.draw([0] * 4)
    with torch.no_grad():
        assert torch.allclose(e_c, model.eps(x, t, model.encode(["zq"]).repeat(4)), atol=1e-5)


def test_a_found_pool_is_the_built_one_and_global_random_numbers_stay(sd: Callable[..., Any], home: Path) -> None:
    built, spent = opened(sd())
    after = torch.rand(3)
    found, again = opened(sd())
    assert torch.equal(after, torch.rand(3))
    assert equal(built, found)
    assert spent.before == 0 and again.before > 0
    assert set(again.row) == {"pool_seconds", "cached_seconds"} and again.row["pool_seconds"] > again.row["cached_seconds"]
    assert equal(found, opened(sd(), cache=False)[0])
    assert len(list(home.iterdir())) == 1


def test_a_run_on_a_found_pool_is_the_run_that_built_it(run: Callable[..., Any], home: Path) -> None:
    (first, rows), (second, again) = run(), run()
    assert same(first, second)
    assert "cached_seconds" not in rows[0] and again[0]["cached_seconds"] > 0
    assert [r["loss"] for r in rows] == [r["loss"] for r in again]


@pytest.mark.parametrize("damage", ["cut", "bits", "garbage", "empty"])
def test_a_damaged_pool_is_built_anew(sd: Callable[..., Any], home: Path, damage: str) -> None:
    built, _ = opened(sd())
    x = built.x.clone()
    (file,) = home.iterdir()
    raw = bytearray(file.read_bytes())
    if damage == "bits":
        raw[-5] ^= 0x40
    os.replace(home / file.name, home / "old")
    file.write_bytes(bytes({"cut": raw[: len(raw) // 2], "bits": raw, "garbage": b"no pool" * 99, "empty": b""}[damage]))
    again, spent = opened(sd())
    assert spent.before == 0
    assert torch.equal(again.x, x)
    assert opened(sd())[1].before > 0  # and it has been mended


def test_a_pool_of_another_base_is_never_used(sd: Callable[..., Any], home: Path) -> None:
    opened(sd(seed=1))
    (file,) = home.iterdir()
    fresh, spent = opened(sd(seed=2))
    assert spent.before == 0
    (new,) = set(home.iterdir()) - {file}
    os.replace(file, new)  # the other's file under this one's name
    again, spent = opened(sd(seed=2))
    assert spent.before == 0
    assert equal(fresh, again)
    with safe_open(new, framework="pt") as there:
        tensors, about = {n: there.get_tensor(n) for n in there.keys()}, there.metadata()  # noqa: SIM118
    save_file({n: t.clone() for n, t in tensors.items() if n != "e_0"}, new, about)
    assert opened(sd(seed=2))[1].before == 0


def test_every_part_of_the_request_makes_another_pool(sd: Callable[..., Any], home: Path) -> None:
    opened(sd())
    opened(sd(), ["zq", "zq sea"])
    opened(sd(), SAID, ["", "cd"])
    opened(sd(), [*SAID, ""], ["ab"])  # the same prompts, another share of them concepts
    opened(sd(), recipe=replace(RECIPE, guidance=2.0))
    opened(sd(prediction="v_prediction"))
    torch.manual_seed(2)
    pool.opened(sd(), SAID, OTHERS, RECIPE)
    assert len(list(home.iterdir())) == 7


def test_a_smaller_pool_keeps_fewer_states_spread_over_the_trajectory(sd: Callable[..., Any], home: Path) -> None:
    recipe = pool.Recipe(steps=8, guidance=3.0, trajectories=2)
    whole, _ = opened(sd(), ["zq"], ["ab"], recipe)
    size = (8 * 8 * 4 * 4) * (2 * 3 + 2)  # bytes of one state of each trajectory
    part, _ = opened(sd(), ["zq"], ["ab"], replace(recipe, gb=4.5 * size / 1e9))
    assert len(part.x) == 3 * 4
    assert (part.x.nbytes + part.e_c.nbytes + part.e_0.nbytes) <= 4.5 * size
    for m in range(3):
        steps = [(1000 - int(t)) // 125 for t in part.t[4 * m : 4 * m + 4]]
        assert [s // 2 for s in steps] == [0, 1, 2, 3]  # one of every two
        for row in range(4 * m, 4 * m + 4):
            assert any(torch.equal(part.x[row], x) for x in whole.x[8 * m : 8 * m + 8])
    with pytest.raises(UsageError, match="pool_gb"):
        opened(sd(), ["zq"], ["ab"], replace(recipe, gb=0.5 * size / 1e9))


def test_the_oldest_pools_are_dropped(sd: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    for i, other in enumerate(("ab", "cd", "ef")):
        opened(sd(), SAID, [other])
        (new,) = {f.name for f in home.iterdir()} - set(names)
        names.append(new)
        os.utime(home / new, (1000 + i, 1000 + i))
    opened(sd(), SAID, ["ab"])  # used again, so it is the newest
    size = (home / names[0]).stat().st_size
    monkeypatch.setattr(keep, "FOLDER_GB", 2.5 * size / 1e9)
    opened(sd(), SAID, ["gh"])
    left = {f.name for f in home.iterdir()}
    assert names[0] in left and not {names[1], names[2]} & left and len(left) == 2


def test_every_prompt_is_dealt_once_before_any_comes_again(sd: Callable[..., Any], home: Path) -> None:
    states, _ = opened(sd(), ["zq"], ["a", "b", "c", "d", "e"])
    torch.manual_seed(0)
    dealt = [p for _ in range(5) for p in states.deal(2, range(1, 6))]
    assert sorted(dealt[:5]) == sorted(dealt[5:]) == [1, 2, 3, 4, 5]


# --- resuming -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fields", [{}, {"init": "latest", "params": "xattn"}])
def test_a_resumed_run_is_the_uninterrupted_one(
    run: Callable[..., Any], sd: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, fields: Any
) -> None:
    monkeypatch.setattr("unlearners.session.CHECKPOINT_SECONDS", 0)
    whole, _ = run(steps=6, **fields)
    method = AdvUnlearn(**(QUICK | {"retain_set": listed, "steps": 6} | fields))

    class Stop(Exception):
        pass

    def stop(row: dict[str, float], seen: list[int] = []) -> None:  # noqa: B006
        seen.append(1)
        if len(seen) == 4:
            raise Stop

    model = sd()
    (tmp_path / "run").mkdir()
    model.session = FolderSession(tmp_path / "run", None)
    with pytest.raises(Stop):
        method(model, TASK, seed=3, log=stop)
    model = sd()
    model.session = FolderSession(tmp_path / "run", None)
    rows: list[Any] = []
    method(model, TASK, seed=3, log=rows.append)
    assert len(rows) < 6
    assert same(model, whole)


@pytest.mark.parametrize(
    "fields",
    [
        *({name: 0} for name in ("steps", "k", "restarts", "attack_every")),
        *({name: -1.0} for name in ("gamma", "null_share")),
        {"nearest": 1.0},
        {"attack_steps": -1},
        {"null_share": 1.5},
    ],
)
def test_settings_without_a_meaning_are_refused(fields: Any) -> None:
    with pytest.raises(UsageError, match="at least"):
        AdvUnlearn(**fields)
