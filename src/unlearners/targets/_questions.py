"""Questions about pictures, from the canvas or from files, and what a model replied."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..base import Data
from ..diffusion import batches
from ..errors import UsageError
from ..zoo.canvas.questions import quiz
from ..zoo.canvas.world import render
from .base import Chat


class Reply(NamedTuple):
    """A question of some ``kind``, the answers that are right, and what a model said."""

    kind: str
    question: str
    answers: list[str]
    said: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """``picture()`` is (3, H, W) in [0, 1]; questions of one ``kind`` ask for the same thing, such as a name."""

    picture: Callable[[], Tensor]
    kind: str
    text: str
    answers: tuple[str, ...]


def put(model: Chat, questions: list[Question], batch: int = 32) -> list[Reply]:
    """What ``model`` replies to each question; pictures of one size are seen together."""
    said: dict[int, str] = {}
    for part in batches(len(questions), batch):
        seen = {i: questions[i].picture() for i in range(part.start, part.stop)}
        for shape in dict.fromkeys(x.shape for x in seen.values()):
            rows = [i for i, x in seen.items() if x.shape == shape]
            found = model.answer(torch.stack([seen[i] for i in rows]), [questions[i].text for i in rows], batch=batch)
            said |= dict(zip(rows, found, strict=True))
    return [Reply(q.kind, q.text, list(q.answers), said[i]) for i, q in enumerate(questions)]


def read(data: Data) -> list[Question]:
    """The questions ``data`` names: "canvas", a JSONL file, or a folder that holds one.

    A line is {"image": path, "question": text, "answer" or "answers": text or texts, "kind": text}; paths start at the file's folder, and
    questions without a kind are of the kind of those in the same words. Raises ``UsageError`` for what is missing.
    """
    if data.rows:
        raise UsageError(f"the questions of {data.source} are asked all; leave out the rows '{data.rows}'")
    if data.source == "canvas":
        return [Question(picture=partial(_render, seed, item), kind=q.kind, text=q.text, answers=(q.answer,)) for seed, item, q in quiz()]
    file = question_file(data.source)
    lines = [(n, line) for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{file} holds no questions; write one JSON object a line, with image, question and answer")
    return [_question(file, n, line) for n, line in lines]


def question_file(source: str) -> Path:
    """The JSONL file behind ``source``, a file or a folder that holds one."""
    path = Path(source)
    found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    if len(found) != 1:
        held = f"{len(found)} JSONL files" if path.is_dir() else "no questions"
        raise UsageError(f"there are {held} at '{source}'; give canvas, one JSONL file, or a folder with one")
    return found[0]


def _question(file: Path, number: int, line: str) -> Question:
    try:
        row: Any = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not {"image", "question"} <= row.keys() or not {"answer", "answers"} & row.keys():
        raise UsageError(f"line {number} of {file} is no question; write a JSON object with image, question and answer")
    given = row["answers"] if "answers" in row else row["answer"]
    picture = file.parent / str(row["image"])
    if not picture.is_file():
        raise UsageError(f"the picture of line {number} of {file} is not at {picture}; write its path as seen from that file's folder")
    answers = tuple(str(a) for a in (given if isinstance(given, list) else [given]))
    return Question(
        picture=partial(_opened, picture), kind=str(row.get("kind", row["question"])), text=str(row["question"]), answers=answers
    )


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _render(seed: int, item: Any) -> Tensor:
    return _pixels(render(seed, item))


def _opened(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            return _pixels(image.convert("RGB"))
    except OSError as error:
        raise UsageError(f"{path} is no picture that can be read; replace it or take its questions out") from error
