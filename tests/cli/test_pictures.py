"""The command line on classifiers and pictures: a user's own model, folder and list, in one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from unlearners import nets
from unlearners.cli import main
from unlearners.targets.classifier import Classifier

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli("erase", …)`` in a folder with a user's photos (three classes, 40 + 10 of each) and a checkpoint of their own."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 40), ("test", 10)):
        for k, name in enumerate(("cat", "cow", "dog")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                colour = [30 + 3 * i, 90, 60]
                colour[k] = 220
                Image.new("RGB", (40, 34), tuple(colour)).save(tmp_path / "photos" / split / name / f"{name}-{i}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(nets.build("resnet20_cifar", 3).state_dict(), tmp_path / "model.pth")
    (tmp_path / "list.txt").write_text("".join(f"dog-{i}.png\n" for i in range(12)) + "".join(f"train/cat/cat-{i}.png\n" for i in range(3)))

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*words, "--device", "cpu"])
        return (code, *capsys.readouterr())

    return call


def test_one_command_forgets_listed_pictures_of_ones_own_classifier(cli: Cli) -> None:
    words = ("erase", "salun", "model.pth@resnet20_cifar", "--data", "photos", "--forget", "list.txt", "--epochs", "1", "--evaluate")
    code, out, err = cli(*words)
    assert code == 0, err
    assert "erased 15 listed pictures with salun" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("ua", "ra", "ta", "mia"))}
    assert {name: row[-1] for name, row in rows.items()} == {"ua": "15", "ra": "105", "ta": "30", "mia": "15"}
    code, out, _ = cli(*words, "--json")
    record = json.loads(out)
    assert code == 0 and record["data"]["forget"] == 15 and record["data"]["retain"] == 105
    listed = (Path(record["folder"]) / "forget.txt").read_text().split()
    assert len(listed) == 15 and listed == sorted(listed, key=int)


def test_what_was_trained_here_can_be_erased_from_and_other_data_warn(cli: Cli) -> None:
    assert cli("train", "resnet20_cifar:width=4", "photos", "--out", "mine", "--preset", "short")[0] == 0
    code, out, err = cli("erase", "ga", "mine", "--data", "photos", "--forget", "class=cow", "--epochs", "1", "--evaluate")
    assert code == 0, err
    assert "warning" not in out and "ra" in out
    Image.new("RGB", (40, 34), (1, 2, 3)).save("photos/train/cat/new.png")
    from unlearners.data import _dataset, read

    read.cache_clear()
    _dataset.cache_clear()
    code, out, err = cli("erase", "ga", "mine", "--data", "photos", "--forget", "class=dog", "--epochs", "1")
    assert code == 0, err
    assert "warning:" in out and "their hashes differ" in out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--data photos", "give both"),
        ("--forget class=cow", "give both"),
        ("--data photos --forget class=sheep", "unknown class"),
        ("--data photos --forget random=120", "nothing would be left"),
        ("--data photos --forget random=0.001", "picks no train picture"),
        ("--data photos --forget nothing.txt", "there is no file 'nothing.txt'"),
        ("--data missing --forget class=cow", "no pictures could be read from 'missing'"),
        ("--data photos --forget class=cow objects/fish", "in one way"),
        ("--concept cow", "needs a model of labelled pictures"),
    ],
)
def test_a_wrong_request_says_what_to_do_and_exits_2(cli: Cli, words: str, hint: str) -> None:
    import re

    what = ("retrain", "tiny") if "--concept" in words else ("ft", "tiny-classifier")
    code, out, err = cli("erase", *what, *words.split(), "--runs", "runs")
    assert code == 2 and not out
    said = [line for line in err.splitlines() if line.startswith("unlearn: ")]
    assert len(said) == 1 and re.search(hint, said[0])


def test_a_method_without_the_retained_data_it_needs(cli: Cli) -> None:
    Path("task.yaml").write_text("kind: class\nconcepts: [b]\nforget: {source: tiny, rows: class=b}\n")
    code, _, err = cli("erase", "ft", "tiny-classifier", "task.yaml")
    assert code == 2 and "the task names no data for this; give the training data" in err


def test_a_dry_run_of_every_family(cli: Cli) -> None:
    for words in (
        "salun tiny-classifier objects/fish",
        "salun tiny-ddpm objects/draw-fish --preset ddpm",
        "esd tiny-ddpm objects/draw-fish",
    ):
        code, out, err = cli("erase", *words.split(), "--dry-run")
        assert code == 0, err
        assert "tried two steps on the tiny model" in out
    assert not Path("runs").exists()


def test_a_model_saved_here_is_found_by_its_folder(cli: Cli) -> None:
    Classifier.tiny().save(Path("saved"))
    code, out, err = cli("erase", "ga", "saved", "--data", "tiny", "--forget", "class=b", "--epochs", "1", "--dry-run")
    assert code == 0, err
    assert "to erase b from saved" in out
