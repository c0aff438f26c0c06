"""Settings that are "auto": resolved by kind of concept and family, shown by --dry-run, kept in the record."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typing_extensions import Self

from unlearners import run, tasks
from unlearners.base import Auto, Kind, Method, Row, Target, Task, settle
from unlearners.cli import main
from unlearners.errors import UsageError
from unlearners.methods.esd import ESD
from unlearners.targets.ddpm import DDPM
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.testing import task_for

SD, XL = StableDiffusion.tiny(), StableDiffusion.tiny(xl=True)


def of_kind(kind: Kind) -> Task:
    return Task(name="t", kind=kind, concepts=("zq",))


@pytest.mark.parametrize(("kind", "params"), [("style", "xattn"), ("identity", "xattn"), ("object", "noxattn"), ("nsfw", "noxattn")])
def test_esd_trains_the_papers_layers_for_the_kind_of_concept(kind: Kind, params: str) -> None:
    for method in (ESD(), ESD(**ESD.presets["paper"]), ESD(**ESD.presets["release"]), ESD(**ESD.presets["fast"])):
        assert settle(method, SD, replace(of_kind(kind), preserve=("ink",))).params == params
    paper = settle(ESD(), SD, of_kind(kind))
    assert (paper.steps, paper.lr, paper.eta, paper.guidance) == (1000, 1e-5, 1.0, 3.0)
    own = settle(ESD(params="selfattn", lr=1e-3, eta=2.0), XL, of_kind(kind))
    assert (own.params, own.lr, own.eta) == ("selfattn", 1e-3, 2.0), "what is given stays"


def test_esd_on_sdxl_has_the_settings_of_the_sdxl_script() -> None:
    style = settle(ESD(), XL, of_kind("style"))
    assert (style.params, style.steps, style.lr, style.eta, style.guidance) == ("xattn", 200, 2e-4, 0.0, 2.0)
    assert settle(ESD(), XL, of_kind("object")).lr == 1e-5
    release = settle(ESD(**ESD.presets["release-sdxl"]), SD, of_kind("object"))
    assert (release.steps, release.lr, release.eta, release.guidance) == (200, 2e-4, 0.0, 2.0)
    ddpm = DDPM.tiny()
    assert settle(ESD(), ddpm, task_for(ddpm)).params == "xattn", "where the class enters"


def test_the_dry_run_says_what_was_chosen_and_the_record_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["erase", "esd", "tiny", "--concept", "cup", "--kind", "object", "--runs", str(tmp_path)]
    assert main([*words, "--dry-run"]) == 0
    assert "  params: noxattn\n" in capsys.readouterr().out
    assert main([*words, "--dry-run", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    assert chosen == {"params": "noxattn", "steps": 1000, "lr": 1e-5, "eta": 1.0, "guidance": 3.0}
    assert not list(tmp_path.iterdir())
    folder = run.erase(ESD(steps=1, sampler_steps=2), "tiny", tasks.from_concept("cup", "object"), runs=tmp_path)
    record = json.loads((folder / "run.json").read_text())
    assert record["chosen"] == {"params": "noxattn", "lr": 1e-5, "eta": 1.0, "guidance": 3.0}
    assert record["run"]["method"]["params"] == "auto"
    changed = set(record["weights"]["changed"])
    assert changed and not [n for n in changed if ".attn2." in n] and not record["weights"]["outside"]


def test_the_dry_run_for_sdxl_is_of_sdxl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "xl"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert main(["erase", "esd", str(folder), "--concept", "neon", "--kind", "style", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["lr"] == 2e-4


@dataclass(frozen=True, kw_only=True)
class Undecided(Method):
    """Has no rule for objects."""

    paper: ClassVar[str] = "control"
    needs: ClassVar[type] = StableDiffusion
    params: str = "xattn"
    weight: float | Auto = "auto"

    def resolve(self, target: Target, task: Task) -> Self:
        from dataclasses import replace

        return replace(self, weight=1.0) if task.kind == "style" else self

    def run(self, target: Any, task: Task) -> Any:
        raise AssertionError("nothing may be done")
        yield Row()


def test_an_auto_that_no_rule_covers_is_one_sentence_and_nothing_is_done() -> None:
    with pytest.raises(UsageError, match="no automatic value of 'weight' for a task of kind 'object' on a StableDiffusion; set 'weight'"):
        Undecided()(StableDiffusion.tiny(), of_kind("object"))
    assert settle(Undecided(), SD, of_kind("style")).weight == 1.0
