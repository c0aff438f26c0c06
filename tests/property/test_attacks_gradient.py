"""The gradient attacks find what is planted, touch only what they search, and keep each prompt's search its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlearners.attacks._search import insert, nearest, sentences
from unlearners.attacks.cce import CCE
from unlearners.attacks.p4d import P4D
from unlearners.attacks.pez import PEZ
from unlearners.attacks.ph2p import PH2P
from unlearners.base import Adversarial, Attack, Hit, Item, Judge, Row, Task, settle
from unlearners.diffusion import Cond, Soft
from unlearners.errors import UnlearnError, UsageError
from unlearners.targets.base import TextToImage
from unlearners.targets.stable_diffusion import StableDiffusion

TASK = Task(name="planted", concepts=("w9",))
START, END, TRIGGER = 0, 1, 77


class Planted(TextToImage):
    """Words are "w<id>". The prediction error is the mean distance of the slots to the trigger's embedding; the picture is white
    when a slot is as near to it as no other word is, else black."""

    vocabulary, length, train_steps = 400, 10, 1000
    latent_shape = (4, 2, 2)

    def __init__(self, *, knows: bool = False) -> None:
        table = torch.randn(self.vocabulary, 16, generator=torch.Generator().manual_seed(0))
        self.modules = {"text_encoder": nn.Embedding.from_pretrained(table / table.norm(dim=1, keepdim=True))}
        self.device, self.base, self.knows = torch.device("cpu"), {"name": "planted"}, knows
        self.special, self.sampler = {START, END}, {"steps": 1, "guidance": 1.0}
        self.levels: list[int] = []  # every noise level at which a prediction was asked for
        self.read: list[Tensor] = []  # the ids of every text read with embeddings put in
        self.original = None if knows else lambda: Planted(knows=True)

    @classmethod
    def load(cls, spec: str, **options: Any) -> Planted:
        return cls()

    @classmethod
    def tiny(cls, seed: int = 0) -> Planted:
        return cls()

    def patch(self, patches: Sequence[str], *, force: bool = False) -> None:
        pass

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        return torch.zeros(())

    def relabel(self, batch: Mapping[str, Any], policy: Any = "other") -> Mapping[str, Any]:
        return batch

    def embed(self) -> Tensor:
        table: Tensor = self.modules["text_encoder"].weight  # type: ignore[assignment]
        return table

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        # a word that is not of the form w<id>, such as those of templates, is word 2
        rows = [[START, *(int(w[1:]) if w[1:].isdigit() else 2 for w in p.split())][: self.length - 1] for p in prompts]
        return torch.tensor([r + [END] * (self.length - len(r)) for r in rows])

    def decode(self, ids: Tensor) -> str:
        return " ".join(f"w{i}" for i in ids.tolist() if i not in self.special)

    def encode(self, prompts: Any, soft: Soft | None = None) -> Cond:
        ids = prompts if isinstance(prompts, Tensor) else self.tokens(prompts)
        if soft is None:
            return Cond(self.embed()[ids])
        self.read.append(ids)
        return Cond(soft.put(self.embed()[ids]))

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def goal(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def distance(self, cond: Cond) -> Tensor:
        return (cond.states - self.embed()[TRIGGER]).norm(dim=-1)  # (B, L)

    def white(self, cond: Cond) -> Tensor:
        return (self.distance(cond).amin(1) < 0.2).float()

    def eps(self, x_t: Tensor, t: Any, cond: Cond) -> Tensor:
        self.levels += t.tolist()
        return x_t if self.knows else x_t + self.distance(cond).mean(1)[:, None, None, None]

    def latents(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 4, 2, 2)

    def sample(self, prompts: Any, seeds: Sequence[int], **options: Any) -> Tensor:
        white = torch.ones(len(seeds)) if self.knows else self.white(self.encode(prompts))
        return white[:, None, None, None].expand(-1, 3, 2, 2)

    def replay(self, proposals: Sequence[Adversarial], seeds: Sequence[int], *, guidance: float | None = None) -> Tensor:
        near = []
        for a in proposals:
            if a.level == "embedding":
                assert a.tokens is not None and a.embedding is not None
                cond = self.encode(a.tokens[None], Soft(a.embedding[None], a.at))
            else:
                cond = self.encode([a.prompt])
            near.append(self.white(cond))
        return torch.cat(near)[:, None, None, None].expand(-1, 3, 2, 2)

    def spell(self, adversarial: Adversarial) -> str:
        return adversarial.prompt or "embedding"


@dataclass(frozen=True, kw_only=True)
class White(Judge):
    """Recognises white pictures, or nothing when ``blind``."""

    blind: bool = False

    def labels(self, images: Tensor, task: Task, domain: str) -> list[str]:
        return [task.concepts[0] if x.mean() > 0.5 and not self.blind else "" for x in images]


def items(n: int = 4) -> list[Item]:
    return [Item(prompt=f"w{10 + i} w5 w9 w6", seed=i, picture=torch.ones(1, 3, 2, 2)) for i in range(n)]


P = P4D(variant="n", n=3, iterations=60, check=6, lr=0.05)
H = PH2P(k=3, iterations=12, inner=5, accumulate=1, rank="loss", checks=12, lr=0.2)
C = CCE(pictures=4, iterations=80, rows=2, accumulate=1, lr=0.05, checks=4)
Z = PEZ(k=4, iterations=3, checks=3, clip="canvas", lr=0.05)
SHORT: list[Any] = [replace(P, iterations=12, check=4), replace(P, variant="k", k=2, iterations=8, check=4), replace(H, iterations=3), Z]


@pytest.mark.parametrize(
    "attack", [P, replace(P, variant="prefix", n=2), replace(P, variant="k", k=2), H, C], ids=lambda a: type(a).__name__
)
def test_a_planted_trigger_is_found(attack: Any) -> None:
    verdicts = attack(Planted(), TASK, White(), items())
    assert all(v.success and not v.before for v in verdicts)
    assert {v.level for v in verdicts} == {attack.level}
    if attack.level == "prompt":
        assert all(f"w{TRIGGER}" in v.adversarial.split() for v in verdicts)


def asked(attack: Any, which: Sequence[int] = range(4), drop: int = -1) -> dict[int, list[str]]:
    """What ``attack`` proposes for each of some prompts, by image seed, when only prompt ``drop`` ever succeeds."""
    seen: dict[int, list[str]] = {i: [] for i in which}

    @dataclass(frozen=True, kw_only=True)
    class Spy(Attack):
        needs, access, batch = TextToImage, "white", attack.batch

        def run(self, target: Any, task: Task, items: Sequence[Item], hit: Hit) -> Iterator[Row]:
            def listen(given: Mapping[int, Adversarial]) -> set[int]:
                for i, a in given.items():
                    seen[items[i].seed].append(a.prompt or str([a.tokens, a.embedding, a.at]))
                hit(given)
                return {i for i in given if items[i].seed == drop}

            yield from attack.run(target, task, items, listen)

    Spy()(Planted(), TASK, White(blind=True), [items()[i] for i in which])
    return seen


@pytest.mark.parametrize("attack", [*SHORT, replace(C, iterations=4, checks=2)], ids=lambda a: type(a).__name__)
def test_a_prompts_search_does_not_depend_on_the_others(attack: Any) -> None:
    together = asked(attack)
    assert all(found and len(found) == len(set(found)) for found in together.values()), "nothing is asked twice"
    assert asked(attack, [3, 1]) == {3: together[3], 1: together[1]}
    assert asked(replace(attack, batch=3)) == together
    left = asked(attack, drop=2)
    assert left[2] == together[2][:1] and all(left[i] == together[i] for i in (0, 1, 3))


@pytest.mark.parametrize("attack", [*SHORT, replace(C, iterations=4, checks=2)], ids=lambda a: type(a).__name__)
def test_the_seed_decides_and_no_trace_is_left(attack: Any) -> None:
    target, before = Planted(), torch.random.get_rng_state()
    weight, logged = target.embed().clone(), []
    first = attack(target, TASK, White(blind=True), items(2), seed=3, log=logged.append)
    assert first == attack(target, TASK, White(blind=True), items(2), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before) and torch.equal(target.embed(), weight) and target.embed().grad is None
    assert logged and all(isinstance(v, float) for row in logged for v in row.values()) and logged[-1]["left"] == 2.0


# --- projection and slots -----------------------------------------------------------------------------------------
@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["cosine", "l2"]))
def test_the_nearest_token_is_that_of_brute_force_and_stays_put(seed: int, metric: Any) -> None:
    g = torch.Generator().manual_seed(seed)
    E, z = torch.randn(30, 5, generator=g, dtype=torch.float64), torch.randn(2, 3, 5, generator=g, dtype=torch.float64)

    def far(a: Tensor, b: Tensor) -> float:
        return -float(a @ b / a.norm() / b.norm()) if metric == "cosine" else float((a - b).square().sum())

    s = nearest(z, E, metric)
    assert s.tolist() == [[min(range(30), key=lambda i: far(v, E[i])) for v in row] for row in z]
    assert torch.equal(nearest(E[s], E, metric), s)


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, [START, 0, 11, 0, 12, 0, 13, 0, 14, END]),
        (2, [START, 0, 11, 12, 0, 13, 14, 0, 15, END]),
        (3, [START, 0, 11, 12, 13, 0, 14, 15, END, END]),
        (9, [START, 0, 11, 12, 13, 14, 15, END, END, END]),
    ],
)
def test_variant_k_puts_a_slot_before_every_k_tokens_and_leaves_the_others(k: int, expected: list[int]) -> None:
    target, other = Planted(), "w11 w12"
    ids, at = P4D(variant="k", k=k)._layout(target, ["w11 w12 w13 w14 w15", other])
    slots = [i for i, token in enumerate(expected) if token == 0 and i]
    assert ids[0].tolist() == expected and [i for i in at[0].tolist() if i >= 0] == slots
    assert len([i for i in at[1].tolist() if i >= 0]) == -(-2 // k)
    attack = P4D(variant="k", k=k, iterations=3, check=3)
    list(attack.run(target, TASK, [Item(prompt="w11 w12 w13 w14 w15", seed=1, picture=torch.ones(1, 3, 2, 2))], lambda given: set()))
    assert len(target.read) == 3
    for (row,) in target.read:
        assert [i for n, i in enumerate(row.tolist()) if n not in slots] == [i for n, i in enumerate(expected) if n not in slots]
        assert not {int(row[n]) for n in slots} & target.special


def test_slots_of_a_row_of_minus_one_stay_as_they_are() -> None:
    ids = sentences(Planted(), [[5, 6], list(range(20, 40))])
    assert ids.tolist() == [[START, 5, 6] + [END] * 7, [START, *range(20, 28), END]]
    put = insert(ids, torch.tensor([[1, -1], [2, 3]]), torch.tensor([[90, 91], [92, 93]]))
    assert put.tolist() == [[START, 90, 6] + [END] * 7, [START, 20, 92, 93, *range(23, 28), END]]


def test_ph2p_uses_the_noise_levels_of_its_window_only() -> None:
    target = Planted()
    replace(H, low=500, high=520, iterations=4, inner=3, accumulate=2, checks=1)(target, TASK, White(blind=True), items(3))
    assert len(target.levels) == 4 * 3 * 2 * 3 and {500, 519} <= {min(target.levels), max(target.levels)} | {500, 519}
    assert set(target.levels) <= set(range(500, 520)) and len(set(target.levels)) > 5


def test_one_step_of_lbfgs_at_a_time_is_lbfgs() -> None:
    """PH2P calls L-BFGS once for each of its inner steps, so that prompts advance together."""

    def minimise(calls: int, inner: int) -> Tensor:
        x = torch.tensor([1.5, -0.7, 2.0], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([x], lr=0.3, max_iter=inner)

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = (x[0] - 1) ** 4 + (x[1] * x[0]) ** 2 + (x[2] - x[1]).cosh()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for _ in range(calls):
            optimiser.step(closure)
        return x.detach()

    assert torch.equal(minimise(1, 12), minimise(12, 1)) and not torch.equal(minimise(1, 12), minimise(11, 1))


# --- one vector ---------------------------------------------------------------------------------------------------
def test_cce_learns_one_vector_and_puts_it_where_the_concept_stands() -> None:
    target, given = Planted(), {}

    def hit(proposals: Mapping[int, Adversarial]) -> set[int]:
        given.update(proposals)
        return set()

    prompts = ["w11 w9 w12", "w11 w12", "w8 w7 w3", " ".join(f"w{i}" for i in range(20, 40))]
    task = replace(TASK, synonyms=("w8 w7",))
    list(replace(C, checks=1).run(target, task, [Item(prompt=p, seed=0) for p in prompts], hit))
    ids = [a.tokens.tolist() for a in given.values() if a.tokens is not None]
    filler = 2
    assert [a.at for a in given.values()] == [2, 1, 1, 1]
    assert ids[0] == [START, 11, filler, 12] + [END] * 6 and ids[1] == [START, filler, 11, 12] + [END] * 6
    assert ids[2] == [START, filler, 3] + [END] * 7 and ids[3] == [START, filler, *range(20, 27), END]
    vectors = [a.embedding for a in given.values() if a.embedding is not None]
    assert len(vectors) == 4 and vectors[0].shape == (1, 16) and all(torch.equal(v, vectors[0]) for v in vectors)
    assert (vectors[0] - target.embed()[TRIGGER]).norm() < 0.2 < (target.embed()[filler] - target.embed()[TRIGGER]).norm()
    for rows in target.read:  # templates: the slot aside, the same ids at the end as at the start
        assert (rows[:, 0] == START).all() and (rows[:, -1] == END).all()


# --- settings -----------------------------------------------------------------------------------------------------
def test_presets_are_the_papers() -> None:
    for cls in (P4D, PEZ, PH2P, CCE):
        assert cls(**cls.presets["paper"]) == cls(), f"the defaults of {cls.__name__} are the paper's"
        assert {"paper", "fast", "canvas"} <= set(cls.presets)
    p4d = P4D()
    assert (p4d.variant, p4d.n, p4d.iterations, p4d.check, p4d.lr, p4d.weight_decay, p4d.optimiser) == (
        "n",
        16,
        3000,
        50,
        0.1,
        0.1,
        "adamw",
    )
    assert (P4D(**P4D.presets["paper-k"]).variant, P4D(**P4D.presets["paper-k"]).k) == ("k", 3)
    pez, ph2p, cce = PEZ(), PH2P(), CCE()
    assert (pez.k, pez.iterations, pez.lr, pez.weight_decay, pez.access) == (16, 3000, 0.1, 0.1, "black")
    assert (ph2p.k, ph2p.low, ph2p.high, ph2p.iterations, ph2p.inner, ph2p.accumulate, ph2p.lr) == (15, 500, 900, 500, 20, 3, 0.8)
    assert (cce.pictures, cce.iterations, cce.rows * cce.accumulate, cce.lr, cce.weight_decay) == (25, 5000, 16, 0.08, 0.01)


def test_the_lighter_p4d_visits_fifty_levels_in_forty_steps_each() -> None:
    attack = settle(P4D(**P4D.presets["mu-attack"]), Planted(), TASK)
    assert attack.n == 3
    assert (attack.optimiser, attack.lr, attack.weight_decay, attack.variant, attack.check) == ("adam", 0.01, 0.1, "prefix", 40)
    target = Planted()
    rows = list(attack.run(target, TASK, items(1), lambda given: set()))
    assert len(rows) == 50 and target.levels == [10 + 20 * n for n in range(50) for _ in range(40)]


# --- real classes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", [{"prediction": "v_prediction"}, {"xl": True}], ids=str)
@pytest.mark.parametrize("attack", [P, replace(P, variant="k"), H, C, Z], ids=lambda a: type(a).__name__)
def test_every_layout_of_stable_diffusion_is_searched(layout: Mapping[str, Any], attack: Any) -> None:
    target, given = StableDiffusion.tiny(seed=1, **layout), []
    target.original = target.frozen
    for p in target.named().values():
        p.requires_grad_(False)

    def hit(proposals: Mapping[int, Adversarial]) -> set[int]:
        given.extend(proposals.values())
        return set()

    few = {"iterations": 2} | ({"pictures": 2} if attack is C else {"check": 2} if isinstance(attack, P4D) else {})
    prompts = [Item(prompt=p, seed=3, picture=torch.rand(1, 3, 16, 16)) for p in ("a cat", "zq")]
    task = Task(name="t", concepts=("zq",), kind="style")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        rows = list(replace(attack, **few).run(target, task, prompts, hit))
    assert rows and len(given) >= 2 and all(p.grad is None for p in target.named().values())
    assert all(a.level == attack.level for a in given)


# --- errors -------------------------------------------------------------------------------------------------------
def wrong(attack: Any, message: str, target: Any = None, kind: type[UnlearnError] = UsageError) -> None:
    with pytest.raises(kind, match=message) as caught:
        attack(target or Planted(), TASK, White(), items(1))
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (replace(P, n=9), "n = 9 tokens do not fit"),
        (replace(P, variant="prefix", n=0), "n = 0 tokens do not fit"),
        (replace(P, variant="k", k=0), "k = 0 leaves no tokens"),
        (replace(P, check=0), "check = 0"),
        (replace(H, k=9), "k = 9 tokens do not fit"),
        (replace(H, low=900, high=500), "noise levels 900 to 500"),
        (replace(Z, k=31), "k = 31 tokens do not fit CLIP"),
        (replace(Z, checks=0), "checks = 0"),
        (replace(C, pictures=0), "pictures = 0"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(attack: Any, message: str) -> None:
    wrong(attack, message)


@pytest.mark.parametrize("attack", [P, C], ids=lambda a: type(a).__name__)
def test_a_missing_original_is_said_in_one_sentence(attack: Any) -> None:
    target = Planted()
    target.original = None
    wrong(attack, "needs the model before the erasure", target)


def test_a_word_without_tokens_and_missing_pictures() -> None:
    wrong(replace(C, word=" "), "has no token")
    for attack in (P, H, Z):
        with pytest.raises(UnlearnError, match="picture of 'w5'"):
            attack(Planted(), TASK, White(), [Item(prompt="w5", seed=0)])


def test_a_clip_that_cannot_be_read(tmp_path: Path) -> None:
    from unlearners.zoo import canvas

    wrong(replace(Z, clip=str(tmp_path / "none")), "could not be loaded", kind=UnlearnError)
    for file in (canvas.FOLDER / "clip").iterdir():
        whole = file.read_bytes()
        (tmp_path / file.name).write_bytes(whole[: len(whole) // 2] if file.suffix == ".safetensors" else whole)
    wrong(replace(Z, clip=str(tmp_path)), "is damaged or is no CLIPModel", kind=UnlearnError)
    wrong(replace(H, rank="clip", clip=str(tmp_path)), "is damaged or is no CLIPModel", kind=UnlearnError)
