"""The data sets and recipes that papers' tables name: they load without a network, and what they ask for is what is done."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pictures

from unlearners import cli, config, data, grids, registry, run, tables, tasks
from unlearners.base import Data, Task
from unlearners.bench import _Plan
from unlearners.data import augmented, open_data, tidy
from unlearners.errors import UsageError
from unlearners.judges.classifier import network
from unlearners.methods.retrain import Retrain
from unlearners.report_commands import seeded
from unlearners.targets import load
from unlearners.targets.classifier import Classifier
from unlearners.targets.ddpm import DDPM
from unlearners.tasks.pictures import CIFAR10, IMAGENETTE
from unlearners.train import train

PUBLISHED = Path(__file__).resolve().parents[2] / "bench" / "published.yaml"
SHORT = Retrain(epochs=1, batch=16, lr=0.1, cache=False)
SMALL = "resnet20_cifar:width=4"


def picture(i: int, side: int) -> dict[str, bytes]:
    file = io.BytesIO()
    Pictures.new("RGB", (side, side), (i % 256, 7 * i % 256, 90)).save(file, "PNG")
    return {"bytes": file.getvalue()}


def write(
    folder: Path, split: str, column: str, classes: list[str], n: int, side: int = 32, first: dict[str, list[str]] | None = None
) -> None:
    """A split of a hub dataset: a parquet of pictures and labels 0, 1 … in turn, with other columns of labels before its own."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {name: [0] * n for name in first or {}}
    columns |= {"image": [picture(i, side) for i in range(n)], column: [i % len(classes) for i in range(n)]}
    features = {name: ClassLabel(names=names) for name, names in (first or {}).items()}
    features |= {"image": Image(), column: ClassLabel(names=classes)}
    Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local copies of the data sets in the hub's layout, a few pictures each."""
    home = tmp_path / "data"
    write(home / "cifar100" / "cifar100", "train", "fine_label", [f"c{i}" for i in range(4)], 40, first={"coarse_label": ["x", "y"]})
    write(home / "cifar100" / "cifar100", "test", "fine_label", [f"c{i}" for i in range(4)], 8, first={"coarse_label": ["x", "y"]})
    for split, n in (("train", 40), ("test", 20), ("extra", 20)):
        write(home / "svhn" / "cropped_digits", split, "label", [str(i) for i in range(10)], n)
    write(home / "svhn" / "full_numbers", "train", "label", ["no"], 3)
    write(home / "tiny-imagenet" / "data", "train", "label", ["n01443537", "n01629819"], 40, 64)
    write(home / "tiny-imagenet" / "data", "valid", "label", ["n01443537", "n01629819"], 10, 64)
    for k, name in enumerate(sorted(data.WORDNET)):
        (home / "imagenette" / "160px" / "train" / name).mkdir(parents=True)
        Pictures.new("RGB", (20, 16), (20 * k, 0, 0)).save(home / "imagenette" / "160px" / "train" / name / "a.png")
    monkeypatch.setenv("UNLEARNERS_DATA", str(home))
    monkeypatch.setenv("UNLEARNERS_CACHE", str(tmp_path / "cache"))
    data.read.cache_clear()
    data._dataset.cache_clear()
    return home


# --- tasks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(config.load_yaml(PUBLISHED)))
def test_every_published_table_has_a_task(name: str) -> None:
    (table,) = tables.published(PUBLISHED, [name])
    named = (table.task,) if table.task else table.tasks
    assert named
    for task in named:
        assert tasks.load(task).name == task and task in tasks.names()


