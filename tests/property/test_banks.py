"""Files of names: who may be taken for whom, how names are compared, and what is wrong with a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from unlearners import banks, config, tasks
from unlearners.base import Data, Task
from unlearners.errors import UsageError
from unlearners.metrics.fa import FA
from unlearners.metrics.similarity import Similarity
from unlearners.metrics.ta import TA
from unlearners.targets.clip import CLIP

TASK = Task(name="t", kind="identity", concepts=("b",), holdout=Data(source="tiny", split="test"))


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    path = tmp_path / "bank.txt"
    path.write_bytes("\ufeffElon Musk\r\n\r\n B \r\nx y\r\nx_y\r\nq\r\n".encode())
    return path


class Seen:
    """What a metric sees of a CLIP."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def logits(self, data: Data) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.target.predict(self.target.open(data))
        return found


def test_names_without_pictures_are_candidates(bank: Path) -> None:
    clip = CLIP.tiny()
    task = banks.banked(TASK, bank)
    plain, more = clip.open(TASK.holdout), clip.open(task.holdout)
    assert more.extra == ("Elon Musk", "x y", "q") and more.classes == plain.classes, "B is the class b, and x_y is x y"
    few, y = clip.predict(plain)
    cosines, same = clip.predict(more)
    assert torch.equal(y, same) and torch.allclose(cosines[:, :4], few, atol=1e-6) and cosines.shape == (32, 7)
    with torch.no_grad():
        alone = clip.texts([clip.forms[0].format("x y")])[0]
        v = torch.cat([clip.images(b["x"]) for b in more.batches(256)])
    assert torch.allclose(cosines[:, 5], v @ alone, atol=1e-5)
    outputs: Any = Seen(clip)
    first, banked = cosines.argmax(1), FA().score(clip, task, outputs)["top1"]
    assert banked.value == pytest.approx(100 * float((first == 1)[y == 1].float().mean())) and banked.n == 8
    kept, before = TA().score(clip, task, outputs), TA().score(clip, TASK, outputs)
    assert isinstance(kept, dict) and isinstance(before, dict)
    assert kept["top1"].value == pytest.approx(100 * float((first == y)[y != 1].float().mean()))
    assert kept["top1"].value <= before["top1"].value, "more names are harder to tell apart"
    tables = [Similarity().score(clip, t, outputs)["forgotten"].table for t in (task, TASK)]
    assert tables[0] == tables[1]


def test_pictures_of_few_people_are_told_from_the_bank(bank: Path, tmp_path: Path) -> None:
    """As SLUG does: pictures of a few people, and the names of thousands. Folders are called as people are, but for "_" and capitals."""
    for i in range(6):
        folder = tmp_path / "own" / ("elon_musk" if i % 2 else "Q")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / f"{i}.png")
    clip = CLIP.tiny()
    task = banks.banked(replace(TASK, concepts=("Elon Musk",), holdout=Data(source=str(tmp_path / "own"))), bank)
    outputs: Any = Seen(clip)
    cosines, _ = outputs.logits(task.holdout)
    assert cosines.shape == (6, 4) and FA().data(clip, task) == [task.holdout]
    scores, right = FA().score(clip, task, outputs), cosines.argmax(1) == clip.open(task.holdout).labels
    musk = clip.open(task.holdout).labels == clip.open(task.holdout).classes.index("elon_musk")
    assert scores["top1"].n == 3 and scores["top1"].value == pytest.approx(100 * float(right[musk].float().mean()))


def test_a_task_keeps_its_bank_and_older_ones_their_hash(bank: Path, tmp_path: Path) -> None:
    assert "names" not in config.to_dict(TASK)["holdout"]
    task = banks.banked(TASK, bank)
    assert config.build(Task, config.to_dict(task)) == task and task.holdout.names == str(bank)
    (tmp_path / "mine.yaml").write_text("concepts: [b]\nholdout: {source: tiny, split: test, names: bank.txt}\nutility: [{source: tiny}]\n")
    found = tasks.load(str(tmp_path / "mine.yaml"))
    assert found.holdout == task.holdout and found.utility == (Data(source="tiny"),)
    bank.write_text("b\nother\n")
    with pytest.raises(UsageError, match="has changed since this task was made"):
        CLIP.tiny().open(task.holdout)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\nc\n", "does not name 'b', which is to be forgotten; add it on a line of its own"),
        (b"\n \n", "names nothing"),
        ("b\u00e9".encode("cp1252"), "no text in UTF-8"),
        (None, "there is no file"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(content: bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "n.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        banks.banked(TASK, file)


def test_names_need_named_test_pictures_and_a_concept_among_them(bank: Path) -> None:
    with pytest.raises(UsageError, match="give them with --test"):
        banks.banked(replace(TASK, holdout=Data()), bank)
    with pytest.raises(UsageError, match="are a classifier's; leave it out"):
        banks.banked(replace(TASK, kind="class"), bank)
    with pytest.raises(UsageError, match="unknown name of tiny 'nobody'"):
        FA().data(CLIP.tiny(), replace(TASK, concepts=("nobody",)))


def test_utility_of_equal_folder_names_keeps_both_values() -> None:
    own = Data(source="tiny", split="test")
    clip, task = CLIP.tiny(), replace(TASK, utility=(own, replace(own, source="somewhere/tiny")))
    outputs: Any = SimpleNamespace(logits=lambda data: clip.predict(clip.open(own)))
    assert set(TA().score(clip, task, outputs)) == {"top1", "top5", "tiny", "somewhere/tiny"}  # type: ignore[arg-type]
