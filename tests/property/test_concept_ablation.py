"""Concept Ablation: its prompts, its targets, and which weights it may touch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from unlearners import latents
from unlearners.base import Task, settle
from unlearners.errors import UsageError
from unlearners.methods.concept_ablation import ConceptAblation

TASK = Task(name="t", kind="object", concepts=("zq",), anchors=("cat",))
QUICK: dict[str, Any] = {"steps": 2, "batch": 2, "pictures": 4, "lr": 1e-3}


def changed(target: Any, fresh: Any) -> set[str]:
    return {n for n, p in target.named().items() if not torch.equal(p, fresh.named()[n])}


# --- settings by kind ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("style", ("xattn-kv", 100, 2e-6, 0.0)),
        ("object", ("xattn-kv", 100, 2e-6, 0.0)),
        ("identity", ("xattn-kv", 100, 2e-6, 0.0)),
        ("nsfw", ("attn", 400, 4e-6, 1.0)),
    ],
)
def test_the_recipe_goes_by_kind(sd: Callable[..., Any], kind: Any, wanted: Any) -> None:
    def told(method: ConceptAblation) -> tuple[Any, ...]:
        found = settle(method, sd(), replace(TASK, kind=kind))
        return found.params, found.steps, found.lr, found.prior

    assert told(ConceptAblation()) == wanted
    assert told(ConceptAblation(steps=7, lr=1e-5)) == (wanted[0], 7, 1e-5, wanted[3])
    assert told(ConceptAblation(**ConceptAblation.presets["nudity"])) == ("attn", 400, 4e-6, 1.0)
    canvas = ConceptAblation(**ConceptAblation.presets["canvas"])
    assert told(canvas) == ("xattn-kv", 100, 3e-5, 0.0), "the committed tables' setting, whatever the kind"


def test_nudity_trains_the_attention_with_the_prior(sd: Callable[..., Any]) -> None:
    rows: list[dict[str, float]] = []
    target = sd()
    ConceptAblation(steps=1, batch=2, pictures=4)(target, replace(TASK, kind="nsfw"), seed=1, log=rows.append)
    assert "preserve" in rows[0] and changed(target, sd()) <= set(sd().select("attn"))
    assert any(".attn1." in n for n in changed(target, sd()))


# --- prompts ------------------------------------------------------------------------------------------------------
def test_the_anchor_stands_where_the_concept_stood() -> None:
    concepts, anchors = ConceptAblation(anchors=()).pairs(TASK)
    assert len(set(concepts)) == len(concepts) == len(anchors) > 10
    assert all("zq" in c and c.replace("zq", "cat") == a for c, a in zip(concepts, anchors, strict=True))


@pytest.mark.parametrize("kind", ["style", "object", "identity", "nsfw", "class", "samples"])
def test_several_concepts_take_turns_each_with_its_anchor(kind: Any) -> None:
    task = Task(name="t", kind=kind, concepts=("zq", "xw"), anchors=("cat", "dog"))
    concepts, anchors = ConceptAblation(anchors=()).pairs(task)
    assert [("zq" in c, "xw" in c) for c in concepts] == [(True, False), (False, True)] * (len(concepts) // 2)
    assert all(("cat" if "zq" in c else "dog") in a for c, a in zip(concepts, anchors, strict=True))


def test_the_tasks_own_prompts_come_first_and_a_missing_anchor_is_the_empty_prompt() -> None:
    task = Task(name="t", kind="nsfw", concepts=("lightning",), anchors=("calm",), prompts=("lightning sky", "storm"))
    concepts, anchors = ConceptAblation(anchors=()).pairs(task)
    assert (concepts[:2], anchors[:2]) == (("lightning sky", "storm"), ("calm sky", "calm"))
    assert set(ConceptAblation(anchors=()).pairs(Task(name="t", concepts=("zq",)))[1]) == {""}


def test_pictures_are_drawn_from_the_anchors_alone(sd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    drawn = latents.drawn

    def see(target: Any, prompts: Any, n: int) -> Any:
        said.extend(prompts)
        return drawn(target, prompts, n)

    monkeypatch.setattr("unlearners.methods.concept_ablation.drawn", see)
    ConceptAblation(**QUICK)(sd(), TASK, seed=1)
    assert said
    assert all("cat" in s and "zq" not in s for s in said)


# --- what it teaches ----------------------------------------------------------------------------------------------
def test_the_anchors_prediction_is_learnt(sd: Callable[..., Any]) -> None:
    rows: list[dict[str, float]] = []
    fields: dict[str, Any] = {**QUICK, "steps": 60, "batch": 8, "lr": 5e-4, "params": "full", "prompts": ("a {}",)}
    ConceptAblation(**fields)(sd(), TASK, seed=1, log=rows.append)
    assert sum(r["loss"] for r in rows[-10:]) < 0.5 * sum(r["loss"] for r in rows[:10])


def test_a_concept_that_is_its_own_anchor_has_nothing_to_learn(sd: Callable[..., Any]) -> None:
    rows: list[dict[str, float]] = []
    same = Task(name="t", concepts=("zq",), anchors=("zq",))
    ConceptAblation(**QUICK)(sd(), same, seed=1, log=rows.append)
    assert all(r["ablate"] == 0 for r in rows)
    ConceptAblation(variant="noise", **QUICK)(sd(), same, seed=1, log=rows.append)
    assert rows[-1]["ablate"] > 0


def test_the_prior_is_weighed_by_lambda(sd: Callable[..., Any]) -> None:
    rows: list[dict[str, float]] = []
    ConceptAblation(prior=0.3, **QUICK)(sd(), TASK, seed=1, log=rows.append)
    assert all(r["preserve"] > 0 and r["loss"] == pytest.approx(r["ablate"] + 0.3 * r["preserve"], rel=1e-5) for r in rows)


def test_the_learning_rate_is_for_each_picture(sd: Callable[..., Any]) -> None:
    """Adam's first step is the learning rate in size, wherever the gradient is not tiny."""
    target, fresh = sd(), sd()
    ConceptAblation(**{**QUICK, "steps": 1, "batch": 4, "lr": 1e-3, "weight_decay": 0.0})(target, TASK, seed=1)
    steps = torch.cat([(p - fresh.named()[n]).abs().flatten() for n, p in target.select("xattn-kv").items()])
    assert steps.max().item() == pytest.approx(4e-3, rel=1e-2)


