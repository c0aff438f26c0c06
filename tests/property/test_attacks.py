"""Attacks cannot lie, find what is planted, and the pieces of the search keep their promises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlearners import config
from unlearners.attacks import unlearndiffatk
from unlearners.attacks._search import draw, simplex, slots, stream
from unlearners.attacks.ensemble import Ensemble
from unlearners.attacks.p4d import P4D
from unlearners.attacks.random_tokens import RandomTokens
from unlearners.attacks.unlearndiffatk import UnlearnDiffAtk
from unlearners.base import Adversarial, Attack, Hit, Item, Judge, Row, Task, Verdict, settle
from unlearners.diffusion import Cond, Soft
from unlearners.errors import UnlearnError, UsageError
from unlearners.metrics.asr import ASR
from unlearners.metrics.pre_asr import PreASR
from unlearners.places import before, laid
from unlearners.targets.base import TextToImage
from unlearners.targets.stable_diffusion import StableDiffusion

TASK = Task(name="planted", concepts=("trigger",))
START, END, TRIGGER = 0, 1, 77


class Planted(TextToImage):
    """Words are "w<id>". The prediction error is the distance of the nearest slot to the trigger's embedding; the picture is
    white when the trigger is in the prompt, else black."""

    vocabulary, length, train_steps = 400, 10, 1000
    latent_shape = (4, 2, 2)

    def __init__(self, seed: int = 0) -> None:
        table = torch.randn(self.vocabulary, 16, generator=torch.Generator().manual_seed(seed))
        self.modules = {"text_encoder": nn.Embedding.from_pretrained(table / table.norm(dim=1, keepdim=True))}
        self.device, self.base = torch.device("cpu"), {"name": "planted"}
        self.special, self.sampler = {START, END}, {"steps": 1, "guidance": 1.0}

    @classmethod
    def load(cls, spec: str, **options: Any) -> Planted:
        return cls()

    @classmethod
    def tiny(cls, seed: int = 0) -> Planted:
        return cls(seed)

    def patch(self, patches: Sequence[str], *, force: bool = False) -> None:
        pass

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        return torch.zeros(())

    def relabel(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return batch

    def embed(self) -> Tensor:
        return self.modules["text_encoder"].weight

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        rows = [[START, *(int(w[1:]) for w in p.split())][: self.length - 1] for p in prompts]
        return torch.tensor([r + [END] * (self.length - len(r)) for r in rows])

    def decode(self, ids: Tensor) -> str:
        return " ".join(f"w{i}" for i in ids.tolist() if i not in self.special)

    def encode(self, prompts: Any, soft: Soft | None = None) -> Cond:
        ids = prompts if isinstance(prompts, Tensor) else self.tokens(prompts)
        states = self.embed()[ids]
        if soft is not None:
            states = soft.put(states)
        return Cond(states)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def goal(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def eps(self, x_t: Tensor, t: Any, cond: Cond) -> Tensor:
        distance = (cond.states - self.embed()[TRIGGER]).norm(dim=-1).amin(1)
        return x_t + distance[:, None, None, None]

    def latents(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 4, 2, 2)

    def sample(self, prompts: Any, seeds: Sequence[int], **options: Any) -> Tensor:
        return (self.tokens(prompts) == TRIGGER).any(1).float()[:, None, None, None].expand(-1, 3, 2, 2)

    def replay(self, proposals: Sequence[Adversarial], seeds: Sequence[int]) -> Tensor:
        return self.sample([a.prompt for a in proposals], seeds)

    def spell(self, adversarial: Adversarial) -> str:
        return adversarial.prompt or ""


@dataclass(frozen=True, kw_only=True)
class White(Judge):
    """Recognises white pictures."""

    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        return ["trigger" if x.mean() > 0.5 else "" for x in images]


@dataclass(frozen=True, kw_only=True)
class Never(Judge):
    """Recognises nothing."""

    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        return [""] * len(images)


@dataclass(frozen=True, kw_only=True)
class Silent(Attack):
    """Claims success in its log and asks nobody."""

    needs, access = TextToImage, "black"

    def run(self, target: Any, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        yield {"success": 1.0, "left": 0.0}


@dataclass(frozen=True, kw_only=True)
class Knows(Attack):
    """Puts the trigger before the prompt, and asks as often as told."""

    needs, access = TextToImage, "black"
    ask: bool = True

    def run(self, target: Any, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        proposals = {i: Adversarial(prompt=f"w{TRIGGER} {item.prompt}") for i, item in enumerate(items)}
        for _ in range(3 * self.ask):
            hit(proposals)
        yield {"left": 0.0}


def items(n: int, *, broken: int = 0) -> list[Item]:
    """``n`` prompts, of which the first ``broken`` name the trigger themselves."""
    picture = torch.ones(1, 3, 2, 2)
    return [Item(prompt=f"w{TRIGGER if i < broken else 10 + i} w5", seed=i, picture=picture) for i in range(n)]


@dataclass
class Seen:
    verdicts: Mapping[str, Sequence[Verdict]]
    record: Mapping[str, Any]


def rates(verdicts: list[Verdict]) -> tuple[float, float]:
    """(ASR, pre-ASR) in percent."""
    seen: Any = Seen({"a": verdicts}, {})
    asr, before = ASR().score(Planted(), TASK, seen), PreASR().score(Planted(), TASK, seen)
    assert isinstance(asr, dict) and isinstance(before, dict)
    return asr["a"].value, before["a"].value


def test_an_attack_that_never_asks_gains_nothing() -> None:
    asr, before = rates(Silent()(Planted(), TASK, White(), items(5, broken=2)))
    assert asr == before == 40.0
    assert rates(Silent()(Planted(), TASK, White(), items(5))) == (0.0, 0.0)


class Clean(Attack):
    """Proposes each prompt as it is, on a real pipeline."""

    needs, access = TextToImage, "black"

    def run(self, target: Any, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        won = hit({i: Adversarial(prompt=item.prompt) for i, item in enumerate(items)})
        yield {"left": float(len(items) - len(won))}


def test_the_plain_prompts_gain_nothing_beyond_what_they_show_before() -> None:
    target, asked = StableDiffusion.tiny(), [Item(prompt=p, seed=i) for i, p in enumerate(("a", "b c", "d", "e f"))]
    level = target.sample([i.prompt for i in asked], [i.seed for i in asked]).mean((1, 2, 3)).sort().values[1:3].mean()

    class Bright(Judge):
        """The concept is a picture brighter than half of the plain ones."""

        def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
            return ["trigger" if x.mean() > level else "" for x in images]

    verdicts = Clean()(target, TASK, Bright(), asked)
    asr, before = rates(verdicts)
    assert asr == before == 50.0 and sum(v.queries for v in verdicts) == 2


def test_success_needs_hit() -> None:
    assert rates(Knows(ask=False)(Planted(), TASK, White(), items(4, broken=1))) == (25.0, 25.0)
    verdicts = Knows()(Planted(), TASK, White(), items(4, broken=1))
    assert rates(verdicts) == (100.0, 25.0)
    assert [v.queries for v in verdicts] == [0, 1, 1, 1], "prompts that are broken cost no more queries"
    assert verdicts[1].level == "prompt" and verdicts[1].adversarial.startswith(f"w{TRIGGER} ")
    assert rates(Knows()(Planted(), TASK, Never(), items(4))) == (0.0, 0.0)


def test_the_search_finds_a_planted_trigger_with_half_the_queries_of_chance() -> None:
    searched = UnlearnDiffAtk(k=2, timesteps=20, iterations=20)(Planted(), TASK, White(), items(6))
    guessed = RandomTokens(k=2, tries=20)(Planted(), TASK, White(), items(6))
    assert all(v.success and f"w{TRIGGER}" in v.adversarial.split() for v in searched)
    assert 2 * sum(v.queries for v in searched) <= sum(v.queries for v in guessed)


@pytest.mark.parametrize("attack", [UnlearnDiffAtk(k=2, timesteps=3, iterations=4, batch=2), RandomTokens(k=2, tries=3)])
def test_the_same_seed_gives_the_same_attack_and_no_trace_is_left(attack: Any) -> None:
    target, before = Planted(), torch.random.get_rng_state()
    weight = target.embed().clone()
    first, other = (proposals(attack, target, seed=s) for s in (0, 1))
    assert first == proposals(attack, target, seed=0) and first != other
    assert torch.equal(torch.random.get_rng_state(), before) and torch.equal(target.embed(), weight)
    assert target.embed().grad is None


def proposals(
    attack: Any, target: TextToImage, seed: int = 0, which: Sequence[int] = range(5), task: Task = TASK
) -> dict[int, list[str | None]]:
    """Everything ``attack`` proposes, by image seed."""
    subset = [items(5)[i] for i in which]
    asked: dict[int, list[str | None]] = {i: [] for i in which}

    @dataclass(frozen=True, kw_only=True)
    class Spy(Attack):
        needs, access = TextToImage, "white"

        def run(self, target: Any, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
            def listen(given: Mapping[int, Adversarial]) -> set[int]:
                for i, a in given.items():
                    asked[items[i].seed].append(a.prompt)
                return hit(given)

            yield from settle(attack, target, task).run(target, task, items, listen)

    Spy()(target, task, Never(), subset, seed=seed)
    return asked


@pytest.mark.parametrize("attack", [UnlearnDiffAtk(k=2, timesteps=3, iterations=4), RandomTokens(k=2, tries=3)])
def test_a_prompts_attack_does_not_depend_on_the_others(attack: Any) -> None:
    together = proposals(attack, Planted())
    assert all(len(asked) == 3 for asked in together.values())
    assert proposals(attack, Planted(), which=[3, 1]) == {3: together[3], 1: together[1]}
    if isinstance(attack, UnlearnDiffAtk):
        assert proposals(replace(attack, batch=2), Planted()) == together


def test_broken_prompts_leave_the_batch_and_the_others_go_on_as_before() -> None:
    attack, seen = UnlearnDiffAtk(k=2, timesteps=4, iterations=3), []

    def run(drop: int) -> dict[int, list[str | None]]:
        asked: dict[int, list[str | None]] = {i: [] for i in range(3)}

        def hit(given: Mapping[int, Adversarial]) -> set[int]:
            for i, a in given.items():
                asked[i].append(a.prompt)
            return {drop} & set(given)

        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            seen.append([row["left"] for row in attack.run(Planted(), TASK, items(3), hit)])
        return asked

    kept, dropped = run(-1), run(1)
    assert seen == [[3.0] * 4, [2.0] * 4]
    assert dropped[1] == kept[1][:1] and (dropped[0], dropped[2]) == (kept[0], kept[2])


def test_random_tokens_draws_ordinary_tokens_only() -> None:
    words = " ".join(p or "" for asked in proposals(RandomTokens(k=3, tries=40), Planted()).values() for p in asked).split()
    assert len(words) == 5 * 40 * 5 and not {f"w{i}" for i in Planted().special} & set(words)


# --- the search variable ------------------------------------------------------------------------------------------
def bisected(u: Tensor) -> Tensor:
    """The projection of one row (V,) as the authors do it, in float64 to the last bit."""
    low, high = u.min() - 1, u.max()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if (u - tau).clamp(min=0).sum() > 1 else (low, tau)
    return (u - high).clamp(min=0)


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=40))
def test_projection_is_the_bisected_one(values: list[float]) -> None:
    u = torch.tensor(values, dtype=torch.float64)
    v = simplex(u)
    assert torch.allclose(v, bisected(u), atol=1e-9)
    assert (v >= 0).all() and abs(v.sum().item() - 1) < 1e-9
    assert torch.allclose(simplex(v), v, atol=1e-12)
    top = u == u.max()
    assert v[top].min() == v.max(), "what was most likely stays most likely"
    assert torch.allclose(simplex(u.float()).double(), v, atol=1e-5)


def test_projection_at_the_size_of_a_real_vocabulary() -> None:
    u = torch.full((2, 49408), 1 / 49408) + 0.01 * torch.randn(2, 49408, generator=torch.Generator().manual_seed(0))
    v = simplex(u)
    assert torch.allclose(v.sum(-1), torch.ones(2), atol=1e-5) and (v >= 0).all()
    assert torch.allclose(v[0].double(), bisected(u[0].double()), atol=1e-7)


def test_draw_follows_the_distribution() -> None:
    u = simplex(torch.tensor([0.5, -1.0, 0.2, 0.3, -2.0])).expand(1, 4000, 5)
    counts = torch.bincount(draw(u, [torch.Generator().manual_seed(0)]).flatten(), minlength=5) / 4000
    assert counts[1] == counts[4] == 0
    assert torch.allclose(counts, u[0, 0], atol=0.03)


def test_streams_differ_by_seed_prompt_and_picture() -> None:
    def first(seed: int, item: Item) -> float:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return torch.rand((), generator=stream(item)).item()

    a, b, c = Item(prompt="a", seed=0), Item(prompt="b", seed=0), Item(prompt="a", seed=1)
    assert first(0, a) == first(0, a) and len({first(0, a), first(1, a), first(0, b), first(0, c)}) == 4


def test_slots_are_built_from_tokens_and_keep_the_end() -> None:
    target = Planted()
    (short, long), at = slots(target, ["w5 w6", " ".join(f"w{i}" for i in range(20, 40))], 3)
    assert short.tolist() == [START, 0, 0, 0, 5, 6, END, END, END, END]
    assert long.tolist() == [START, 0, 0, 0, 20, 21, 22, 23, 24, END]
    assert at.tolist() == [[1, 2, 3]] * 2
    with pytest.raises(UsageError, match="k = 9"):
        slots(target, ["w5"], 9)


@pytest.mark.parametrize(("kind", "k"), [("style", 3), ("object", 3), ("identity", 3), ("nsfw", 5)])
def test_how_many_tokens_goes_by_kind(kind: Any, k: int) -> None:
    task, target = replace(TASK, kind=kind), Planted()
    assert settle(UnlearnDiffAtk(), target, task).k == settle(RandomTokens(), target, task).k == k
    assert settle(UnlearnDiffAtk(k=4), target, task).k == settle(RandomTokens(k=4), target, task).k == 4
    assert settle(P4D(**P4D.presets["mu-attack"]), target, task).n == k
    assert settle(P4D(n="auto"), target, task).n == P4D().n == 16
    assert [len(str(a).split()) - 2 for a in proposals(RandomTokens(tries=1), target, task=task)[0]] == [k]


def test_the_canvas_setting_is_the_one_of_the_committed_tables() -> None:
    """Three tokens before the prompt, whatever the kind, and the same settings in the record."""
    attack = UnlearnDiffAtk(**UnlearnDiffAtk.presets["canvas"])
    assert settle(attack, Planted(), replace(TASK, kind="nsfw")).k == 3
    assert config.to_dict(attack) == {
        "k": 3, "timesteps": 10, "iterations": 16, "lr": 0.01, "weight_decay": 0.1, "batch": 64,
    }  # fmt: skip


# --- placements ---------------------------------------------------------------------------------------------------
PLACES = {  # of two tokens and a prompt of five, from the authors' description
    "prefix": "..12345", "suffix": "12345..", "mid": "12..345", "insert": "1.2.345", "per-k-words": ".123.45",
}  # fmt: skip


@pytest.mark.parametrize(("place", "wanted"), PLACES.items())
def test_where_searched_tokens_go(place: Any, wanted: str) -> None:
    row, at = laid([1, 2, 3, 4, 5], before(5, 2, place))
    assert "".join(str(i or ".") for i in row) == wanted
    assert at == [1 + i for i, c in enumerate(wanted) if c == "."]


@settings(deadline=None)
@given(st.integers(0, 12), st.integers(1, 6), st.sampled_from(sorted(PLACES)))
def test_the_prompt_is_kept_in_order_and_every_token_has_a_slot(n: int, k: int, place: Any) -> None:
    row, at = laid(list(range(100, 100 + n)), before(n, k, place), filler=7)
    assert [i for i in row if i != 7] == list(range(100, 100 + n)) and row.count(7) == k
    assert at == [1 + j for j, i in enumerate(row) if i == 7]


@pytest.mark.parametrize("place", sorted(PLACES))
def test_what_is_typed_is_what_was_searched(place: Any) -> None:
    """The proposal, read again, has the searched tokens in the slots and the prompt in the others, cut where it leaves no room."""
    for prompt in ("w10 w11 w12 w13", " ".join(f"w{i}" for i in range(20, 40))):
        target, asked, put = Planted(), [], []
        item = Item(prompt=prompt, seed=0, picture=torch.ones(1, 3, 2, 2))
        attack = UnlearnDiffAtk(k=2, timesteps=3, iterations=10, place=place)
        real = unlearndiffatk.insert

        def spy(ids: Tensor, at: Tensor, s: Tensor, *, real: Any = real, put: Any = put) -> Tensor:
            put.append((real(ids, at, s), at))
            return put[-1][0]

        def hit(given: Mapping[int, Adversarial], *, asked: Any = asked) -> set[int]:
            asked.extend(a.prompt for a in given.values())
            return set()

        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng([]):
            patch.setattr(unlearndiffatk, "insert", spy)
            list(attack.run(target, TASK, [item], hit))
        own = target.tokens([prompt])[0, 1:].tolist()
        own = own[: min(own.index(END), target.length - 2 - 2)]
        for text, (ids, at) in zip(asked, put, strict=True):
            found, wanted = target.tokens([text])[0].tolist(), [i for i in ids[0].tolist() if i not in target.special]
            assert [i for i in found if i not in target.special] == wanted, "typed as searched, without start and end"
            assert ids[0, [i for i in range(1, 1 + len(own) + 2) if i not in at[0].tolist()]].tolist() == own
            assert at[0].tolist() == laid(own, before(len(own), 2, place))[1]


def test_a_random_start_is_another_search_on_the_simplex(monkeypatch: pytest.MonkeyPatch) -> None:
    attack, target, starts = UnlearnDiffAtk(k=2, timesteps=1, iterations=1), Planted(), []
    real = unlearndiffatk.draw

    def spy(u: Tensor, rng: Any) -> Tensor:
        starts.append(u.clone())
        return real(u, rng)

    monkeypatch.setattr(unlearndiffatk, "draw", spy)
    uniform, random = proposals(attack, target), proposals(replace(attack, rand_init=True), target)
    assert uniform != random and random == proposals(replace(attack, rand_init=True), target)
    assert torch.allclose(starts[0], torch.full_like(starts[0], 1 / target.vocabulary))
    assert starts[1].std() > starts[0].std() and torch.allclose(starts[1].sum(-1), torch.ones(5, 2)) and (starts[1] >= 0).all()
    one = proposals(replace(attack, rand_init=True), target, which=[3])
    assert one[3] == random[3], "the start is the prompt's own"


def test_presets_follow_the_paper() -> None:
    paper = UnlearnDiffAtk(**UnlearnDiffAtk.presets["paper"])
    assert paper == UnlearnDiffAtk() and paper.lr == 0.01 and paper.weight_decay == 0.1
    paper = replace(paper, k=3)
    seen = []
    with torch.random.fork_rng([]):
        seen = [row["t"] for row in replace(paper, iterations=1).run(Planted(), TASK, items(1), lambda given: set())]
    assert seen == [10.0 + 20 * n for n in range(50)]


# --- real classes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", [{}, {"prediction": "v_prediction"}, {"xl": True}], ids=str)
def test_both_attacks_run_on_stable_diffusion(layout: Any) -> None:
    target = StableDiffusion.tiny(**layout)
    task = [Item(prompt=p, seed=3, picture=torch.rand(1, 3, 16, 16)) for p in ("a cat", "a dog")]
    rows: list[Row] = []
    for attack in (UnlearnDiffAtk(k=2, timesteps=2, iterations=2), RandomTokens(k=2, tries=2)):
        verdicts = attack(target, TASK, Never(), task, log=rows.append)
        assert [v.queries for v in verdicts] == [2, 2]
    assert [r["t"] for r in rows[:2]] == [250.0, 750.0] and all(p.grad is None for p in target.named().values())


@pytest.mark.parametrize("place", sorted(PLACES))
def test_the_ensemble_with_unlearndiffatk_runs_on_sdxl(place: Any) -> None:
    target, task = StableDiffusion.tiny(xl=True), [Item(prompt="a cat", seed=3, picture=torch.rand(1, 3, 16, 16))]
    few = {"timesteps": 2, "iterations": 1}
    verdicts = UnlearnDiffAtk(place=place, **few)(target, TASK, Never(), task)
    assert [v.queries for v in verdicts] == [2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(UnlearnDiffAtk.presets, "brief", few)  # type: ignore[index]
        found = Ensemble(members=("random_tokens:fast", "unlearndiffatk:brief"))(target, TASK, Never(), task)
    assert [v.queries for v in found] == [12]


def test_missing_pictures_and_wrong_families_are_refused_in_one_sentence() -> None:
    with pytest.raises(UnlearnError, match=r"picture of 'w5'"):
        UnlearnDiffAtk()(Planted(), TASK, Never(), [Item(prompt="w5", seed=0)])


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "xl"])
def test_an_embedding_that_is_a_token_draws_what_the_token_draws(xl: bool) -> None:
    target = StableDiffusion.tiny(xl=xl)
    tokens = target.tokens(["a b"])[0]
    own = [target.modules[c].get_input_embeddings().weight[tokens[1]] for c in target.modules if c.startswith("text_encoder")]  # type: ignore[operator]
    other = tokens.clone()
    other[1] = tokens[2]
    typed, soft = Adversarial(tokens=tokens), Adversarial(tokens=other, embedding=torch.cat(own)[None].detach(), at=1)
    pictures = target.replay([typed, soft, Adversarial(tokens=other)], [3, 3, 3])
    torch.testing.assert_close(pictures[0], pictures[1])
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-3)


def test_the_picture_of_what_was_found_is_given_to_who_asks() -> None:
    seen: dict[int, Tensor] = {}
    verdicts = RandomTokens(tries=400)(Planted(), TASK, White(), items(3), found=seen.__setitem__)
    assert set(seen) == {i for i, v in enumerate(verdicts) if v.success and not v.before}
    assert seen and all(bool((picture == 1).all()) for picture in seen.values()), "white is what the judge looks for"
