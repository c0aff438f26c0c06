"""Prompt sets of others: reading them, seeds and guidance of each row down to the sampler, suites, and counts of body parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unlearners import cli, flags, report_attacks, run, tasks
from unlearners.base import Adversarial, Item, Probe, Request, Task
from unlearners.errors import UnlearnError, UsageError
from unlearners.judges import _nudenet
from unlearners.metrics.nudenet_counts import NudenetCounts
from unlearners.metrics.ua import UA
from unlearners.outputs import Gallery
from unlearners.plots import body_parts, standalone
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.testing import FakeJudge

I2P = 'prompt,categories,sd_seed,sd_guidance_scale\na cup,"sexual, hate",7,5\n"a fish, big",violence,8,9.5\na cup,sexual,4294967295,5\n'


@pytest.fixture
def i2p(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "i2p.csv"
    path.write_text("\ufeff" + I2P, encoding="utf-8")
    return path


def test_a_set_is_read_with_its_seeds_and_guidance(i2p: Path) -> None:
    task = tasks.load("i2p@i2p.csv")
    assert [(p.prompt, p.seed, p.guidance) for p in task.probes] == [("a cup", 7, 5), ("a fish, big", 8, 9.5), ("a cup", 2**32 - 1, 5)]
    assert [task.names_concept(p) for p in task.probes] == [True, False, True]
    assert (task.name, task.judge, task.suite, task.kind) == ("i2p", "nudenet", ("nudenet_counts",), "nsfw")
    assert len(tasks.load("i2p@i2p.csv,count=2").probes) == 2
    Path("set").mkdir()
    Path("set/train.csv").write_text(I2P)
    assert tasks.load("i2p@set").probes == task.probes, "a folder in the hub's form is read as the file is"


def test_the_sets_of_attacks_and_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("case_number,prompt,evaluation_seed,evaluation_guidance\n0,Old stone church.,69922,7.5\n")
    church = tasks.load("unlearndiffatk/church@x.csv")
    assert (church.name, church.concepts, church.judge) == ("unlearndiffatk/church", ("church",), "imagenet")
    assert church.pictures(church.probes[0]) == [Request("Old stone church.", 69922, 7.5)] and church.names_concept(church.probes[0])
    gogh = tasks.load("unlearndiffatk/vangogh@x.csv,judge=style:model=a/b,top=3")
    assert gogh.judge == "style:model=a/b,top=3" and gogh.kind == "style"
    coco = tasks.load("coco@x.csv,pictures=real,count=1")
    assert coco.suite == ("fid:reference=real", "clip_score") and not coco.names_concept(coco.probes[0])
    Path("bell.csv").write_text("sensitive prompt\nxx yy\n")
    bell = tasks.load("ringabell/violence@bell.csv")
    assert bell.judge == "q16" and bell.pictures(bell.probes[0]) == [Request("xx yy", 0)]
    Path("mine.yaml").write_text("kind: style\nconcepts: [zq]\njudge: canvas\nprobes: x.csv\n")
    mine = tasks.load("mine.yaml")
    assert mine.probes == (Probe(prompt="Old stone church.", truth={"style": "zq"}, seed=69922, guidance=7.5),)
    assert set(tasks.protocols()) == {"i2p", "unlearndiffatk", "ringabell", "coco", "unlearncanvas"}


@pytest.mark.parametrize(
    ("spec", "text", "kind", "words"),
    [
        ("unlearndiffatk/church@x.csv", "text2,evaluation_seed\na,1\n", UsageError, "has no column prompt or .* rename or add it"),
        ("unlearndiffatk/church@x.csv", "prompt\na\n", UsageError, r"no column evaluation_seed or sd_seed or seed \(it has prompt\)"),
        ("i2p@x.csv", "prompt,sd_seed\na,1\n", UsageError, "no column categories"),
        ("coco@x.csv", "prompt\n", UsageError, "has no prompts"),
        ("coco@x.csv", "", UsageError, "has no prompts"),
        ("coco@x.csv", "prompt,seed\n ,1\n", UsageError, "row 1 of x.csv has no prompt"),
        ("coco@x.csv", "prompt,seed\na,1\nb,x\n", UsageError, "'seed' in row 2 of x.csv is 'x'"),
        ("coco@x.csv", "prompt,seed\na,1.5\n", UsageError, "seed in row 1 of x.csv is 1.5"),
        ("coco@x.csv", "prompt,seed\na,-1\n", UsageError, "whole number from 0 on"),
        ("coco@x.csv", "prompt,guidance\na,nan\n", UsageError, "must be a number"),
        ("coco@none.csv", "", UsageError, "no file none.csv"),
        ("coco", "", UsageError, "coco@FILE.csv"),
        ("coco@no/such-set", "", UnlearnError, "could not be fetched .* connect once"),
        ("unlearndiffatk/churh@x.csv", "", UsageError, "did you mean church"),
        ("unlearndiffatk@x.csv", "", UsageError, "unknown concept of unlearndiffatk"),
        ("coco@x.csv,cont=2", "", UsageError, "did you mean count"),
        ("coco@x.csv,count=0", "prompt\na\n", UsageError, "above 0"),
        ("i2q", "", UsageError, "did you mean i2p"),
    ],
)
def test_bad_input_is_one_sentence(
    spec: str, text: str, kind: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text(text)
    with pytest.raises(kind, match=words):
        tasks.load(spec)


# --- each row's own seed and guidance -----------------------------------------------------------------------------
class Painter:
    """Notes what is drawn, and with which guidance; pictures are told apart by seed and guidance."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[int], Any]] = []

    def sample(self, prompts: list[str], seeds: list[int], *, guidance: float, batch: int = 0, steps: int = 0) -> Tensor:
        self.calls.append((list(prompts), list(seeds), guidance))
        return torch.stack([torch.full((3, 2, 2), (s + 10 * guidance) / 255) for s in seeds])


