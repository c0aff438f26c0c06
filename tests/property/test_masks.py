"""SalUn's mask as an option of other methods, the settings of each family, and float16, in which nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unlearners import config, registry, saliency
from unlearners.base import Data, Task, settle
from unlearners.errors import RefusedError, UsageError
from unlearners.methods.retrain import Retrain
from unlearners.methods.salun import SalUn
from unlearners.saliency import Freeze
from unlearners.targets.classifier import Classifier
from unlearners.targets.clip import CLIP
from unlearners.targets.ddpm import DDPM
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.tasks import from_concept
from unlearners.testing import task_for
from unlearners.verbs.base import cut

TASK = Task(
    name="t",
    kind="samples",
    concepts=("t",),
    forget=Data(source="tiny", rows="random=22"),
    retain=Data(source="tiny", rows="not random=22"),
)
QUICK: dict[str, Any] = {"epochs": 1, "batch": 20, "lr": 0.01}
MASKED = ("ft", "ga", "gaft", "iu", "l1_sparse", "neggrad_plus")
TRAINED = ("ft", "ga", "gaft", "l1_sparse", "neggrad_plus", "rl", "salun", "salun_soft", "ssd")


def make(name: str, **how: Any) -> Any:
    quick = {"samples": 8, "alpha": 50.0} if name == "iu" else QUICK
    return registry.make("methods", name, **{**quick, **how})


def bits(w: Tensor) -> Tensor:
    return w.detach().clone().view(torch.int32)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The masks that methods froze by."""
    seen: list[dict[str, Tensor]] = []
    init = Freeze.__init__

    def note(self: Freeze, weights: Any, mask: Any) -> None:
        seen.append(dict(mask))
        init(self, weights, mask)

    monkeypatch.setattr(Freeze, "__init__", note)
    return seen


# --- the mask -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [{}, {"optimizer": "adamw", "weight_decay": 0.1}, {"clip": 0.1, "mask": "random", "density": 0.123}])
@pytest.mark.parametrize("name", MASKED)
def test_off_the_mask_every_bit_stays(name: str, how: dict[str, Any], masks: list[dict[str, Tensor]]) -> None:
    if name == "iu":
        how = {k: v for k, v in how.items() if k in ("mask", "density")}
    target, method = Classifier.tiny(), make(name, **{"mask": "saliency", **how})
    with torch.no_grad():
        for p in target.named().values():
            p[(0,) * p.dim()] = -0.0
    start = {n: bits(p) for n, p in target.named().items()}
    rows: list[dict[str, float]] = []
    method(target, TASK, seed=4, log=rows.append)
    (mask,) = masks
    size = sum(m.numel() for m in mask.values())
    assert sum(int(m.sum()) for m in mask.values()) == saliency.count(method.density, size)
    assert all(bits(p)[~mask[n]].equal(start[n][~mask[n]]) for n, p in target.named().items())
    assert sum(int((bits(p) != start[n])[mask[n]].sum()) for n, p in target.named().items()) > 0.3 * method.density * size
    assert rows[0]["mask_seconds"] > 0
    assert not any("mask_seconds" in row for row in rows[1:])


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("control", ["saliency", "random", "inverted"])
def test_the_mask_is_salun_s(name: str, control: Any, masks: list[dict[str, Tensor]]) -> None:
    make(name, mask=control, density=0.3)(Classifier.tiny(), TASK, seed=4)
    SalUn(**QUICK, mask=control, density=0.3)(Classifier.tiny(), TASK, seed=4)
    mine, salun = masks
    assert all(mine[n].equal(salun[n]) for n in salun)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_everything_is_no_mask(name: str) -> None:
    """And the same batches are drawn: the mask's random numbers are of a stream of its own."""
    plain, whole = Classifier.tiny(), Classifier.tiny()
    logs: list[list[dict[str, float]]] = [[], []]
    make(name)(plain, TASK, seed=4, log=logs[0].append)
    make(name, mask="all")(whole, TASK, seed=4, log=logs[1].append)
    assert all(a.equal(b) for a, b in zip(plain.named().values(), whole.named().values(), strict=True))
    assert logs[0] == [{k: v for k, v in row.items() if k != "mask_seconds"} for row in logs[1]]


def test_iu_is_its_step_times_the_mask(masks: list[dict[str, Tensor]]) -> None:
    start = {n: p.detach().clone() for n, p in Classifier.tiny().named().items()}
    plain, masked = Classifier.tiny(), Classifier.tiny()
    make("iu")(plain, TASK, seed=4)
    make("iu", mask="saliency", density=0.2)(masked, TASK, seed=4)
    for n, p in masked.named().items():
        assert p.equal(torch.where(masks[-1][n], plain.named()[n], start[n]))


@pytest.mark.parametrize("name", MASKED)
def test_without_a_mask_the_run_has_the_name_it_had(name: str) -> None:
    plain = config.to_dict(registry.make("methods", name))
    assert not {"mask", "density", "statistic", "scope", "mask_augment", "saliency_file"} & set(plain)
    assert {"mask", "density", "statistic", "scope", "mask_augment", "saliency_file"} <= set(config.to_dict(SalUn()))


