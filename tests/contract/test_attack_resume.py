"""An attack that is stopped in the middle goes on where it was, with the verdicts of one that was not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unlearners import run
from unlearners.attacks.random_tokens import RandomTokens
from unlearners.base import Row
from unlearners.judges.clip_zero_shot import ClipZeroShot
from unlearners.tasks import from_concept


def test_a_stopped_attack_ends_with_the_same_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipZeroShot, "shows", lambda self, images, task: (images.mean((1, 2, 3)) > 0.52).tolist())
    task, attack = from_concept("zq", "style", preserve=("ab",)), RandomTokens(k=2, tries=2, batch=2)
    whole, broken = (run.erase("original", "tiny", task, out=tmp_path / n) for n in ("whole", "broken"))
    wanted = json.loads(run.attack(attack, whole, prompts=6, steps=2).read_text())

    real, calls = RandomTokens.run, []

    def stops(self: Any, *args: Any) -> Iterator[Row]:
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from real(self, *args)

    monkeypatch.setattr(RandomTokens, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        run.attack(attack, broken, prompts=6, steps=2)
    draft = broken / "attacks" / "random_tokens.part"
    assert draft.is_file() and not draft.with_suffix(".json").exists()
    before = len(calls)
    found = json.loads(run.attack(attack, broken, prompts=6, steps=2).read_text())
    drop = {"picture"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in found["verdicts"]] == [
        {k: v for k, v in row.items() if k not in drop} for row in wanted["verdicts"]
    ]
    assert any(v["queries"] for v in found["verdicts"]) and not draft.exists()
    total = -(-sum(v["queries"] > 0 for v in wanted["verdicts"]) // attack.batch)
    assert len(calls) - before == total - 1, "the batch that was done is not attacked again"
