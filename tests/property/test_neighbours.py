"""What stays where nobody names it: never the concept itself, the same each time, in the record, and as strong as the rest allows."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from unlearners import closed_form, neighbours, retain, run, tasks
from unlearners.base import Task, settle
from unlearners.cli import main
from unlearners.errors import UsageError
from unlearners.methods.advunlearn import AdvUnlearn
from unlearners.methods.concept_ablation import ConceptAblation
from unlearners.methods.esd import ESD
from unlearners.methods.rece import RECE
from unlearners.methods.speed import SPEED
from unlearners.methods.uce import UCE
from unlearners.neighbours import NAMED
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.tasks import from_concept

FEW = {
    "everyday": ("house", "red cup", "mug", "oak tree", "fish"),
    "styles": ("mosaic", "ink wash", "neon sign"),
    "people": ("a man", "a nun"),
}


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return StableDiffusion.tiny(seed=3)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short lists, so that texts are few."""
    monkeypatch.setattr(retain, "named", lambda which: FEW.get(which, ("a park", "a pier")))


@pytest.mark.parametrize(
    ("kind", "concept", "synonyms"),
    [
        ("object", "cup", ("mug", "teacup")),
        ("object", "Cups", ()),
        ("style", "mosaic", ("tiled",)),
        ("style", "in the manner of neon signs", ()),
        ("style", "Van Gogh", ()),
        ("identity", "old man", ()),
        ("nsfw", "nudity", ("naked woman",)),
    ],
)
def test_the_concept_and_its_other_words_are_not_among_what_stays(tiny: StableDiffusion, kind: Any, concept: str, synonyms: Any) -> None:
    task = dataclasses.replace(from_concept(concept, kind), synonyms=synonyms)
    found = neighbours.choose(tiny, task)
    taken = {w for p in (concept, *synonyms) for w in retain._words(p)} - retain.SMALL
    for words in (found.own, found.other, found.guide, found.preserve, found.templates):
        assert words
        assert len(set(words)) == len(words)
        assert not [p for p in words if taken & (set(retain._words(p)) - {"photo", "picture", "portrait", "image", "style"})]
    assert all(t.count("{}") == 1 for t in found.templates)
    assert set(found.guide) <= set(found.own)


def test_the_choice_asks_no_generator(tiny: StableDiffusion, few: None) -> None:
    first = neighbours.choose(tiny, from_concept("zq", "style"))
    random.seed(5)
    torch.manual_seed(5)
    assert neighbours.choose(tiny, from_concept("zq", "style")) == first


