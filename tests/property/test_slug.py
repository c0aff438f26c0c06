"""SLUG: the front, the step, the search and its score keep their promises."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearners import patch, plots, saliency, single_layer, tasks
from unlearners.base import Data, Task
from unlearners.data import Examples
from unlearners.errors import UsageError
from unlearners.latents import Asked
from unlearners.methods._pairs import each, sides
from unlearners.methods._validation import Dual, scorer
from unlearners.methods.gaft import GAFT
from unlearners.methods.slug import SLUG
from unlearners.single_layer import Edit, Layer, Point, Step
from unlearners.targets.classifier import Classifier
from unlearners.targets.clip import CLIP
from unlearners.targets.llava import Llava
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.testing import quick, task_for

values = st.floats(0.001, 10, allow_nan=False)


@given(st.lists(st.tuples(st.sampled_from("ab"), values, st.floats(0, 1)), min_size=1, max_size=25))
def test_nothing_beats_a_layer_of_the_front_and_something_beats_every_other(rows: list[tuple[str, float, float]]) -> None:
    found = [Layer(str(i), t, importance, alignment) for i, (t, importance, alignment) in enumerate(rows)]
    front = single_layer.pareto(found)
    for a in found:
        beaten = any(b.tower == a.tower and b.importance > a.importance and b.alignment < a.alignment for b in found)
        assert (a in front) != beaten
    assert {a.tower for a in front} == {a.tower for a in found}, "each tower has a front of its own"


def test_importance_and_alignment_are_the_papers() -> None:
    theta, g, r = ({"t.w": torch.randn(3, 4, generator=torch.Generator().manual_seed(i))} for i in range(3))
    (layer,) = single_layer.layers(theta, g, [r])
    flat = {k: v["t.w"].flatten().double() for k, v in (("theta", theta), ("g", g), ("r", r))}
    assert layer.importance == pytest.approx(float(flat["g"].norm() / flat["theta"].norm()))
    cos = float(torch.nn.functional.cosine_similarity(flat["g"], flat["r"], dim=0))
    assert layer.alignment == pytest.approx(abs(cos))
    (signed,) = single_layer.layers(theta, g, [r], signed=True)
    assert signed.alignment == pytest.approx(cos)
    assert single_layer.layers(theta, {"t.w": torch.zeros(3, 4)}, [r]) == [], "a layer without a gradient is no candidate"


def test_candidates_are_what_may_be_edited() -> None:
    names = [
        "a.q_proj.weight",
        "a.q_proj.bias",
        "a.layer_norm1.weight",
        "a.token_embedding.weight",
        "a.position_embedding.weight",
        "logit_scale",
    ]
    theta = {n: torch.zeros(2, 2) if n.endswith("proj.weight") or "embedding" in n else torch.zeros(2) for n in names}
    assert single_layer.candidates(theta) == ["a.q_proj.weight"]
    assert single_layer.candidates(theta, norms=True) == ["a.q_proj.weight", "a.layer_norm1.weight"]


def test_q_k_v_and_the_two_of_the_mlp_move_together() -> None:
    names = [
        f"x.layers.3.{n}.weight"
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    ]
    assert single_layer.together(names[1], names) == tuple(names[:3])
    assert single_layer.together(names[4], names) == tuple(names[4:])
    assert single_layer.together(names[3], names) == (names[3],)
    assert single_layer.depth(names[0]) == 3 and single_layer.depth("projections.visual_projection.weight") == -1


@settings(deadline=None)
@given(st.floats(0.011, 30), st.integers(1, 6), st.integers(4, 20))
def test_the_search_closes_in_on_the_smallest_step_that_forgets(edge: float, at_once: int, evaluations: int) -> None:
    asked: list[float] = []

    def score(steps: Any) -> list[Point]:
        asked.extend(steps)
        return [Point(a, 0.0 if a >= edge else 50.0, 90.0 - a) for a in steps]

    tried = single_layer.search(score, first=0.1, evaluations=evaluations, at_once=at_once)
    assert len(tried) == evaluations == len(asked) and all(a > 0 for a in asked)
    forgot, kept = [p.alpha for p in tried if p.fa <= 0], [p.alpha for p in tried if p.fa > 0]
    assert not forgot or not kept or min(forgot) >= edge > max(kept)


def test_one_at_a_time_is_the_papers_doubling_and_halving() -> None:
    tried = single_layer.search(lambda s: [Point(a, 100.0 * (a < 0.5), 90.0) for a in s], first=0.1, evaluations=6)
    assert [p.alpha for p in tried] == pytest.approx([0.1, 0.2, 0.4, 0.8, 0.6, 0.5])


def test_the_search_ends_early_when_the_bracket_is_narrow() -> None:
    tried = single_layer.search(
        lambda s: [Point(a, 100.0 * (a < 0.5), 90.0) for a in s], first=0.1, evaluations=50, at_once=5, bracket=0.05
    )
    assert len(tried) < 50 and min(p.alpha for p in tried if not p.fa) <= 0.5 / 0.95


def test_the_best_step_forgets_and_keeps_most() -> None:
    points = [Point(0.1, 40.0, 90.0), Point(0.2, 0.0, 88.0), Point(0.3, 0.0, 88.0), Point(0.4, 0.0, 70.0)]
    assert single_layer.choose(points, goal=0, floor=87) == (points[1], True), "of equal ones the shortest"
    assert single_layer.choose(points, goal=0, floor=89) == (points[1], False), "what costs too much is said"
    finer = [p._replace(kept=k) for p, k in zip(points, (99.0, 71.0, 73.0, 80.0), strict=True)]
    assert single_layer.choose(finer, goal=0, floor=87) == (finer[2], True), "of equal accuracy the one nearest to what it was"
    best, good = single_layer.choose(points[:1], goal=0, floor=0)
    assert best is points[0] and not good


def named() -> tuple[CLIP, Task]:
    target = CLIP.tiny(seed=3)
    return target, task_for(target)


def test_an_edit_is_as_long_as_it_says_and_leaves_no_trace() -> None:
    target, _ = named()
    weights = target.named()
    name = next(n for n in weights if n.endswith("fc1.weight"))
    g = {name: torch.randn_like(weights[name])}
    edit, before = Edit.of(weights, g, [name]), weights[name].clone()
    with edit.at(weights, 0.25):
        assert float((weights[name] - before).norm() / before.norm()) == pytest.approx(0.25, rel=1e-4)
    assert torch.equal(weights[name], before)


def test_a_small_step_raises_the_forget_loss() -> None:
    target, task = named()
    (at,) = sides(target, task, "", ".*", norms=False, pictures=4, pairs=0).of
    D_f = at.forget(task)
    g = saliency.mean(at.theta, target.forgetting, D_f.batches(8))
    batch, weights = D_f.batch(torch.arange(len(D_f))), target.named()
    for name in list(at.theta)[::3]:
        with torch.no_grad():
            before = float(target.forgetting(batch))
            with Edit.of(at.theta, g, [name]).at(weights, 1e-3):
                assert float(target.forgetting(batch)) > before, name


@pytest.mark.parametrize("tower", ["vision_tower", "text_encoder", "projections"])
def test_many_steps_behind_the_layer_are_the_steps_one_by_one(tower: str) -> None:
    target, task = named()
    score = scorer(target, task, 1, 4)
    assert isinstance(score, Dual)
    weights = target.named()
    for name in [
        n for n in weights if n.startswith(tower) and n.endswith(("fc1.weight", "v_proj.weight", "out_proj.weight", "projection.weight"))
    ]:
        edit = Edit.of(weights, {name: torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(1))}, [name])
        seen: list[Any] = []
        score._percent = lambda V, T, seen=seen: (seen.append((V, T)), (0.0, 0.0, 0.0))[1]  # type: ignore[method-assign, misc]
        score.steps(edit, [0.1, 0.7])
        super(Dual, score).steps(edit, [0.1, 0.7])
        for (V, T), (V_, T_) in zip(seen[:2], seen[2:], strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip([*V, *T], [*V_, *T_], strict=True)), name


def test_the_retained_gradient_is_kept_and_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, task = named()
    first = sides(target, task, "", ".*", norms=False, pictures=4, pairs=0).retained(8, 2)
    again = sides(target, task, "", ".*", norms=False, pictures=4, pairs=0).retained(8, 2)
    assert "cached_seconds" in again[1] and "cached_seconds" not in first[1]
    assert len(first[0]) == 2 and all(torch.equal(t, b[n]) for a, b in zip(first[0], again[0], strict=True) for n, t in a.items())
    other, _ = sides(CLIP.tiny(seed=4), task, "", ".*", norms=False, pictures=4, pairs=0).retained(8, 2)
    assert any(not torch.equal(t, other[0][n]) for n, t in first[0][0].items()), "of another model it is not taken"


def test_the_retained_gradient_does_not_depend_on_the_forget_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target, task = named()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a"))
    at = sides(target, task, "", ".*", norms=False, pictures=4, pairs=0)
    at.forgotten(task, 8)
    after, _ = at.retained(8, 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    alone, _ = sides(target, task, "", ".*", norms=False, pictures=4, pairs=0).retained(8, 2)
    assert all(torch.equal(t, b[n]) for a, b in zip(after, alone, strict=True) for n, t in a.items())


def test_one_layer_alone_is_changed_and_a_widened_one_with_its_kin() -> None:
    for fields, most in (({}, 1), ({"rule": "deepest", "widen": True}, 3)):
        target, task = named()
        before = patch.fingerprint(target.modules)
        rows: list[dict[str, float]] = []
        quick(SLUG(**fields))(target, task, seed=0, log=rows.append)
        changed = [n for n, h in patch.fingerprint(target.modules).items() if h != before[n]]
        assert 1 <= len(changed) <= most and rows[-1]["edited"] == len(changed)


def test_a_pipeline_is_edited_in_what_it_uses_of_its_clip() -> None:
    target = StableDiffusion.tiny()
    (at,) = sides(target, task_for(target), "tiny-clip", ".*", norms=False, pictures=4, pairs=0).of
    assert at.theta and all(n.startswith("text_encoder.") for n in at.theta)
    assert all(at.source.named()[n] is p or n in target.named() for n, p in at.theta.items())


def test_a_model_that_answers_can_give_the_gradients_of_what_it_says() -> None:
    target, clip = Llava.tiny(), Llava.tiny()
    task = replace(task_for(target), forget=Data(source="tiny", rows="class=b"), retain=Data(source="tiny", rows="not class=b"))
    (at,) = sides(target, task, "", ".*", loss="answers", norms=False, pictures=4, pairs=8).of
    assert at.source.target is target and at.theta and set(at.theta) <= target.reached
    batch = next(iter(at.forget(task).batches(8)))
    said = target.answer(batch["x"], [task.question] * 8)
    before = float(at.source.forgetting(batch).detach())
    assert before == pytest.approx(float(target.loss({"x": batch["x"], "prompt": [task.question] * 8, "answer": said}).detach()))
    g = saliency.mean(at.theta, at.source.forgetting, [batch])
    name = max(g, key=lambda n: float(g[n].norm() / at.theta[n].detach().norm()))
    with Edit.of(at.theta, g, (name,)).at(target.named(), 1e-3):
        after = float(target.loss({"x": batch["x"], "prompt": [task.question] * 8, "answer": said}).detach())
    assert after > before, "the step raises the loss of what was said"
    own, _ = at.retained(8, 2)
    asked, _ = sides(target, replace(task, question="Who?"), "", ".*", loss="answers", norms=False, pictures=4, pairs=8).retained(8, 2)
    assert len(own) == 1, "its loss does not compare within the batch"
    assert any(not torch.equal(own[0][n], asked[0][n]) for n in own[0]), "gradients of another question are not taken from the cache"
    (by_clip,) = sides(clip, task, "tiny-clip", ".*", norms=False, pictures=4, pairs=8).of
    assert isinstance(by_clip.source, CLIP)
    with pytest.raises(UsageError, match="needs a model that answers questions"):
        SLUG(loss="answers")(*named())


def test_several_concepts_are_edited_apart_and_then_together() -> None:
    target, task = named()
    both = replace(
        task,
        concepts=("a", "b"),
        preserve=("c", "d"),
        forget=Data(source="tiny", rows="class=a,b"),
        retain=Data(source="tiny", rows="not class=a,b"),
    )
    parts = each(both)
    assert [p.concepts for p in parts] == [("a",), ("b",)] and [p.forget.rows for p in parts] == ["class=a", "class=b"]
    rows: list[dict[str, float]] = []
    edited = quick(SLUG(goal=-1.0))(target, both, seed=0, log=rows.append)
    assert sum("no step forgot" in w for w in edited.warnings) == 3 and "no step forgot a, b at" in edited.warnings[-1]
    assert rows[-1]["edited"] == 2 and all(r["alpha"] > 0 and "chosen" in r for r in rows[-3:])
    assert {r["concept"] for r in rows[:-1]} == {0.0, 1.0}
    as_one = [{k: v for k, v in r.items() if k != "concept"} for r in rows]
    assert all(draw(rows, "a") != draw(as_one, "a") for draw in (plots.fronts, plots.steps))
    with pytest.raises(UsageError, match="2 concepts need as many"):
        each(replace(both, forget=Data(source="tiny", rows="class=a")))


def test_what_cannot_be_done_is_said() -> None:
    target, task = named()
    with pytest.raises(UsageError, match="nothing to forget"):
        SLUG(evaluations=1, goal=100.0)(target, task)
    for wrong in ({"rounds": -1}, {"evaluations": 0}, {"alpha": 0.0}):
        with pytest.raises(UsageError, match="at least"):
            SLUG(**wrong)
    with pytest.raises(UsageError, match="leaves no weight"):
        SLUG(params=r".*bias")(target, task)
    with pytest.raises(UsageError, match="same caption"):
        SLUG()(target, replace(task, retain=Data(source="tiny", rows="class=a")))
    clip = tasks.load("clip/zorbo")
    assert clip.concepts == ("zorbo",) and tasks.load("clip/zorbo+pimlu").concepts == ("zorbo", "pimlu")
    with pytest.raises(UsageError, match="did you mean zorbo"):
        tasks.load("clip/zorbu")


def test_steps_of_several_concepts_get_lengths_and_layers_of_their_own() -> None:
    """One needs its whole step and the other a third, or half as much in another layer: one factor for both would cost more of the rest."""

    def step(name: str, alpha: float) -> Step:
        return Step(Edit({name: torch.ones(1)}), Point(alpha, 0.0, 90.0))

    def score(edit: Edit, alphas: Sequence[float]) -> list[Point]:
        a, b, other = (float(edit.units.get(n, 0)) for n in ("a", "b", "other"))
        gone = a >= 0.95 and (b >= 0.6 or other >= 0.3)
        return [Point(1.0, 0.0 if gone else 50.0, 100 - 10 * (a + b + other))]

    def kept(found: list[list[Step]], rounds: int = 3) -> tuple[list[Step], float]:
        done, last = single_layer.joint(found, score, rounds=rounds)
        assert last.fa == 0 and last.ta == pytest.approx(100 - 10 * sum(s.point.alpha for s in done))
        return done, last.ta

    alone = [[step("a", 1.0)], [step("b", 2.0)]]
    assert kept(alone, rounds=0)[1] == pytest.approx(70)
    done, ta = kept(alone)
    assert ta > 83 and 0.6 <= done[1].point.alpha < 0.7 and done[0].point.alpha == 1
    done, ta = kept([alone[0], [step("b", 2.0), step("other", 0.31)]])
    assert done[1].edit.names == ("other",) and ta > 86


# --- what the retained gradient, the candidates and the choice hang on ------------------------------------------------
def sorted_pairs(target: CLIP, n: int = 24) -> Examples:
    """Pairs as a folder sorted by caption has them: like stands beside like."""
    texts = tuple("abcd"[4 * i // n] for i in range(n))
    return target.pairs(torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)), texts)


@pytest.fixture
def by_caption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[CLIP, Task]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, task = named()
    monkeypatch.setattr(CLIP, "retained", lambda self, task, asked: sorted_pairs(self))
    return target, task


def test_the_retained_pairs_are_shuffled_by_the_seed_and_averaged(by_caption: tuple[CLIP, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    target, task = by_caption
    seen: list[list[str]] = []
    whole = CLIP.loss
    monkeypatch.setattr(CLIP, "loss", lambda self, batch: (seen.append(batch["text"]), whole(self, batch))[1])

    def taken(seed: int, shuffles: int = 2) -> tuple[list[dict[str, torch.Tensor]], dict[str, float]]:
        torch.manual_seed(seed)
        return sides(target, task, "", ".*", norms=False, pictures=4, pairs=0).retained(6, shuffles)

    r, _ = taken(5)
    assert len(r) == 2 and len(seen) == 8 and all(len(set(texts)) > 1 for texts in seen), "no batch is of one caption alone"
    (side,), D_r, generator = (
        sides(target, task, "", ".*", norms=False, pictures=4, pairs=0).of,
        sorted_pairs(target),
        torch.Generator().manual_seed(5),
    )
    for found in r:  # the paper's mean gradient of this order of the examples, once more
        wanted = saliency.mean(side.theta, target.loss, D_r.only(torch.randperm(len(D_r), generator=generator)).batches(6))
        assert all(torch.allclose(found[n], wanted[n], atol=1e-7) for n in wanted)
    assert "cached_seconds" in taken(5)[1]
    assert "cached_seconds" not in taken(6)[1] and "cached_seconds" not in taken(5, 3)[1], "seed and number are part of the cache's key"
    assert len(sides(target, task, "", ".*", norms=False, pictures=4, pairs=0).retained(24, 2)[0]) == 1, "one batch has but one order"


def test_the_record_says_how_far_the_shuffles_differ(by_caption: tuple[CLIP, Task]) -> None:
    target, task = by_caption
    rows: list[dict[str, float]] = []
    quick(SLUG(batch=6))(target, task, seed=0, log=rows.append)
    layers = [r for r in rows if "importance" in r]
    assert max(r["spread"] for r in layers) > 0 and {r["fronts"] for r in layers} <= {0.0, 0.5, 1.0}
    g, r = {"t.w": torch.tensor([1.0, 0.0])}, [{"t.w": torch.tensor([0.6, 0.8])}, {"t.w": torch.tensor([0.8, 0.6])}]
    (layer,) = single_layer.layers({"t.w": torch.ones(2)}, g, r)
    assert layer.spread == pytest.approx(0.2) and layer.alignment == pytest.approx(0.5**0.5)


def test_the_front_of_each_shuffle_is_counted() -> None:
    found = [Layer("a", "t", 2.0, 0.3, (0.2, 0.4)), Layer("b", "t", 1.0, 0.3, (0.3, 0.3))]
    assert single_layer.steady(found) == {"a": 1.0, "b": 0.5}, "b is on the front of the second alone"


@pytest.mark.parametrize("xl", [False, True])
def test_the_candidates_of_a_pipeline_are_the_weights_that_its_conditioning_reads(xl: bool) -> None:
    target = StableDiffusion.tiny(xl=xl)
    at = sides(target, task_for(target), "", ".*", norms=False, pictures=4, pairs=0)
    assert set(at.towers) == ({"text_encoder", "text_encoder_2"} if xl else {"text_encoder"})
    weights = {n: p for n, p in target.named().items() if n.startswith("text_encoder") and p.ndim > 1 and "embedding" not in n}

    def said() -> torch.Tensor:
        with torch.no_grad():
            cond = target.encode(["a zq"])
        return torch.cat([t.flatten() for t in (cond.states, cond.pooled) if t is not None])

    before = said()
    for n, p in weights.items():
        old = p.detach().clone()
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        assert (n in at.theta) == (not torch.equal(said(), before)), n
        p.data.copy_(old)
    assert ("text_encoder_2.text_projection.weight" in at.theta) == xl
    theta = {n: p.detach() for n, p in at.theta.items()}
    assert all(theta[n].shape == weights[n].shape for n in theta) and set(at.forgotten(task_for(target), 8)) == set(theta)


def test_each_text_encoder_has_a_clip_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    target = StableDiffusion.tiny(xl=True)
    task = task_for(target)
    settled = SLUG(clip="tiny-clip,auto").resolve(target, task)
    assert settled.clip == "tiny-clip,tiny-clip" == SLUG(clip="auto").resolve(target, task).clip
    assert SLUG(params=r"text_encoder_2\..*").resolve(target, task).clip == "tiny-clip"
    assert SLUG(clip="auto").resolve(*named()).clip == "", "a CLIP needs none"
    with pytest.raises(UsageError, match=r"clip names 1 and .* chooses from 2"):
        SLUG(clip="tiny-clip").resolve(target, task)
    target.base = {**target.base, "name": "somebody's"}
    with pytest.raises(UsageError, match="not known which CLIP the text_encoder"):
        SLUG().resolve(target, task)
    for n, width in (("text_encoder", 768), ("text_encoder_2", 1280)):
        monkeypatch.setattr(target.modules[n], "config", deepcopy(target.modules[n].config))
        target.modules[n].config.hidden_size = width  # type: ignore[union-attr]
    assert SLUG().resolve(target, task).clip == "openai/clip-vit-large-patch14,laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
    with pytest.raises(UsageError, match="give the CLIP it is from"):
        sides(target, task, "canvas-clip,tiny-clip", ".*", norms=False, pictures=4, pairs=0)


def test_an_edit_of_either_encoder_changes_what_an_sdxl_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for params in (r"text_encoder\..*", r"text_encoder_2\..*"):
        target = StableDiffusion.tiny(xl=True)
        before = target.encode(["a zq"])
        quick(SLUG(params=params))(target, task_for(target), seed=0)
        after = target.encode(["a zq"])
        assert not torch.equal(before.states, after.states) or not torch.equal(before.pooled, after.pooled)  # type: ignore[arg-type]


def test_what_is_kept_is_the_cosine_of_the_others_with_their_own_text() -> None:
    target, task = named()
    score = scorer(target, task, 1, 4)
    assert isinstance(score, Dual)
    (rest,) = [s for s in score.sets if not s.forget]
    with torch.no_grad():
        v, t = target.images(rest.x.float() / 255).double(), target.texts([ways[0] for ways in rest.names]).double()
    assert score.before()[2] == pytest.approx(100 * float((v * t[rest.y]).sum(1).mean()), abs=1e-4)
    assert score.before()[2] == pytest.approx(score.now()[2], abs=1e-4)


def test_pictures_and_probabilities_tell_steps_of_equal_utility_apart() -> None:
    pipeline = StableDiffusion.tiny()
    drawn = scorer(pipeline, task_for(pipeline), 1, 3)
    assert drawn.before()[2] == 100 == drawn.now()[2]
    with torch.no_grad():
        pipeline.named()["unet.conv_out.weight"].add_(0.3)
    assert drawn.now()[2] < 100
    classifier = Classifier.tiny()
    labelled = scorer(classifier, task_for(classifier), 1, 3)
    logits, y = classifier.predict(labelled.parts[1])  # type: ignore[attr-defined]
    assert labelled.now()[2] == pytest.approx(100 * float(logits.softmax(1)[torch.arange(len(y)), y].mean()), abs=1e-4)


def test_the_mask_of_a_clip_is_of_the_loss_that_ascent_raises() -> None:
    """SLUG's SalUn baseline: |gradient of mean(1 - cos)|, which does not hang on how the forget set is put into batches."""
    target, task = named()
    weights, D_f = target.trainable("full"), target.forgotten(task, Asked())
    wanted = {n: g.abs() for n, g in saliency.mean(weights, target.forgetting, D_f.batches(64)).items()}
    found = GAFT(mask="saliency").measured(target, D_f, weights, 4)
    assert all(torch.allclose(found[n], wanted[n], rtol=1e-3, atol=1e-5) for n in wanted)
