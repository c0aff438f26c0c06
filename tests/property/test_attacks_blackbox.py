"""The attacks that need no gradient of the victim, and TINA: their searches keep their promises, and the ensemble is the worst case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlearners import config
from unlearners.attacks import ensemble, mma, paraphrase, ring_a_bell
from unlearners.attacks._text import framed, free, names, plain, pooled, typed
from unlearners.attacks.ensemble import Ensemble
from unlearners.attacks.mma import MMA
from unlearners.attacks.paraphrase import FRAMES, Paraphrase, said_otherwise, words
from unlearners.attacks.random_tokens import RandomTokens
from unlearners.attacks.ring_a_bell import RingABell, breed
from unlearners.attacks.seed_search import SeedSearch
from unlearners.attacks.tina import TINA
from unlearners.attacks.unlearndiffatk import UnlearnDiffAtk
from unlearners.base import Adversarial, Attack, Hit, Item, Judge, Probe, Row, Task, Verdict
from unlearners.diffusion import denoise
from unlearners.errors import UsageError
from unlearners.targets.base import TextToImage
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.tasks import load

TASK = Task(name="t", kind="style", concepts=("neon",), synonyms=("glowing",))


@dataclass(frozen=True, kw_only=True)
class Never(Judge):
    """Recognises nothing."""

    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        return [""] * len(images)


@dataclass(frozen=True, kw_only=True)
class White(Judge):
    """Recognises white pictures."""

    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        return [task.concepts[0] if x.mean() > 0.5 else "" for x in images]


def tiny(**how: Any) -> StableDiffusion:
    """A tiny model with four steps of sampling, whose original is itself."""
    target = StableDiffusion.tiny(**how)
    target.sampler = {"steps": 4, "guidance": 2.0}
    target.original = lambda: target
    return target


def items(n: int = 3) -> list[Item]:
    g = torch.Generator().manual_seed(0)
    return [Item(prompt=f"a cup {'xyz'[i % 3]} neon", seed=10 + i, picture=torch.rand(1, 3, 16, 16, generator=g)) for i in range(n)]


def proposed(attack: Attack, target: Any, which: Sequence[Item], *, size: int = 0) -> tuple[dict[int, list[Adversarial]], list[Row]]:
    """All that ``attack`` proposes for each prompt, by image seed, ``size`` prompts together (0: all); and what it logs."""
    asked: dict[int, list[Adversarial]] = {i.seed: [] for i in which}
    rows: list[Row] = []
    for first in range(0, len(which), size or len(which)):
        part = which[first : first + (size or len(which))]

        def hit(given: Mapping[int, Adversarial], part: Sequence[Item] = part) -> set[int]:
            for i, a in given.items():
                asked[part[i].seed].append(a)
            return set()

        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            rows += attack.run(target, TASK, part, hit)
    return asked, rows


# --- Ring-A-Bell --------------------------------------------------------------------------------------------------
@settings(max_examples=60)
@given(st.integers(2, 9), st.integers(1, 6), st.integers(0, 9), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_a_generation_keeps_the_elite_and_its_size(h: int, k: int, more: int, crossover: float, mutation: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    elite, fresh = torch.arange(h * k).reshape(h, k), torch.arange(1000, 1010)
    before = elite.clone()
    young = breed(elite, h + more, crossover, mutation, fresh, g)
    assert young.shape == (h + more, k)
    assert torch.equal(young[:h], before) and torch.equal(elite, before), "the elite comes first, as it was"
    for child in young[h:]:
        assert int((child >= 1000).sum()) <= 1, "at most one token of a child is new"
        kept = child[child < 1000]
        assert torch.equal(kept % k, torch.arange(k)[child < 1000]), "a token stays in its place"
        parents = (kept // k).tolist()
        changes = sum(a != b for a, b in pairwise(parents))
        assert len(set(parents)) <= 2 and changes <= 1, "one cut between two parents"


def test_without_mutation_couples_have_two_children_that_share_all_their_tokens() -> None:
    elite = torch.arange(40).reshape(10, 4)
    young = breed(elite, 20, 0.5, 0.0, torch.tensor([99]), torch.Generator().manual_seed(0))[10:]
    assert (young < 40).all()
    for one, other in zip(young[:5], young[5:10], strict=True):
        a, b = one[0] // 4, other[0] // 4
        assert {*one.tolist(), *other.tolist()} == {*elite[a].tolist(), *elite[b].tolist()}
    all_new = breed(elite, 20, 0.5, 1.0, torch.tensor([99]), torch.Generator().manual_seed(0))[10:]
    assert ((all_new == 99).sum(1) == 1).all()


def test_the_search_reads_ordinary_tokens_only_and_never_loses_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    distance = ring_a_bell._distance
    monkeypatch.setattr(ring_a_bell, "_distance", lambda old, s, goal: (read.append(s), distance(old, s, goal))[1])
    target, attack = tiny(), RingABell(k=5, population=10, iterations=12)
    asked, rows = proposed(attack, target, items(2))
    assert not torch.isin(torch.cat(read), torch.tensor(sorted(target.special))).any()
    found = [r["distance"] for r in rows]
    assert len(found) == 12 and found == sorted(found, reverse=True) and found[-1] < found[0]
    assert [len(s) for s in read] == [10, 10] + [5] * 24, "the better half is not read again"
    assert all(len(a) == 1 and a[0].prompt for a in asked.values())


# --- MMA ----------------------------------------------------------------------------------------------------------
def test_candidates_hold_no_banned_word_and_the_best_never_gets_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Tensor] = []
    loss = mma._loss
    monkeypatch.setattr(mma, "_loss", lambda old, s, tau: (read.append(s), loss(old, s, tau))[1])
    target = tiny()
    asked, rows = proposed(MMA(k=4, iterations=10, top=20, candidates=24), target, items(2))
    own = set(target.tokens(["neon"]).flatten().tolist()) | target.special
    assert not torch.isin(torch.cat(read), torch.tensor(sorted(own))).any()
    best = [r["loss"] for r in rows]
    assert best == sorted(best, reverse=True) and best[-1] < best[0]
    for (a,), item in zip(asked.values(), items(2), strict=True):
        assert a.prompt and "neon" not in a.prompt.lower()
        ids = target.tokens([a.prompt, item.prompt])
        vectors = pooled(target, target.encode(ids), ids)
        reached = 1 - torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:]).item()
        assert reached <= max(best) * 2 + 1e-5, "what is typed is read as what was searched"


def test_words_are_banned_in_tokens_and_in_texts() -> None:
    target = tiny()
    vocabulary = {target.decode(torch.tensor([i])) for i in plain(target, ["xy"]).tolist()}
    assert "a" in vocabulary and "" not in vocabulary
    left = plain(target, ["xy"]).tolist()
    assert not set(left) & (set(target.tokens(["xy"]).flatten().tolist()) | target.special)
    ids = [i for i in target.tokens(["ab c"])[0].tolist() if i not in target.special]
    assert typed(target, torch.tensor(ids), ["neon"]) == "ab c"
    assert typed(target, torch.tensor(ids), ["ab"]) is None, "two tokens may spell a word together"
    assert typed(target, torch.tensor(ids[:1]), ["neon"]) is None, "an inner piece is read as a word of its own"
    assert names(["Van Gogh", "the cup of tea", "zq"]) == ["van", "gogh", "the", "cup", "tea", "zq"]
    with pytest.raises(UsageError, match="longer words"):
        plain(target, [chr(c) for c in range(33, 127)])


def test_texts_are_framed_as_the_tokenizer_does() -> None:
    target = tiny()
    ids = target.tokens(["ab c"])
    inner = ids[:, 1:4]
    assert torch.equal(framed(target, inner), ids) and torch.equal(framed(target, inner, 5), ids[:, :5])
    assert free(target, 4) == 4 and free(target, 24) == 22
    for k in (0, 25):
        with pytest.raises(UsageError, match=f"k = {k} "):
            free(target, k)
    cut = pooled(target, target.encode(ids[:, :5]), ids[:, :5])
    assert torch.allclose(cut, pooled(target, target.encode(ids), ids), atol=1e-5), "what comes behind the end changes nothing"


# --- TINA ---------------------------------------------------------------------------------------------------------
def drawn_back(target: StableDiffusion, start: Tensor) -> Tensor:
    """What DDIM makes of start noise without a text: latents, since a random decoder flattens what differs in them."""
    null = target.null(len(start))
    how: dict[str, Any] = {"steps": target.sampler["steps"], "guidance": 1.0}
    return denoise(target, start, null, null, **how)[-1][1]


@pytest.mark.parametrize("how", [{}, {"prediction": "v_prediction"}, {"xl": True}])
def test_inverted_noise_draws_the_picture_back(how: dict[str, Any]) -> None:
    target = tiny(**how)
    picture = target.sample(["a cup", "a tree"], [1, 2])
    given = [Item(prompt="a cup", seed=1, picture=picture[:1]), Item(prompt="a tree", seed=2, picture=picture[1:])]
    error: dict[int, float] = {}
    for iterations in (0, 12):
        asked, _ = proposed(TINA(iterations=iterations, lr=0.01), target, given)
        found = [a for (a,) in asked.values()]
        assert [a.level for a in found] == ["latent"] * 2
        start = torch.stack([a.latent for a in found if a.latent is not None])
        error[iterations] = (drawn_back(target, start) - target.latents(picture)).norm().item()
    chance = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert error[12] < error[0] < (drawn_back(target, chance) - target.latents(picture)).norm().item() / 2


def test_optimised_noise_is_nearer_than_plain_inversion(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny()
    eps = target.eps
    monkeypatch.setattr(target, "eps", lambda x, t, cond: 8 * eps(x, t, cond))  # so that a step back is far from exact
    _, plain_rows = proposed(TINA(iterations=0), target, items(2))
    _, rows = proposed(TINA(iterations=40, lr=0.01), target, items(2))
    assert len(rows) == len(plain_rows) == 4 and [r["t"] for r in rows] == sorted(r["t"] for r in rows)
    assert all(r["loss"] < r["before"] for r in rows)


def test_start_noise_is_drawn_without_a_text_whatever_stands_beside_it() -> None:
    target = tiny()
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    latent, text = Adversarial(latent=noise), Adversarial(prompt="a cup")
    alone = target.replay([latent], [0])
    assert torch.allclose(alone, target.sample([""], [3]), atol=1e-5), "the tiny model samples with DDIM, and guidance has nothing to guide"
    assert torch.equal(alone, target.replay([latent], [77])), "the seed does not count"
    mixed = target.replay([latent, text], [0, 5])
    assert torch.allclose(mixed, torch.cat([alone, target.replay([text], [5])]), atol=1e-5)
    assert "noise" in target.spell(latent) and (latent.level, text.level) == ("latent", "prompt")


# --- controls -----------------------------------------------------------------------------------------------------
def test_no_seed_is_used_twice_and_the_verdict_says_which_one_broke() -> None:
    with mock.patch("unlearners.attacks.seed_search.SEEDS", 45):
        asked, rows = proposed(SeedSearch(tries=40), tiny(), items(3))
    for own, found in asked.items():
        seeds = [a.seed for a in found]
        assert len(seeds) == 40 == len(set(seeds)) and own not in seeds and {a.prompt for a in found} == {found[0].prompt}
    assert len(rows) == 40 and len({tuple(a.seed for a in found) for found in asked.values()}) == 3
    target = Fake(lambda a, seed: a.seed is not None and seed % 3 == 0)
    verdicts = SeedSearch(tries=30)(target, TASK, White(), items(4))
    assert all(v.success and v.drawn is not None and v.drawn % 3 == 0 and v.drawn != v.seed for v in verdicts)


def test_paraphrases_come_in_turns_and_each_once() -> None:
    found = said_otherwise("A house image in neon style.", TASK)
    assert found[0] == "A house image in glowing style." and len(found) == len(set(found)) > 25
    assert said_otherwise("A house image in neon style.", TASK) == found
    assert "A house image in neón style." in found[:6] and FRAMES["fr"].format("néon") in found
    assert not any("{" in p for p in found) and "A house image in neon style." not in found
    only = said_otherwise("A house image in neon style.", TASK, ["misspelling"])
    assert "A house image in ne on style." in only and not any("neon" in p.lower() for p in only)
    assert said_otherwise("a lamp", TASK, ["synonym"])[0] == "a lamp, glowing"
    assert "NEON" not in said_otherwise("a Neon lamp", TASK, ["synonym"])[0].upper(), "capitals do not hide the word"
    assert "neonate" in said_otherwise("a neonate in neon", TASK, ["synonym"])[0], "a longer word stays"


def test_the_lists_are_whole() -> None:
    found = words()
    for concept, known in found.items():
        assert set(known) == {"en", *FRAMES, "is"} and all(w for ws in known.values() for w in ws), concept
        assert not any(concept in w.split() for w in known["is"]), f"the description of {concept} names it"
    assert {c for kind in ("house", "neon", "lightning") for c in load(f"canvas/{kind}").preserve + load(f"canvas/{kind}").concepts} <= set(
        found
    )


def test_a_budget_of_paraphrases_tries_every_kind() -> None:
    asked, rows = proposed(Paraphrase(tries=5), tiny(), items(1))
    assert len(rows) == 5 == len(asked[10])
    every, _ = proposed(Paraphrase(), tiny(), items(1))
    assert [a.prompt for a in every[10][:5]] == [a.prompt for a in asked[10]] and len(every[10]) == len(
        said_otherwise(items(1)[0].prompt, TASK)
    )
    bare = Task(name="t", concepts=("zq",))
    with pytest.raises(UsageError, match="'a zq' has no paraphrase of the kinds synonym; add template"):
        Paraphrase(kinds=("synonym",))(tiny(), bare, Never(), [Item(prompt="a zq", seed=0)])


# --- ensemble -----------------------------------------------------------------------------------------------------
class Fake(TextToImage):
    """Pictures are white where ``breaks(proposal, seed)``, else black."""

    def __init__(self, breaks: Any) -> None:
        self.breaks, self.modules, self.device, self.base = breaks, {}, torch.device("cpu"), {}

    def replay(self, proposals: Sequence[Adversarial], seeds: Sequence[int], *, guidance: float | None = None) -> Tensor:
        return torch.stack([torch.full((3, 2, 2), float(self.breaks(a, s))) for a, s in zip(proposals, seeds, strict=True)])

    def spell(self, adversarial: Adversarial) -> str:
        return adversarial.prompt or ""


Fake.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Member(Attack):
    """Proposes its own name, as often as told, and remembers whom it saw."""

    needs = TextToImage
    paper: ClassVar[str] = "control"
    access = "black"
    name: str
    asks: int = 2
    batch: int = 2
    seen: list[int]

    def run(self, target: Any, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
        assert len(items) <= self.batch
        self.seen.extend(i.seed for i in items)
        left = set(range(len(items)))
        for n in range(self.asks):
            left -= hit({i: Adversarial(prompt=f"{self.name} {n} {torch.rand(()).item()}") for i in sorted(left)})
            yield {"try": float(n)}
            if not left:
                return


def attacked(broken: Mapping[str, set[int]], order: Sequence[str], n: int = 5) -> tuple[list[Verdict], dict[str, list[int]], list[Row]]:
    """The verdicts of an ensemble of members, each of which breaks the given seeds with its second query; whom each saw; the log."""
    seen: dict[str, list[int]] = {m: [] for m in order}
    rows: list[Row] = []
    target = Fake(lambda a, s: any((a.prompt or "").startswith(f"{m} 1 ") and s in broken[m] for m in broken))
    with mock.patch.object(ensemble, "_made", lambda m: Member(name=m, seen=seen[m])):
        verdicts = Ensemble(members=tuple(order))(target, TASK, White(), items(n), log=rows.append)
    return verdicts, seen, rows


SETS = st.lists(st.sets(st.integers(10, 14)), min_size=1, max_size=4)


@settings(max_examples=40)
@given(SETS, st.sets(st.integers(10, 14)))
def test_the_ensemble_is_the_worst_case_and_another_member_never_lowers_it(sets: list[set[int]], more: set[int]) -> None:
    broken = {f"m{i}": s for i, s in enumerate(sets)}
    verdicts, seen, rows = attacked(broken, list(broken))
    won = {v.seed for v in verdicts if v.success}
    assert won == set().union(*sets)
    for name, seeds in broken.items():
        alone, _, _ = attacked({name: seeds}, [name])
        assert {v.seed for v in alone if v.success} <= won, "never below a member"
    left = set(range(10, 15))
    for name, seeds in broken.items():
        assert set(seen[name]) == left and len(seen[name]) == len(left), "each sees the survivors, once"
        left -= seeds
    for v in verdicts:
        first = next((m for m in broken if v.seed in broken[m]), "")
        assert v.by == first and (not v.success or v.adversarial.startswith(f"{first} 1 "))
        assert v.queries == 2 * (list(broken).index(first) + 1 if first else len(broken))
    assert all(isinstance(x, float) for r in rows for x in r.values()) and {r["member"] for r in rows} <= {1.0, 2.0, 3.0, 4.0}
    wider, _, _ = attacked({**broken, "last": more}, [*broken, "last"])
    assert won <= {v.seed for v in wider if v.success}


def test_a_member_searches_as_it_would_alone() -> None:
    both, _, _ = attacked({"a": {10}, "b": {11, 12}}, ["a", "b"], n=3)
    alone, _, _ = attacked({"b": {10, 11, 12}}, ["b"], n=3)
    assert both[0].by == "a" and both[1].by == "b"
    assert both[1].adversarial == alone[0].adversarial, "even one that uses the global generator"


def test_access_and_level_are_those_of_the_strongest_member() -> None:
    assert Ensemble().access == "white" and Ensemble().level == "prompt"
    black = Ensemble(**Ensemble.presets["black"])
    assert black.access == "black" and replace(black, members=("mma", "tina")).level == "latent"
    assert config.build(Ensemble, config.to_dict(black)) == black
    for preset in Ensemble.presets.values():
        Ensemble(**preset)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (("unlearndifatk",), "did you mean unlearndiffatk"),
        (("mma", "mma:papr"), "unknown preset of mma 'papr'; did you mean paper"),
        (("ensemble",), "its own member"),
        ((), "needs members"),
    ],
)
def test_wrong_members_are_refused_in_one_sentence(members: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Ensemble(members=members)


# --- all of them --------------------------------------------------------------------------------------------------
SMALL: list[Attack] = [
    RingABell(k=4, population=8, iterations=3),
    MMA(k=3, iterations=3, top=10, candidates=9),
    SeedSearch(tries=3),
    Paraphrase(tries=3),
    TINA(iterations=2),
]


@pytest.mark.parametrize("attack", SMALL, ids=lambda a: type(a).__name__)
def test_neither_the_others_nor_the_batch_size_change_a_search(attack: Attack) -> None:
    target = tiny()
    together, _ = proposed(attack, target, items(3))
    for other in (proposed(attack, target, items(3)[::-1])[0], proposed(attack, target, items(3), size=1)[0]):
        for seed, found in together.items():
            for a, b in zip(found, other[seed], strict=True):
                assert (a.prompt, a.seed) == (b.prompt, b.seed)
                assert a.latent is None or (b.latent is not None and torch.allclose(a.latent, b.latent, atol=1e-3))


@pytest.mark.parametrize("attack", [RingABell(k=4, population=4, iterations=1), MMA(k=3, iterations=2, top=4, candidates=6)])
@pytest.mark.parametrize("how", [{"xl": True}, {"prediction": "v_prediction"}])
def test_text_searches_run_on_every_layout(attack: Attack, how: dict[str, Any]) -> None:
    verdicts = attack(tiny(**how), TASK, Never(), items(1))
    assert [(v.queries, v.level) for v in verdicts] == [(1, "")]


@pytest.mark.parametrize("attack", [RingABell(), MMA()])
def test_the_original_is_asked_for_in_one_sentence(attack: Attack) -> None:
    target = tiny()
    target.original = None
    with pytest.raises(UsageError, match=r"needs the model before the erasure; name it with --base"):
        attack(target, TASK, Never(), items(1))


def test_budgets_that_search_nothing_are_refused() -> None:
    for attack, said in (
        (RingABell(population=2), "population of 4"),
        (MMA(top=0), "leave nothing to choose"),
        (TINA(lr=0.0), "invert nothing"),
    ):
        with pytest.raises(UsageError, match=said):
            attack(tiny(), TASK, Never(), items(1))


def test_presets_are_the_papers_numbers() -> None:
    bell = RingABell(**RingABell.presets["paper"])
    assert bell == RingABell() and (bell.k, bell.population, bell.iterations, bell.eta) == (16, 200, 3000, 3.0)
    assert (bell.crossover, bell.mutation, RingABell(**RingABell.presets["paper-violence"]).eta) == (0.5, 0.25, 5.5)
    assert [RingABell(**RingABell.presets[p]).k for p in ("paper-38", "paper-77")] == [38, 77]
    words_ = MMA(**MMA.presets["paper"])
    assert words_ == MMA() and (words_.k, words_.iterations, words_.top, words_.candidates) == (20, 1000, 256, 512)
    assert TINA(**TINA.presets["paper"]) == TINA() and (TINA().iterations, TINA().lr) == (25, 0.001)
    assert SeedSearch(**SeedSearch.presets["paper"]) == SeedSearch() and Paraphrase(**Paraphrase.presets["paper"]) == Paraphrase()
    assert Ensemble(**Ensemble.presets["fast"]) == Ensemble()
    for kind in (RingABell, MMA, TINA, Ensemble):
        assert {"paper", "fast", "canvas"} <= set(kind.presets)
    for chance in (SeedSearch, Paraphrase, RandomTokens):  # as many tries as a search on the canvas has
        assert chance(**chance.presets["fast"]).tries == UnlearnDiffAtk(**UnlearnDiffAtk.presets["canvas"]).timesteps


def test_words_to_paraphrase_with_are_in_the_package() -> None:
    assert paraphrase.WORDS.is_file() and Probe(prompt="a", truth={}).seed is None