@pytest.mark.parametrize("name", ["ft", "iu"])
def test_a_file_serves_another_method_and_not_another_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "saliency.safetensors"
    plain, reused, other = Classifier.tiny(), Classifier.tiny(), Classifier.tiny(seed=8)
    SalUn(**QUICK, saliency_file=str(file))(Classifier.tiny(), TASK, seed=4)
    make(name, mask="saliency", density=0.3)(plain, TASK, seed=4)
    written, start = file.read_bytes(), {n: bits(p) for n, p in other.named().items()}
    monkeypatch.setattr(saliency, "measure", None)  # is not called again
    method = make(name, mask="saliency", density=0.3, saliency_file=str(file))
    method(reused, TASK, seed=4)
    assert all(a.equal(b) for a, b in zip(plain.named().values(), reused.named().values(), strict=True))
    with pytest.raises(RefusedError, match="another model"):
        method(other, TASK, seed=4)
    assert all(bits(p).equal(start[n]) for n, p in other.named().items())
    assert file.read_bytes() == written


def test_a_mask_that_cannot_be_is_refused() -> None:
    for how in ({"mask": "saliency", "density": 0.0}, {"mask": "random", "density": 1.5}, {"saliency_file": "s"}):
        for name in MASKED:
            with pytest.raises(UsageError):
                make(name, **how)


def test_fine_tuning_opens_the_forget_set_for_a_saliency_alone() -> None:
    alone = replace(TASK, forget=Data())
    for how in ({}, {"mask": "random"}):
        make("ft", **how)(Classifier.tiny(), alone, seed=4)
    with pytest.raises(UsageError, match="data"):
        make("ft", mask="saliency")(Classifier.tiny(), alone, seed=4)


# --- settings of each family --------------------------------------------------------------------------------------
SGD = {"optimizer": "sgd", "weight_decay": 5e-4, "clip": 0.0, "steps": 0, "batch": 256}
WRONG = {"labels": "other", "alpha": 1.0, "forget_batch": 0, "epochs": 10}
ADAM: dict[str, Any] = {"optimizer": "adam", "weight_decay": 0.0}
AS_BEFORE: dict[str, dict[str, Any]] = {
    "ft": {**SGD, "epochs": 10, "lr": 0.01},
    "ga": {**SGD, "epochs": 5, "lr": 1e-4},
    "l1_sparse": {**SGD, "epochs": 10, "lr": 0.01, "alpha": 1e-4},
    "neggrad_plus": {**SGD, "epochs": 10, "lr": 0.01},
    "rl": {**SGD, **WRONG, "lr": 0.01},
    "salun": {**SGD, **WRONG, "lr": 0.013},
    "salun_soft": {**SGD, **WRONG, "lr": 0.013},
    "ssd": {"batch": 64},
}
DIFFUSION = {**ADAM, "steps": 1000, "batch": 128, "lr": 1e-4, "clip": 1.0}
SD = {**ADAM, "batch": 8, "lr": 1e-5, "clip": 0.0}


def found(name: str, target: Any, task: Task = TASK, **how: Any) -> dict[str, Any]:
    return vars(settle(registry.make("methods", name, **how), target, task))


@pytest.mark.parametrize("name", AS_BEFORE)
def test_on_a_classifier_the_settings_are_those_they_were(name: str) -> None:
    got = found(name, Classifier.tiny())
    assert {k: got[k] for k in AS_BEFORE[name]} == AS_BEFORE[name]


@pytest.mark.parametrize("name", TRAINED)
def test_no_method_starts_with_the_settings_of_another_family(name: str) -> None:
    """By the presets of before: what they were on each family, an optimizer and its rate never apart."""
    kind = registry.get("methods", name)
    wanted: list[tuple[Any, Task, dict[str, Any]]] = [(DDPM.tiny(), TASK, DIFFUSION)]
    if issubclass(StableDiffusion, kind.needs):
        style, nude = from_concept("zq", "style"), from_concept("nudity", "nsfw")
        wanted = [*wanted, (StableDiffusion.tiny(), style, SD), (StableDiffusion.tiny(), nude, SD)]
        wanted.append((CLIP.tiny(), style, {"optimizer": "adamw", "weight_decay": 0.1, "batch": 32, "lr": 1e-6, "clip": 0.0}))
    for target, task, family in wanted:
        if name == "ssd":
            family = {"batch": 8 if target.recipe == "sd" else 64}
        got = found(name, target, task)
        assert {k: got[k] for k in family} == family, type(target).__name__


@pytest.mark.parametrize(("name", "kind", "steps", "alpha"), [
    ("salun", "style", 600, 0.5), ("salun", "nsfw", 100, 0.1), ("ga", "nsfw", 100, None), ("ga", "style", 0, None),
])  # fmt: skip
def test_on_stable_diffusion_the_recipe_is_the_published_one(name: str, kind: Any, steps: int, alpha: float | None) -> None:
    got = found(name, StableDiffusion.tiny(), from_concept("zq", kind))
    assert got["steps"] == steps
    assert got.get("alpha") == alpha


