"""Labelled pictures: one seeded split, what can be forgotten, and one sentence for everything that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unlearners import tasks
from unlearners.base import Data
from unlearners.data import Examples, Loader, open_data, shifted, tidy
from unlearners.errors import UsageError
from unlearners.targets.classifier import Classifier


def opened(rows: str = "", *, split: str = "train", validation: float = 0.0, seed: int = 0, source: str = "tiny") -> Examples:
    return open_data(Data(source=source, split=split, rows=rows, validation=validation, seed=seed), 16)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder: two classes, eight training pictures of odd sizes each, two test pictures each."""
    for split, count in (("train", 8), ("test", 2)):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.new("RGB", (20 + i, 18), (100 * k, 10 * i, 50))
                picture.save(tmp_path / "pictures" / split / name / f"{name}{i}.png")
    return tmp_path / "pictures"


@given(
    rows=st.sampled_from(["class=b", "class=0,3", "random=0.25", "random=7"]),
    validation=st.sampled_from([0.0, 0.25]),
    seed=st.integers(0, 9),
)
def test_forget_and_retain_divide_the_training_pictures(rows: str, validation: float, seed: int) -> None:
    parts = [opened(r, validation=validation, seed=seed).indices.tolist() for r in (rows, f"not {rows}", "")]
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == parts[2]
    if validation:
        held = opened(split="validation", validation=validation, seed=seed).indices.tolist()
        assert not set(held) & set(parts[2])
        assert sorted(held + parts[2]) == list(range(64))
        assert opened(split="validation", validation=validation, seed=seed).labels.bincount().tolist() == [4] * 4


def test_the_same_seed_gives_the_same_rows_and_another_others() -> None:
    assert torch.equal(opened("random=0.5", seed=1).indices, opened("random=0.5", seed=1).indices)
    assert not torch.equal(opened("random=0.5", seed=1).indices, opened("random=0.5", seed=2).indices)


def test_batches_are_in_range_and_in_order() -> None:
    D = opened()
    x = torch.cat([b["x"] for b in D.batches(10)])
    assert x.min() >= 0 and x.max() <= 1
    assert torch.equal((x * 255).round().byte(), D.images)


def test_an_epoch_of_a_loader_shows_every_picture_once_and_resumes() -> None:
    torch.manual_seed(0)
    loader = Loader(opened(), 10)
    seen = torch.cat([loader.draw()["rows"] for _ in range(len(loader))])
    assert sorted(seen.tolist()) == list(range(64))
    loader.draw()
    state, rng = loader.state_dict(), torch.get_rng_state()
    expected = [loader.draw()["x"] for _ in range(8)]
    again = Loader(opened(), 10)
    again.load_state_dict(state)
    torch.set_rng_state(rng)
    assert all(torch.equal(again.draw()["x"], x) for x in expected)


def test_augmentation_is_a_shift_over_a_black_border_and_a_flip() -> None:
    x = torch.randint(1, 255, (40, 3, 16, 16), dtype=torch.uint8)
    torch.manual_seed(1)
    out = shifted(x, 2)
    padded = tidy(torch.nn.functional.pad(x, (2, 2, 2, 2)))
    for i in range(len(x)):
        windows = [padded[i, :, a : a + 16, b : b + 16] for a in range(5) for b in range(5)]
        assert any(torch.equal(out[i], w) or torch.equal(out[i], w.flip(-1)) for w in windows)


def test_an_image_folder_by_file_name_or_row(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "forget.txt"
    listed.write_text("train/cat/cat3.png\ndog5.png\n0\n")
    task = tasks.from_data(str(folder), str(listed))
    D_f, D_r = open_data(task.forget, 16), open_data(task.retain, 16)
    assert len(D_f) == 3 and len(D_r) == 13
    assert sorted(D_f.source.names[i].rpartition("/")[2] for i in D_f.indices) == ["cat0.png", "cat3.png", "dog5.png"]
    assert D_f.images.shape == (3, 3, 16, 16)
    assert len(open_data(task.holdout, 16)) == 4
    assert task.concepts == ("3 listed pictures",)


def test_a_list_that_changed_is_noticed(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "forget.txt"
    listed.write_text("1\n")
    task = tasks.from_data(str(folder), str(listed))
    listed.write_text("1\n2\n")
    with pytest.raises(UsageError, match="has changed since"):
        open_data(task.forget, 16)


def test_a_folder_without_test_pictures_has_no_metrics_of_them(folder: Path) -> None:
    task = tasks.from_data(str(folder / "train"), "class=cat")
    assert task.suite == ("ua", "ra", "cost")
    with pytest.raises(UsageError, match="give the training data"):
        open_data(task.holdout, 16)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("class=zebra", "unknown class of tiny 'zebra'"),
        ("class=9", "has classes 0 to 3 and no class 9"),
        ("class=a,b,c,d", "picks|whole"),
        ("random=0", "no share or number"),
        ("random=x", "no share or number"),
        ("random=1.5", "no share or number"),
        ("random=65", "more than the 64 training pictures"),
        ("random=0.001", "picks no train picture"),
        ("missing.txt", "there is no file 'missing.txt'"),
    ],
)
def test_what_cannot_be_forgotten_is_said_in_one_sentence(rows: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as error:
        opened(rows)
        opened(f"not {rows}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "sentence"), [("64\n", "names row 64"), ("nobody.png\n", "unknown file"), ("\n", "picks no train picture")]
)
def test_a_list_that_does_not_fit(lines: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(UsageError, match=sentence):
        opened(str(tmp_path / "list.txt"))


def test_a_listed_validation_picture_was_never_seen(tmp_path: Path) -> None:
    held = opened(split="validation", validation=0.25).indices[0]
    (tmp_path / "list.txt").write_text(f"{held}\n")
    with pytest.raises(UsageError, match="never saw"):
        opened(str(tmp_path / "list.txt"), validation=0.25)


def test_data_with_more_classes_than_the_model(folder: Path) -> None:
    with torch.random.fork_rng():
        target = Classifier.fresh("resnet20_cifar:width=4", ("a", "b"), side=16)
    with pytest.raises(UsageError, match="labels pictures 0 to 3 and this model has classes 0 to 1"):
        target.open(Data(source="tiny"))


def test_other_data_than_it_was_trained_on_is_a_warning() -> None:
    target = Classifier.tiny()
    target.trained_on = {"digest": "0"}
    target.open(Data(source="tiny"))
    target.open(Data(source="tiny", rows="class=a"))
    assert len(target.warnings) == 1 and "not the data that this model was trained on" in target.warnings[0]
    target = Classifier.tiny()
    target.trained_on = {"digest": opened().digest}
    target.open(Data(source="tiny"))
    assert not target.warnings


def test_no_data_at_all() -> None:
    with pytest.raises(UsageError, match="--data"):
        Classifier.tiny().open(Data())
    with pytest.raises(UsageError, match="no pictures could be read from 'nowhere/x'"):
        opened(source="nowhere/x")