@pytest.mark.parametrize("family", ["cifar10", "cifar100", "svhn", "tinyimagenet"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_of_every_data_set(family: str, share: float) -> None:
    task = tasks.load(f"{family}/random{100 * share:g}")
    assert task.kind == "samples" and task.forget.rows == f"random={share:g}" and task.retain.rows == f"not random={share:g}"
    assert {task.forget.validation, task.retain.validation, task.holdout.validation} == {0.1}
    assert task.holdout.split == "test" and task.suite == tasks.CLASSIFIER


@pytest.mark.parametrize("name", CIFAR10)
def test_every_class_of_cifar10_leaves_the_test_set(name: str) -> None:
    task = tasks.load(f"cifar10/{name}")
    assert (task.forget.rows, task.holdout.rows) == (f"class={name}", f"not class={name}")
    drawn = tasks.load(f"cifar10/draw-{name}")
    assert [p.prompt for p in drawn.probes if drawn.names_concept(p)] == [name] and len(drawn.seeds) == 500


def test_the_tasks_that_were_there_are_as_they_were() -> None:
    found = tasks.load("cifar10/airplane")
    written = config.build(Task, {"name": "cifar10/airplane", **config.load_yaml(registry.path("tasks", "cifar10/airplane"))})
    assert found == written and "draw" not in config.to_dict(found)["forget"]


@pytest.mark.parametrize("k", range(10))
def test_imagenette_is_asked_for_as_in_the_paper(k: int) -> None:
    task = tasks.load(f"imagenette/{IMAGENETTE[k].lower().replace(' ', '_')}")
    assert task.concepts == (IMAGENETTE[k],) and task.anchors == (IMAGENETTE[(k + 1) % 10],)
    assert task.judge == "imagenet" and [p.prompt for p in task.probes if task.names_concept(p)] == [f"Image of {IMAGENETTE[k]}"]
    assert data.WORDNET[sorted(data.WORDNET)[k]] == IMAGENETTE[k]


def test_the_list_of_tasks_is_whole_and_every_one_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "tasks", "--json"]) == 0
    listed = {row["name"] for row in json.loads(capsys.readouterr().out)["tasks"]}
    assert listed == {*tasks.names(), *tasks.protocols()}
    assert {"cifar100/random10", "svhn/random50", "tinyimagenet/random10", "imagenette/tench", "cifar10/draw-cat", "cifar10/dog"} <= listed
    with pytest.raises(UsageError, match="task of svhn"):
        tasks.load("svhn/random11")


def test_a_judge_that_nobody_trained_yet_is_one_sentence() -> None:
    with pytest.raises(UsageError, match="unlearn train RECIPE --out cifar10-judge"):
        network(tasks.load("cifar10/draw-cat").judge.partition(":")[2])


# --- data in the hub's layout -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "forget", "retain", "test", "classes"),
    [("svhn/random10", 4, 36, 20, 10), ("cifar100/random50", 18, 18, 8, 4), ("tinyimagenet/random10", 3, 33, 10, 2)],
)
def test_a_local_copy_in_the_hubs_layout(copies: Path, name: str, forget: int, retain: int, test: int, classes: int) -> None:
    task = tasks.load(name)
    D_f, D_r, T = (open_data(d, 32) for d in (task.forget, task.retain, task.holdout))
    assert (len(D_f), len(D_r), len(T), len(D_f.classes)) == (forget, retain, test, classes)
    assert sorted(set(D_f.labels.tolist() + D_r.labels.tolist())) == list(range(classes))


def test_imagenettes_folders_are_called_by_name(copies: Path) -> None:
    task = tasks.load("imagenette/church")
    D_f = open_data(task.forget, 16)
    assert D_f.classes == IMAGENETTE and D_f.labels.tolist() == [4]
    assert len(open_data(replace(task.forget, rows="class=n03028079"), 16)) == 1
    assert len(open_data(task.retain, 16)) == 9


def test_validation_pictures_are_never_the_test_pictures(copies: Path) -> None:
    """Tiny ImageNet has no test labels, so its validation pictures are the test pictures."""
    assert len(open_data(Data(source="zh-plus/tiny-imagenet", split="test"), 32)) == 10
    assert not data.has_validation("zh-plus/tiny-imagenet")
    with pytest.raises(UsageError, match="no validation pictures beside its test pictures"):
        open_data(Data(source="zh-plus/tiny-imagenet", split="validation"), 32)