@pytest.mark.parametrize("name", ["rl", "salun", "salun_soft"])
def test_on_diffusion_wrong_labels_are_the_release_s(name: str) -> None:
    got = found(name, DDPM.tiny())
    assert (got["labels"], got["alpha"], got["forget_batch"]) == ("next", 3.072, 128)


@pytest.mark.parametrize("name", [n for n in TRAINED if n != "ssd"])
def test_epochs_that_were_asked_for_are_not_replaced_by_the_family_s_steps(name: str) -> None:
    assert found(name, DDPM.tiny(), epochs=3)["steps"] == 0
    assert found(name, DDPM.tiny(), epochs=3, steps=7)["steps"] == 7
    assert found(name, DDPM.tiny(), lr=0.5)["steps"] == 1000


@pytest.mark.parametrize("name", TRAINED)
def test_presets_of_a_family_say_what_auto_takes_there(name: str) -> None:
    kind, target = registry.get("methods", name), Classifier.tiny()
    assert settle(registry.make("methods", name, preset="classifier"), target, TASK) == settle(kind(), target, TASK)
    assert "auto" in {getattr(kind(), f.name) for f in fields(kind)}


def test_a_family_without_settings_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "recipe", "")
    monkeypatch.setattr(Classifier, "training", {})
    with pytest.raises(UsageError, match="set 'epochs' yourself"):
        registry.make("methods", "ft")(Classifier.tiny(), TASK)


# --- float16 ------------------------------------------------------------------------------------------------------
def half() -> Any:
    target = StableDiffusion.tiny()
    target.pipe.to(torch.float16)
    target.dtype = torch.float16
    return target


def amp(make: Callable[[], Any]) -> Any:
    target = make()
    target.amp = torch.float16
    return target


@pytest.mark.parametrize("name", ["esd", "advunlearn", "concept_ablation", "fmn", "salun", "ga", "ft", "gaft", "ssd", "spm", "leco"])
def test_training_in_float16_is_refused_before_anything_is_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StableDiffusion, "eps", None)
    monkeypatch.setattr(StableDiffusion, "sample", None)
    target = half()
    with pytest.raises(UsageError, match="--dtype bfloat16"):
        registry.make("methods", name)(target, from_concept("zq", "style", preserve=("ab",), anchors=("cd",)))
    assert {p.dtype for p in target.named().values()} == {torch.float16}


@pytest.mark.parametrize("name", ["uce", "rece", "speed"])
def test_a_closed_form_runs_in_float16(name: str) -> None:
    target = half()
    start = {n: p.detach().clone() for n, p in target.named().items()}
    task = from_concept("zq", "style", preserve=("ab",), anchors=("cd",))
    registry.make("methods", name)(target, task)
    assert any(not p.equal(start[n]) for n, p in target.named().items())


@pytest.mark.parametrize("name", ["ft", "iu", "ssd", "rl", "scrub", "boundary_shrink", "retrain"])
def test_autocast_to_float16_is_refused_too(name: str) -> None:
    with pytest.raises(UsageError, match="--dtype bfloat16"):
        registry.make("methods", name)(amp(Classifier.tiny), TASK)


@pytest.mark.parametrize("name", ["ft", "gaft", "slug"])
def test_and_on_a_dual_encoder(name: str) -> None:
    data = {"forget": Data(source="tiny", rows="class=b"), "retain": Data(source="tiny", rows="not class=b")}
    held = Data(source="tiny", split="test")
    task = Task(name="tiny", kind="identity", concepts=("b",), preserve=("a", "c", "d"), holdout=held, **data)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--dtype bfloat16"):
        registry.make("methods", name)(amp(CLIP.tiny), task)


# --- dry runs -----------------------------------------------------------------------------------------------------
def test_a_dry_run_leaves_the_saliency_file_alone(tmp_path: Path) -> None:
    method = SalUn(saliency_file=str(tmp_path / "s"))
    assert cut(method).saliency_file == ""
    assert cut(make("ft", mask="saliency", saliency_file=str(tmp_path / "s"))).saliency_file == ""


def test_retraining_starts_with_the_recipe_of_its_family() -> None:
    net, ddpm = Classifier.tiny(), DDPM.tiny()
    of_net, of_ddpm = settle(Retrain(), net, task_for(net)), settle(Retrain(), ddpm, task_for(ddpm))
    assert of_net == Retrain(**Retrain.presets["classifier"]) and (of_net.lr, of_net.optimizer, of_net.epochs) == (0.1, "sgd", 182)
    assert of_ddpm == Retrain(**Retrain.presets["ddpm"]) and (of_ddpm.lr, of_ddpm.optimizer, of_ddpm.steps) == (2e-4, "adam", 800_000)
    assert settle(Retrain(epochs=3), ddpm, task_for(ddpm)).steps == 0, "epochs that somebody asked for count"
