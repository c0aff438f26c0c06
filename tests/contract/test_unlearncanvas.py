"""UnlearnCanvas' protocol as tasks: the grid, its words and seeds, what the judge reads of it, and how it is listed and refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from unlearners import cli, config, tasks, testing
from unlearners.base import Request, Task
from unlearners.errors import UsageError
from unlearners.judges import _named
from unlearners.judges import unlearncanvas as judge
from unlearners.methods.uce import UCE
from unlearners.metrics.cra import CRA
from unlearners.metrics.ira import IRA
from unlearners.metrics.ua import UA
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.tasks import unlearncanvas


def test_a_style_is_measured_on_the_official_grid() -> None:
    task = tasks.load("unlearncanvas/Van_Gogh")
    assert (task.name, task.kind, task.concepts, task.judge) == ("unlearncanvas/Van_Gogh", "style", ("Van Gogh",), "unlearncanvas")
    assert task.suite == ("ua", "ira", "cra", "fid", "cost") and task.seeds == (188, 288, 588, 688, 888)
    pictures = [r for p in task.probes for r in task.pictures(p)]
    assert len(pictures) == len(set(pictures)) == 51 * 20 * 5
    assert (
        Request("A Dogs image in Van Gogh style.", 588, 9.0) in pictures
        and Request("A Sea image in Seed Images style.", 188, 9.0) in pictures
    )
    assert Counter(p.truth["style"] for p in task.probes) == dict.fromkeys((s.replace("_", " ") for s in judge.STYLES), 20)
    assert Counter(p.truth["object"] for p in task.probes) == dict.fromkeys(judge.OBJECTS, 51)
    assert sum(map(task.names_concept, task.probes)) == 20 and len(task.preserve) == 49 and task.anchors == ("Photo",)


def test_an_object_is_measured_on_the_same_grid() -> None:
    task, style = tasks.load("unlearncanvas/Dogs"), tasks.load("unlearncanvas/Rust")
    assert task.probes == style.probes and task.axis == "object" and sum(map(task.names_concept, task.probes)) == 51
    assert task.said == ("An image of Dogs",) and style.said == ("Rust Style",)
    assert len(task.preserve) == 19 and set(task.anchors) < set(task.preserve)


def test_there_are_fifty_styles_and_twenty_objects_and_the_judge_reads_all() -> None:
    assert sorted((*unlearncanvas.STYLES, unlearncanvas.PHOTO)) == list(judge.STYLES) and unlearncanvas.OBJECTS == judge.OBJECTS
    assert len(set(unlearncanvas.names())) == 70
    for name in unlearncanvas.names():
        task = tasks.load(f"unlearncanvas/{name}")
        for domain, classes in (("style", judge.STYLES), ("object", judge.OBJECTS)):
            labels = _named.known("unlearncanvas", classes, task, domain)
            assert len(labels) == len(classes) and set(labels.values()) == {p.truth[domain] for p in task.probes}
        assert config.build(Task, config.to_dict(task)) == task


def test_the_accuracies_count_what_the_benchmark_counts() -> None:
    task, target = tasks.load("unlearncanvas/Van_Gogh"), StableDiffusion.tiny()
    truth = {p.prompt: p.truth for p in task.probes}
    perfect = testing.FakeOutputs(lambda r, domain: truth[r.prompt][domain])
    for metric, value, n in ((UA(), 0, 20 * 5), (IRA(), 100, 50 * 20 * 5), (CRA(), 100, 50 * 20 * 5)):
        score = metric.score(target, task, perfect)
        assert (score.value, score.n) == (value, n)
    lost = testing.FakeOutputs(lambda r, domain: "Photo" if "Van Gogh" in r.prompt and domain == "style" else truth[r.prompt][domain])
    assert UA().score(target, task, lost).value == 100 and IRA().score(target, task, lost).value == 100


def test_judge_and_real_pictures_are_named_behind_the_task() -> None:
    task = tasks.load("unlearncanvas/Dogs,pictures=real/no dogs,judge=unlearncanvas:style=a.pth,object=b.pth")
    assert task.judge == "unlearncanvas:style=a.pth,object=b.pth" and task.suite[3] == "fid:reference=real/no dogs"
    assert tasks.load("unlearncanvas/Dogs,judge=canvas").judge == "canvas"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Van_Gog", "unknown style or object of UnlearnCanvas 'Van_Gog'; did you mean Van_Gogh"),
        ("", "unknown style or object of UnlearnCanvas ''; known: Abstractionism"),
        ("Seed_Images", "unknown style or object of UnlearnCanvas 'Seed_Images'"),
        ("dogs", "did you mean Dogs"),
        ("Dogs,count=3", "unknown option of unlearncanvas 'count'; known: judge, pictures"),
    ],
)
def test_what_the_benchmark_has_not_is_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tasks.load(f"unlearncanvas/{name}")


def test_seventy_tasks_are_one_line_of_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "tasks"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "unlearncanvas" in line]
    assert len(lines) == 1 and "unlearncanvas/Van_Gogh" in lines[0] and "unlearncanvas/Dogs" in lines[0]
    assert not [n for n in tasks.names() if n.startswith("unlearncanvas")]


def test_a_model_forgets_a_style_of_the_benchmark(tmp_path: Path) -> None:
    from unlearners import run

    folder = run.erase(UCE(), "tiny", tasks.load("unlearncanvas/Rust"), runs=tmp_path)
    assert folder.name.startswith("unlearncanvas-Rust-uce-") and run.read_run(folder)["status"] == "done"