# --- augmentation -------------------------------------------------------------------------------------------------
def windows(x: torch.Tensor, pad: int) -> torch.Tensor:
    padded, side = tidy(torch.nn.functional.pad(x[None], (pad,) * 4))[0], x.shape[-1]
    return torch.stack([padded[:, a : a + side, b : b + side] for a in range(2 * pad + 1) for b in range(2 * pad + 1)])


@given(how=st.sampled_from(["none", "flip", "crop", "crop-flip", "crop3", "crop1-flip", "crop0-flip"]), seed=st.integers(0, 99))
def test_an_augmentation_does_what_its_name_says_and_no_more(how: str, seed: int) -> None:
    x = torch.randint(1, 255, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    out = augmented(x, how)
    pad = {"none": 0, "flip": 0, "crop": 2, "crop-flip": 2, "crop3": 3, "crop1-flip": 1, "crop0-flip": 0}[how]
    for i in range(len(x)):
        seen = windows(x[i], pad)
        seen = torch.cat([seen, seen.flip(-1)]) if "flip" in how else seen
        assert (seen == out[i]).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("source", "said", "classifier", "ddpm"),
    [
        ("ufldl-stanford/svhn:cropped_digits", "auto", "none", "none"),
        ("somewhere/svhn", "auto", "none", "none"),
        ("copies/mnist-png", "auto", "none", "none"),
        ("uoft-cs/cifar10", "auto", "crop-flip", "flip"),
        ("uoft-cs/cifar10", "crop4-flip", "crop4-flip", "crop4-flip"),
        ("ufldl-stanford/svhn:cropped_digits", "crop", "crop", "crop"),
    ],
)
def test_digits_are_not_mirrored(source: str, said: str, classifier: str, ddpm: str) -> None:
    asked = Data(source=source, augment=said)
    assert data.augmentation(asked, Classifier.augmentation) == classifier
    assert data.augmentation(asked, DDPM.augmentation) == ddpm


@pytest.mark.parametrize("said", ["mirror", "crop-", "flip-crop", "crop4flip", "-flip", ""])
def test_an_unknown_augmentation_is_one_sentence(said: str) -> None:
    with pytest.raises(UsageError, match="augment is"):
        Data(source="tiny", augment=said)


# --- subsets ------------------------------------------------------------------------------------------------------
@given(subset=st.integers(4, 48), seed=st.integers(0, 5))
def test_a_subset_has_its_share_of_every_class_and_none_of_what_is_held_back(subset: int, seed: int) -> None:
    asked = Data(source="tiny", validation=0.25, subset=subset, seed=seed)
    D = open_data(asked, 16)
    assert len(D) == subset
    counts = D.labels.bincount(minlength=4)
    assert int(counts.max() - counts.min()) <= 1
    assert set(D.indices.tolist()) <= set(open_data(replace(asked, subset=0), 16).indices.tolist())
    assert torch.equal(D.indices, open_data(asked, 16).indices)
    parts = [open_data(replace(asked, rows=r), 16).indices.tolist() for r in ("random=0.25", "not random=0.25")]
    assert sorted(parts[0] + parts[1]) == D.indices.tolist()
    assert len(open_data(replace(asked, split="validation"), 16)) == 16


def test_a_subset_that_is_too_large_or_misses_a_listed_row_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="subset=65 is more than the 64"):
        open_data(Data(source="tiny", subset=65), 16)
    with pytest.raises(UsageError, match="subset is -1"):
        Data(source="tiny", subset=-1)
    taken = open_data(Data(source="tiny", subset=8), 16).indices.tolist()
    (tmp_path / "rows.txt").write_text(f"{next(i for i in range(64) if i not in taken)}\n")
    with pytest.raises(UsageError, match="not in the subset"):
        open_data(Data(source="tiny", subset=8, rows=str(tmp_path / "rows.txt")), 16)