def test_what_the_model_reads_as_the_concept_is_left_out(tiny: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer drops blanks, so "z q" reads as "zq" does, although they share no word."""
    others = tuple(f"{a}{b}" for a in "abcdefg" for b in "hijklmno")
    monkeypatch.setattr(retain, "named", lambda which: (*others, "z q") if which == "everyday" else ("ink", "oil"))
    own = neighbours.choose(tiny, from_concept("zq", "object")).own
    assert "z q" not in own
    assert len(own) == len(others)


def test_a_word_that_the_concept_is_a_part_of_is_left_out(tiny: StableDiffusion) -> None:
    """A tokenizer may read "goldfish" as "gold" and "fish"."""
    assert "goldfish" not in neighbours.choose(tiny, from_concept("fish", "object")).own
    assert "goldfish" in retain.named("everyday")


# --- closed forms -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("xl", [False, True])
@pytest.mark.parametrize("kind", ["style", "object", "identity", "nsfw"])
def test_text_alone_moves_what_stays_no_further_than_said(few: None, kind: Any, xl: bool) -> None:
    target, rows = StableDiffusion.tiny(seed=3, xl=xl), []
    UCE()(target, from_concept("in the manner of zq", kind), log=rows.append)
    assert rows[0]["moved"] <= neighbours.MOVED + 1e-6
    assert rows[0]["erased"] < 1
    assert rows[0]["change"] > 0


@pytest.mark.parametrize("method", [UCE(), RECE(), SPEED()], ids=["uce", "rece", "speed"])
def test_neighbours_that_are_named_leave_everything_as_published(tiny: StableDiffusion, method: Any) -> None:
    for task in (
        Task(name="t", kind="style", concepts=("zq",), anchors=("art",), preserve=("ink", "oil")),
        from_concept("zq", "object", preserve=("ink",)),
    ):
        assert settle(method, tiny, task) == settle(type(method)(**type(method).presets["paper"]), tiny, task)


@pytest.mark.parametrize("kind", [UCE, RECE, SPEED])
def test_presets_of_papers_never_choose(tiny: StableDiffusion, kind: Any) -> None:
    for preset in kind.presets.values():
        settled = settle(kind(**preset), tiny, from_concept("zq", "style"))
        assert not {f: getattr(settled, f) for f in ("preserved", "guide", "retain") if getattr(settled, f, ())}


def test_a_named_anchor_stays_the_guide(tiny: StableDiffusion, few: None) -> None:
    settled = settle(UCE(), tiny, from_concept("zq", "style", anchors=("ink",)))
    assert settled.preserved
    assert settled.guide == ()
    assert settled.away == 0


def test_fields_that_are_given_are_kept(tiny: StableDiffusion, few: None) -> None:
    settled = settle(UCE(erase_scale=3.0, templates=("{}",), guide=("oil",), away=0.1), tiny, from_concept("zq", "style"))
    assert (settled.erase_scale, settled.templates, settled.guide, settled.away) == (3.0, ("{}",), ("oil",), 0.1)
    assert settle(UCE(preserved=("",)), tiny, from_concept("zq", "style")) == UCE(**{**NAMED, "preserved": ("",)})


def test_guides_are_means_from_the_concepts_own_last_token_on(tiny: StableDiffusion) -> None:
    task = Task(name="t", kind="style", concepts=("zq",))
    c, g = closed_form.toward(tiny, task, ["a {} sky"], ["ink", "oils"], "all")
    with torch.no_grad():
        said, one, two = (tiny.encode([p]).states[0].double() for p in ("a zq sky", "a ink sky", "a oils sky"))
    # a letter is a token: a z q ..., a i n k ..., a o i l s ...
    assert torch.allclose(c, said[3 : 3 + len(c)])
    assert torch.allclose(g, (one[4 : 4 + len(c)] + two[5 : 5 + len(c)]) / 2)
    assert len(c) == len(said) - 5
    assert len(closed_form.toward(tiny, task, ["a {} sky"], ["ink"], "last")[0]) == 1


def test_many_vectors_are_gathered_into_few_of_the_same_second_moment(tiny: StableDiffusion) -> None:
    prompts = [f"a {a}{b}" for a in "abcde" for b in "fghij"]
    few_, n = closed_form.gathered(tiny, prompts, "all", batch=4)
    all_ = closed_form.kept(tiny, prompts, "all")
    assert n == len(all_)
    assert len(few_) <= all_.shape[1]
    assert torch.allclose(few_.T @ few_, all_.T @ all_, rtol=1e-10)


# --- methods that train -------------------------------------------------------------------------------------------
def test_esd_fast_says_the_concept_beside_other_things_and_holds_what_stays(tiny: StableDiffusion, few: None) -> None:
    fast, alone = ESD(**ESD.presets["fast"]), from_concept("zq", "object")
    settled = settle(fast, tiny, alone)
    assert settled.templates == neighbours.choose(tiny, alone).templates
    assert "" in settled.preserved
    assert len(settled.preserved) > 4
    assert settled.params == "xattn"
    for task in (
        from_concept("zq", "object", preserve=("ink",)),
        from_concept("zq", "nsfw"),
        Task(name="t", kind="class", concepts=("zq",)),
    ):
        plain = settle(fast, tiny, task)
        assert (plain.templates, plain.preserved, plain.lr) == ((), (), 2e-4)
    for preset in ("paper", "release"):
        assert (settle(ESD(**ESD.presets[preset]), tiny, alone).templates, settle(ESD(), tiny, alone).preserved) == ((), ())


def test_what_esd_holds_is_where_it_was_at_the_start_and_pulls_afterwards(few: None) -> None:
    how, rows = {"sampler_steps": 2, "batch": 2, "pool": 2, "steps": 3, "lr": 1e-2}, []
    ESD(**{**ESD.presets["fast"], **how})(StableDiffusion.tiny(seed=3), from_concept("zq", "style"), log=rows.append)
    assert rows[0]["stays"] == 0
    assert rows[2]["stays"] > 0
    ends = []
    for hold in (0.0, 100.0):
        target = StableDiffusion.tiny(seed=3)
        ESD(**{**ESD.presets["fast"], **how, "hold": hold})(target, from_concept("zq", "style"))
        ends.append(torch.cat([p.flatten() for p in target.select("xattn").values()]))
    assert not torch.equal(*ends)


def test_concept_ablation_takes_neighbours_in_turn_for_an_anchor_that_nobody_named(tiny: StableDiffusion, few: None) -> None:
    alone = from_concept("zq", "object")
    settled = settle(ConceptAblation(), tiny, alone)
    assert settled.anchors == neighbours.choose(tiny, alone).guide
    concepts, anchors = settled.pairs(alone)
    assert all("zq" in c for c in concepts)
    assert {w for w in settled.anchors for a in anchors if w in a} == set(settled.anchors)
    assert settle(ConceptAblation(), tiny, from_concept("zq", "object", anchors=("ink",))).anchors == ()
    assert settle(ConceptAblation(**ConceptAblation.presets["canvas"]), tiny, alone).anchors == ()


def test_advunlearn_adds_the_list_of_the_kind_where_nobody_names_neighbours(tiny: StableDiffusion) -> None:
    sets = {k: settle(AdvUnlearn(), tiny, from_concept("zq", k)).retain_set for k in ("style", "object", "identity", "nsfw")}  # type: ignore[arg-type]
    assert sets == {
        "style": "everyday+styles",
        "object": "everyday+styles",
        "identity": "everyday+people",
        "nsfw": "everyday+people",
    }
    assert settle(AdvUnlearn(), tiny, from_concept("zq", "style", preserve=("ink",))).retain_set == "everyday"


# --- what is said of it -------------------------------------------------------------------------------------------
def test_the_record_has_the_whole_choice(tmp_path: Path, few: None) -> None:
    task = from_concept("zq", "style")
    record = json.loads((run.erase(UCE(), "tiny", task, out=tmp_path / "run") / "run.json").read_text())
    around = neighbours.choose(StableDiffusion.tiny(), task, neighbours.CLOSED_CONTEXTS)
    assert tuple(record["chosen"]["preserved"]) == ("", *around.preserve)
    assert tuple(record["chosen"]["guide"]) == around.guide
    assert tuple(record["chosen"]["templates"]) == around.templates
    assert record["chosen"]["erase_scale"] > 0


def test_the_dry_run_shows_the_choice(capsys: pytest.CaptureFixture[str], few: None) -> None:
    assert main(["erase", "uce", "tiny", "--concept", "zq", "--kind", "style", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(f"{field}:" in said for field in ("preserved", "guide", "templates", "erase_scale"))


def test_usual_neighbours_are_not_repeated_as_if_somebody_had_named_them() -> None:
    assert from_concept("zq", "style").usual == ("anchors", "preserve")
    assert from_concept("zq", "style", preserve=("ink",)).usual == ("anchors",)
    assert from_concept("zq", "style", preserve=("ink",), anchors=("art",)).usual == ()
    assert not tasks.load("canvas/neon").usual


def test_a_task_of_the_canvas_in_text_alone_names_nothing_of_the_canvas() -> None:
    task, bare = tasks.load("text/cup"), from_concept("cup", "object")
    for field in ("kind", "concepts", "anchors", "preserve", "usual", "prompts", "synonyms"):
        assert getattr(task, field) == getattr(bare, field)
    assert sum(len(task.pictures(p)) for p in task.probes if task.names_concept(p)) >= 200


# --- refusals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["class", "samples"])
def test_a_kind_without_a_list_is_refused_in_a_sentence(tiny: StableDiffusion, kind: Any) -> None:
    with pytest.raises(UsageError, match="preserve"):
        UCE()(tiny, Task(name="t", kind=kind, concepts=("zq",)))


def test_a_list_that_the_filter_empties_is_refused_in_a_sentence(tiny: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retain, "named", lambda which: ("cup", "red cup", "paper cups"))
    with pytest.raises(UsageError, match="no two words"):
        UCE()(tiny, from_concept("cup", "object"))