def test_a_gallery_draws_each_guidance_by_itself_and_keeps_them_apart(tmp_path: Path) -> None:
    painter: Any = Painter()
    gallery = Gallery(tmp_path, {"steps": 2, "guidance": 4.0})
    asked = [Request("a", 1), Request("a", 1, 7.0), Request("b", 2, 7.0), Request("b", 2, 4.0)]
    gallery.fill(lambda: painter, asked, 8, None, "")
    assert painter.calls == [(["a"], [1], 4.0), (["a", "b"], [1, 2], 7.0), (["b"], [2], 4.0)]
    again = Gallery(tmp_path, {"steps": 2, "guidance": 4.0})
    again.fill(lambda: painter, asked, 8, None, "")
    assert len(painter.calls) == 3, "what is there is not drawn again"
    assert [round(255 * float(again.picture(r).mean())) for r in asked] == [41, 71, 72, 42]
    assert again.repeats(painter, asked[1]) and painter.calls[-1][2] == 7.0


def test_metrics_ask_for_a_rows_own_seed_and_guidance() -> None:
    own = Probe(prompt="a", truth={"object": "cup"}, seed=99, guidance=3.0)
    task = Task(name="t", concepts=("cup",), probes=(own, Probe(prompt="b", truth={"object": "cup"})), seeds=(1, 2))
    target = StableDiffusion.tiny()
    assert UA().requests(target, task) == [Request("a", 99, 3.0), Request("b", 1), Request("b", 2)]
    labels: Any = type("Labels", (), {"labels": lambda self, requests, domain: ["cup", "", "cup"]})()
    assert UA().score(target, task, labels).n == 3


def test_an_attack_draws_with_the_guidance_of_the_row_and_spares_what_is_too_long(sd: Callable[..., Any]) -> None:
    from unlearners.attacks.random_tokens import RandomTokens

    target, drawn = sd(), []
    target.sampler = {"steps": 1, "guidance": 2.0}
    sample = target.sample
    target.sample = lambda cond, seeds, *, guidance=None: (drawn.append((list(seeds), guidance)), sample(cond, seeds, guidance=guidance))[1]
    items = [Item(prompt="a", seed=1), Item(prompt="b", seed=2, guidance=9.0), Item(prompt="c", seed=3, spared=True)]
    never = FakeJudge(lambda x: [False] * len(x))
    found = RandomTokens(tries=2)(target, Task(name="t", concepts=("zq",)), never, items)
    assert drawn[:2] == [([1, 3], None), ([2], 9.0)] and [v.queries for v in found] == [2, 2, 0]
    assert {(tuple(s), g) for s, g in drawn[2:]} == {((1,), None), ((2,), 9.0)}
    low, high = target.replay([Adversarial(prompt="a")], [1], guidance=1.0), target.replay([Adversarial(prompt="a")], [1], guidance=9.0)
    assert not torch.equal(low, high)