# --- what a model was trained with, its successors are trained with -----------------------------------------------
@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that was trained on 32 of the tiny pictures, without augmentation."""
    return train(
        SMALL, Data(source="tiny", subset=32), out=tmp_path_factory.mktemp("m") / "m", method=replace(SHORT, augment="none"), side=16
    )


def test_the_record_of_a_model_holds_subset_and_augmentation(original: Path) -> None:
    target = load(str(original))
    assert isinstance(target, Classifier)
    assert (target.trained_on["subset"], target.trained_on["augment"], target.side) == (32, "none", 16)
    whole = tasks.from_data("tiny", "random=0.25")
    D_f, D_r = target.open(whole.forget), target.open(whole.retain)
    assert (len(D_f), len(D_r)) == (8, 24) and D_f.augmentation == D_r.augmentation == "none"
    assert not target.warnings
    assert target.open(replace(whole.retain, augment="flip")).augmentation == "flip"
    target.open(replace(whole.retain, subset=16))
    assert "another part of tiny (validation 0, subset 32, seed 0)" in target.warnings[0]


def test_retraining_sees_the_pictures_of_the_subset_as_they_are(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    real = Classifier.loss
    monkeypatch.setattr(Classifier, "loss", lambda self, batch: seen.append(batch["x"]) or real(self, batch))  # type: ignore[func-returns-value]
    target = load(str(original))
    SHORT(target, tasks.from_data("tiny", "random=0.25"), seed=0)
    x = torch.cat(seen)
    known = tidy(open_data(Data(source="tiny"), 16).images).flatten(1)
    assert len(x) == 24 and all((known == row).all(1).any() for row in x.flatten(1))


def test_retraining_with_another_augmentation_is_kept_apart(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARNERS_CACHE", str(tmp_path))
    task, one = tasks.from_data("tiny", "random=0.25"), replace(SHORT, cache=True)
    for method in (one, replace(one, augment="flip"), replace(one, augment="none"), one):
        method(load(str(original)), task, seed=0)
    assert len(list((tmp_path / "retrain").iterdir())) == 2  # "none" is what the original was trained with


def test_a_record_of_before_is_of_the_familys_augmentation() -> None:
    target = Classifier.tiny()
    target.trained_on = {"source": "tiny", "digest": open_data(Data(source="tiny"), 16).digest, "seed": 0, "validation": 0.0}
    assert target.open(Data(source="tiny")).augmentation == "crop-flip" and not target.warnings


def test_a_split_that_the_model_was_not_trained_on_is_a_warning() -> None:
    target = Classifier.tiny()
    target.trained_on = {"digest": open_data(Data(source="tiny"), 16).digest, "seed": 1, "validation": 0.25}
    target.open(Data(source="tiny", validation=0.25, seed=1))
    assert not target.warnings
    target.open(Data(source="tiny", validation=0.25, seed=2))
    assert "never saw some of the pictures" in target.warnings[0]


# --- recipes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", registry.names("recipes"))
def test_every_recipe_is_of_a_paper_and_makes_a_network(name: str) -> None:
    made = grids.trained(name)
    assert registry.summary("recipes", name) and grids.recipe(made)
    family = name.partition("/")[0]
    assert made.data.source == tasks.load(f"{family}/random10").forget.source
    if "svhn" in name:
        assert grids.recipe(made).augment == "none"
    if "tinyimagenet" in name:
        assert made.side == 64 and grids.recipe(made).augment == "crop4-flip"


def test_there_is_a_recipe_for_every_network_of_the_tables() -> None:
    wanted = {f"{d}/{n}" for d in ("cifar10", "cifar100", "svhn", "tinyimagenet") for n in ("resnet18", "vgg16", "swin_t")}
    assert wanted | {"cifar10/ddpm", "cifar10/resnet34_judge", "cifar10/resnet20_memorised"} <= set(registry.names("recipes"))


def test_train_takes_a_recipe_by_name(
    copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {**config.load_yaml(registry.path("recipes", "svhn/resnet18")), "architecture": SMALL, "preset": "short"}
    (tmp_path / "small.yaml").write_text(json.dumps(recipe))
    monkeypatch.setattr(registry, "names", lambda kind: ["small"] if kind == "recipes" else [])
    monkeypatch.setattr(registry, "path", named(registry.path, tmp_path / "small.yaml"))
    assert cli.main(["train", "small", "--out", str(tmp_path / "m"), "--epochs", "1", "--subset", "20", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 20
    about = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (
        about["trained_on"]["augment"] == "none" and about["trained_on"]["validation"] == 0.1 and about["mean"] == [0.4377, 0.4438, 0.4728]
    )
    assert about["classes"] == [str(i) for i in range(10)]


def named(path: Callable[..., Path], file: Path) -> Callable[..., Path]:
    return lambda kind, name: file if kind == "recipes" else path(kind, name)


def test_neither_a_recipe_nor_data_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["train", "cifar11/resnet18", "--out", str(tmp_path / "m")]) == 2
    assert "no recipe ('unlearn list recipes')" in capsys.readouterr().err


def test_a_ddpm_is_trained_and_read_again(tmp_path: Path) -> None:
    quick = Retrain(steps=2, batch=4, lr=1e-3, optimizer="adam", smoothing=0.9, cache=False)
    made = train("ddpm_cifar:width=8", Data(source="tiny"), out=tmp_path / "m", method=quick, side=16)
    target = load(str(made))
    assert isinstance(target, DDPM) and target.classes == ("a", "b", "c", "d") and target.null_class == 4
    assert target.trained_on["augment"] == "flip" and target.sample(["b"], [0], steps=1).shape == (1, 3, 16, 16)


# --- a forget set for each seed -----------------------------------------------------------------------------------
PER_RUN = replace(
    tasks.from_data("tiny", "random=0.25", validation=0.25), forget=Data(source="tiny", rows="random=0.25", seed="run", validation=0.25),
    retain=Data(source="tiny", rows="not random=0.25", seed="run", validation=0.25),
)  # fmt: skip


def test_the_forget_set_follows_the_seed_and_the_split_does_not() -> None:
    one, two = PER_RUN.at(1), PER_RUN.at(2)
    f = [open_data(t.forget, 16).indices.tolist() for t in (one, two)]
    r = [open_data(t.retain, 16).indices.tolist() for t in (one, two)]
    assert f[0] != f[1] and sorted(f[0] + r[0]) == sorted(f[1] + r[1])
    assert one.forget.seed == 0 and one.forget.draw == 1 and one.holdout == two.holdout
    assert f[1] == open_data(Data(source="tiny", rows="random=0.25", validation=0.25, draw=2), 16).indices.tolist()
    with pytest.raises(UsageError, match="hang on the seed of a run"):
        open_data(PER_RUN.forget, 16)


def test_the_run_record_holds_the_seed_of_its_forget_set(tmp_path: Path) -> None:
    folders = [run.erase("ga", "tiny-classifier", PER_RUN, runs=tmp_path, seed=s, epochs=1) for s in (1, 2)]
    records = [json.loads((f / "run.json").read_text()) for f in folders]
    assert [r["run"]["task"]["forget"]["draw"] for r in records] == [1, 2] and records[0]["hash"] != records[1]["hash"]
    assert [r["data"]["draw"] for r in records] == [1, 2] and records[0]["data"]["augment"] == "crop-flip"
    assert (folders[0] / "forget.txt").read_text() != (folders[1] / "forget.txt").read_text()
    with pytest.raises(UsageError, match="left out other pictures"):
        run.evaluate(folders[0], metrics=["ua"], references=[folders[1]])
    assert run.evaluate(folders[0], metrics=["ua", "ra"], references=[folders[0]]).exists()


def test_the_command_line_asks_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["erase", "ga", "tiny-classifier", "--data", "tiny", "--forget", "random=0.25", "--split-seed", "run", "--seed", "3"]
    assert cli.main([*words, "--dry-run", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)["run"]["task"]
    assert asked["forget"]["draw"] == asked["retain"]["draw"] == 3 and asked["forget"]["seed"] == 0
    assert seeded(asked["forget"], 3, 0) == ["--split-seed", "run"]
    assert (
        cli.main(["erase", "ga", "tiny-classifier", "cifar10/random10", "--split-seed", "run", "--seed", "4", "--dry-run", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["run"]["task"]["forget"]["draw"] == 4
    assert cli.main(["erase", "esd", "canvas", "canvas/neon", "--split-seed", "1", "--dry-run"]) == 2
    assert "--split-seed is of pictures" in capsys.readouterr().err
    assert cli.main(["erase", "ga", "tiny-classifier", "cifar10/random10", "--validation", "0.2", "--dry-run"]) == 2
    assert "--validation is of --data" in capsys.readouterr().err


def plan(tmp_path: Path, **more: Any) -> _Plan:
    spec = {
        "train": {"architecture": SMALL, "data": {"source": "canvas"}, "preset": "short"}, "tasks": ["objects/random10"],
        "methods": [{"name": "retrain", "preset": "short"}, {"name": "ft", "preset": "short"}], "metrics": ["ua", "rmia"],
        "seeds": [0, 1, 2], **more,
    }  # fmt: skip
    (tmp_path / "g.yaml").write_text(json.dumps(spec))
    return _Plan(grids.read(tmp_path / "g.yaml"), tmp_path / "runs")


def forgets(job: Any) -> int | None:
    drawn: int | None = job.how["task"].forget.draw
    return drawn


def test_a_grid_gives_every_seed_its_own_forget_set_and_references_that_left_it_out(tmp_path: Path) -> None:
    made = plan(tmp_path, split_seed="run", references=2)
    jobs = {j.key: j for j in made.jobs(grids.cells(made.spec))}
    for job in jobs.values():
        if job.kind == "evaluate":
            asked = [jobs[f"erase {Path(f).name}"] for f in job.how["references"]]
            mine = jobs[f"erase {job.how['folder'].name}"]
            assert forgets(mine) == job.seed and len(asked) == 2
            assert {forgets(a) for a in asked} == {job.seed} and job.seed not in {a.seed for a in asked}
    assert len([j for j in jobs.values() if j.kind == "train"]) == 3
    assert len([j for j in jobs.values() if j.kind == "erase"]) == 3 * 2 + 3 * 2


def test_without_it_all_seeds_share_one_and_are_each_others_references(tmp_path: Path) -> None:
    made = plan(tmp_path)
    jobs = {j.key: j for j in made.jobs(grids.cells(made.spec))}
    assert {forgets(j) for j in jobs.values() if j.kind == "erase"} == {None}
    assert {len(j.how["references"]) for j in jobs.values() if j.kind == "evaluate"} == {2}
    alone = plan(tmp_path, split_seed="run")
    score = next(j for j in alone.jobs(grids.cells(alone.spec)) if j.kind == "evaluate" and j.method == "ft" and j.seed == 1)
    assert [f.name for f in score.how["references"]] == [alone.folder(grids.cells(alone.spec)[1]).name]


def test_a_grid_trains_a_recipe_by_name(tmp_path: Path) -> None:
    made = plan(tmp_path, train="svhn/resnet18", tasks=["svhn/random10"])
    job = made.train(0)[0]
    assert (
        job.how["architecture"] == "resnet18_cifar" and job.how["method"].augment == "none" and job.how["mean"] == (0.4377, 0.4438, 0.4728)
    )
    with pytest.raises(UsageError, match="another split"):
        plan(tmp_path, train="cifar10/resnet34_judge", tasks=["cifar10/random10"])


def test_words_are_tried_on_a_model_of_words_though_the_task_has_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["erase", "leco", "canvas", "imagenette/tench", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["task"]["concepts"] == ["tench"]