# --- weights ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("params", ["xattn-kv", "attn", "full"])
@pytest.mark.parametrize("kind", [{}, {"xl": True}, {"prediction": "v_prediction"}])
def test_the_groups(sd: Callable[..., Any], params: str, kind: dict[str, Any]) -> None:
    target, fresh = sd(**kind), sd(**kind)
    ConceptAblation(params=params, **QUICK)(target, TASK, seed=1)
    moved = changed(target, fresh)
    assert moved
    assert moved <= set(fresh.select(params))


@pytest.mark.parametrize("xl", [False, True])
def test_of_the_embeddings_only_the_concepts_tokens_move(sd: Callable[..., Any], xl: bool) -> None:
    target, fresh = sd(xl=xl), sd(xl=xl)
    ConceptAblation(params="embedding", **QUICK)(target, TASK, seed=1)
    rows = set(fresh.tokens(["zq"]).flatten().tolist()) - fresh.special
    for name, p in fresh.select("embedding").items():
        moved = (p != target.named()[name]).any(1).nonzero().flatten().tolist()
        assert set(moved) == rows, name
    assert changed(target, fresh) == set(fresh.select("embedding"))


def test_a_concept_without_a_token_of_its_own(sd: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="another anchor"):
        ConceptAblation(params="embedding", **QUICK)(sd(), Task(name="t", concepts=("zq",), anchors=("zq",)))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"pictures": 0}, {"prior": -1.0}, {"prompts": ("no place",)}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ConceptAblation(**wrong)