# --- suites -------------------------------------------------------------------------------------------------------
@pytest.fixture
def erased(i2p: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on the tiny model, whose pictures take two steps."""
    init = StableDiffusion.__init__

    def short(self: Any, *parts: Any) -> None:
        init(self, *parts)
        self.sampler = {"steps": 1, "guidance": 2.0}

    monkeypatch.setattr(StableDiffusion, "__init__", short)
    return run.erase("uce", "tiny", tasks.from_concept("cup", "object"), runs="runs")


def test_the_suite_of_i2p_counts_body_parts_and_draws_them(
    erased: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(erased), "--suite", "i2p@i2p.csv", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "nudenet_counts/female_breast" in said and said.splitlines()[-1] == f"→ {erased / 'suites' / 'i2p.json'}"
    rows = {r["metric"]: r for r in json.loads((erased / "suites" / "i2p.json").read_text())}
    assert len(rows) == 11 and all(r["value"] == 0 == r["before"]["value"] and r["n"] == 3 for r in rows.values())
    assert (erased / "suites" / "i2p.svg").read_text().startswith("<svg xmlns")
    assert not (erased / "results.json").exists()
    lines = [json.loads(line) for line in (erased / "samples" / "manifest.jsonl").read_text().splitlines()]
    assert {(r["prompt"], r["seed"], r["guidance"]) for r in lines} == {("a cup", 7, 5), ("a fish, big", 8, 9.5), ("a cup", 2**32 - 1, 5)}
    monkeypatch.setattr(StableDiffusion, "sample", None)  # nothing is drawn again
    assert run.evaluate(erased, suite="i2p@i2p.csv") == erased / "suites" / "i2p.json"


def test_an_attack_on_a_set_reports_how_many_it_left_out(erased: Path) -> None:
    Path("set.csv").write_text("prompt,evaluation_seed,evaluation_guidance\na cup,5,3\na cup on a very long table,6,3\n")
    spec = "unlearndiffatk/nudity@set.csv"
    path = run.attack("random_tokens", erased, suite=spec, max_tokens=12, tries=1)
    found = json.loads(path.read_text())
    assert found["filter"] == {"max_tokens": 12, "attacked": 1, "of": 2} and len(found["verdicts"]) == 2
    assert [(v["seed"], v["queries"]) for v in found["verdicts"]] == [(5, 1), (6, 0)]
    assert found["judging"]["name"] == "nudenet" and found["judging"]["package"].startswith("nudenet ") and found["asked"]["suite"] == spec
    more = json.loads(run.attack("random_tokens", erased, suite=spec, prompts=3, tries=1).read_text())
    assert [v["seed"] for v in more["verdicts"]] == [5, 6, 6] and more["filter"] is None


def test_prompts_that_leave_no_room_are_counted(erased: Path) -> None:
    """The tiny text encoder reads 24 tokens, start and end included; its tokens are letters."""
    Path("set.csv").write_text("prompt,evaluation_seed\na cup,5\n" + "a" * 21 + ",6\n" + "a" * 22 + ",7\n" + "a" * 60 + ",8\n")
    how = {"suite": "unlearndiffatk/nudity@set.csv", "steps": 1, "tries": 1}
    found = json.loads(run.attack("random_tokens", erased, **how).read_text())
    assert found["full"] == 2 and len(found["verdicts"]) == 4
    (doubt,) = [d for d in report_attacks.doubts(flags.read(erased)) if "cut" in d]
    assert doubt.startswith("2 of 4 prompts are as long as the text encoder reads or longer")
    with pytest.raises(UsageError, match="k = 23 tokens do not fit this text encoder; give k from 1 to 22"):
        run.attack("random_tokens", erased, k=23, **how)


def test_a_judge_that_never_fires_on_the_original_raises_a_flag(i2p: Path) -> None:
    probe = Probe(prompt="lightning over a cup", truth={"nsfw": "lightning"})
    task = Task(
        name="storm", kind="nsfw", concepts=("lightning",), probes=(probe,), seeds=(1, 2), judge="nudenet:threshold=0.6", suite=("ua",)
    )
    folder = run.erase("uce", "tiny", task, runs="runs")
    run.evaluate(folder, steps=1)
    assert any("The judge finds the concept in only 0.0 %" in doubt for doubt in flags.flags(folder))
    said = json.loads((folder / "evaluate.json").read_text())
    assert said["judge"] == "nudenet:threshold=0.6" and said["judging"]["threshold"] == 0.6 and len(said["judging"]["classes"]) == 9


# --- counts -------------------------------------------------------------------------------------------------------
def test_counts_are_of_boxes_above_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = {1: [("BELLY_EXPOSED", 0.9), ("BELLY_EXPOSED", 0.7), ("FACE_MALE", 0.99)], 2: [("BELLY_EXPOSED", 0.5), ("FEET_EXPOSED", 0.7)]}
    monkeypatch.setattr(_nudenet, "detections", lambda images, batch, channels: [boxes[int(x[0, 0, 0])] for x in images])
    outputs: Any = type("O", (), {"images": lambda self, rs: torch.stack([torch.full((3, 2, 2), float(r.seed)) for r in rs])})()
    task = Task(name="t", kind="nsfw", concepts=("nudity",), probes=(Probe(prompt="x", truth={}),), seeds=(1, 2))
    target = StableDiffusion.tiny()

    def counts(**fields: Any) -> dict[str, float]:
        return {k: v.value for k, v in NudenetCounts(batch=1, **fields).score(target, task, outputs).items() if v.value}

    assert counts() == {"belly": 2, "feet": 1, "total": 3, "pictures": 2}
    assert counts(count="pictures", threshold=0.4) == {"belly": 2, "feet": 1, "total": 3, "pictures": 2}
    assert counts(threshold=0.8) == {"belly": 1, "total": 1, "pictures": 1}


def test_the_plot_of_body_parts() -> None:
    rows = [
        {"metric": "nudenet_counts/belly", "value": 3, "before": {"value": 120}},
        {"metric": "nudenet_counts/feet", "value": 0, "before": None},
        {"metric": "nudenet_counts/total", "value": 3, "before": {"value": 120}},
    ]
    drawing = body_parts(rows, "a")
    assert drawing.startswith("<svg") and "currentColor" in drawing and body_parts([{"metric": "ua", "value": 1}], "a") == ""
    assert 'xmlns="http://www.w3.org/2000/svg"' in standalone(drawing)
