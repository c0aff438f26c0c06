"""Pictures as latents: made once, never of another base, and with the prompts that SalUn's and GA's equations need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearners import latents
from unlearners.base import Data, Task
from unlearners.data import open_data
from unlearners.errors import RefusedError, UsageError
from unlearners.latents import Asked
from unlearners.methods.ga import GA
from unlearners.methods.salun import SalUn

PICTURES = Task(
    name="t",
    kind="class",
    concepts=("b", "c"),
    forget=Data(source="tiny", rows="class=b,c"),
    retain=Data(source="tiny", rows="not class=b,c"),
)
TEXT = Task(name="t", kind="style", concepts=("zq",), anchors=("ab",), preserve=("cd", "ef"))
QUICK: dict[str, Any] = {"steps": 2, "batch": 4, "lr": 1e-3, "optimizer": "adam", "weight_decay": 0.0, "pictures": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNLEARNERS_CACHE", str(tmp_path))
    return tmp_path / "latents"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were made anew, in order."""
    kept, found = latents.kept, []

    def watch(about: Any, make: Callable[[], Tensor]) -> Tensor:
        def note() -> Tensor:
            found.append(str(about))
            return make()

        return kept(about, note)

    monkeypatch.setattr(latents, "kept", watch)
    return found


# --- the file -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("xl", [False, True])
def test_drawn_latents_decode_to_the_pictures_that_sample_gives(sd: Callable[..., Any], xl: bool) -> None:
    target = sd(xl=xl)
    found = latents.drawn(target, ["zq", "a b"], 3)
    assert found.prompts == ("zq", "a b", "zq")
    pictures = target.sample(list(found.prompts), [latents.SEED + i for i in range(3)])
    with torch.no_grad():
        decoded = target.vae.decode(found.latent / target.vae.config.scaling_factor).sample / 2 + 0.5
    assert torch.allclose(decoded.clamp(0, 1), pictures, atol=1e-4)
    assert pictures.std() > 0


def test_pictures_are_encoded_with_their_class_as_prompt(sd: Callable[..., Any]) -> None:
    target = sd()
    found = target.open(PICTURES.forget)
    examples = open_data(PICTURES.forget, 16)
    wanted = target.latents(next(examples.batches(99))["x"])
    assert torch.allclose(found.latent, wanted, atol=1e-5)
    assert found.prompts == tuple(f"an image of a {examples.classes[y]}" for y in examples.labels)
    assert found.indices.equal(examples.indices)


def test_a_second_run_finds_them_and_maps_the_file(sd: Callable[..., Any], cache: Path, made: list[str]) -> None:
    first = latents.drawn(sd(), ["zq"], 3)
    state = torch.get_rng_state()
    again = latents.drawn(sd(), ["zq"], 3)
    assert torch.equal(first.latent, again.latent)
    assert first.digest == again.digest
    assert torch.equal(state, torch.get_rng_state())
    assert len(made) == 1
    (path,) = cache.iterdir()
    assert str(path) in Path("/proc/self/maps").read_text()


def test_drawing_leaves_the_global_random_state(sd: Callable[..., Any]) -> None:
    state = torch.get_rng_state()
    latents.drawn(sd(), ["zq"], 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("change", ["prompt", "number", "weights", "scheduler", "seeds"])
def test_whatever_the_pictures_depend_on_makes_new_ones(sd: Callable[..., Any], made: list[str], change: str) -> None:
    target = sd()
    first = latents.drawn(target, ["zq"], 2)
    if change == "weights":
        with torch.no_grad():
            next(iter(target.named().values())).add_(0.1)
    if change == "scheduler":
        target.scheduler = type(target.scheduler).from_config(target.scheduler.config, steps_offset=0)
    more: dict[str, Any] = {"first": 5} if change == "seeds" else {}
    second = latents.drawn(target, ["zx" if change == "prompt" else "zq"], 3 if change == "number" else 2, **more)
    assert len(made) == 2
    assert first.digest != second.digest


def test_another_vae_encodes_anew(sd: Callable[..., Any], made: list[str]) -> None:
    first, second = (sd(seed=s).open(PICTURES.forget) for s in (0, 1))
    assert len(made) == 2
    assert not torch.equal(first.latent, second.latent)


@pytest.mark.parametrize("harm", ["cut", "flip", "other", "text"])
def test_a_file_that_is_damaged_or_of_something_else_is_made_again(sd: Callable[..., Any], cache: Path, made: list[str], harm: str) -> None:
    target = sd()
    wanted = latents.drawn(target, ["zq"], 2).latent.clone()
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    if harm == "other":
        latents.drawn(target, ["another"], 2)
        (other,) = set(cache.iterdir()) - {path}
        whole = other.read_bytes()
    new = {"cut": whole[:-7], "flip": whole[:-1] + bytes([whole[-1] ^ 1]), "other": whole, "text": b"nothing"}[harm]
    path.unlink()  # the old bytes stay mapped
    path.write_bytes(new)
    before = len(made)
    assert torch.equal(latents.drawn(target, ["zq"], 2).latent, wanted)
    assert len(made) == before + 1
    assert torch.equal(latents.drawn(target, ["zq"], 2).latent, wanted)
    assert len(made) == before + 1


def test_batches_and_loader_cover_everything_once(sd: Callable[..., Any]) -> None:
    found = latents.drawn(sd(), ["zq", "ab"], 5)
    parts = list(found.batches(2))
    assert [len(p["latent"]) for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p["latent"] for p in parts]), found.latent)
    loader = found.loader(2)
    assert len(loader) == 3
    epoch = [loader.draw() for _ in range(3)]
    assert sorted(torch.cat([p["rows"] for p in epoch]).tolist()) == list(range(5))
    assert all(found.prompts[i] == said for p in epoch for i, said in zip(p["rows"].tolist(), p["prompt"], strict=True))


# --- what a task means --------------------------------------------------------------------------------------------
def test_a_class_gives_way_to_those_that_stay_from_the_next_on(sd: Callable[..., Any]) -> None:
    found = sd().forgotten(PICTURES, Asked())
    stay = ("an image of a d", "an image of a a")
    assert found.others == {"an image of a b": stay, "an image of a c": stay}
    anchored = Task(**{**PICTURES.__dict__, "anchors": ("zz",)})
    assert set(sd().forgotten(anchored, Asked()).others.values()) == {("an image of a zz",)}


def test_a_text_task_draws_both_sides(sd: Callable[..., Any]) -> None:
    f, r = sd().forgotten(TEXT, Asked(pictures=3)), sd().retained(TEXT, Asked(pictures=3))
    assert set(f.prompts) == {"an image in zq style"}
    assert f.others == {"an image in zq style": ("an image in ab style",)}
    assert r.prompts == ("an image in cd style", "an image in ef style", "an image in ab style")
    assert len(f) == len(r) == 3


def test_named_prompts_go_by_themselves(sd: Callable[..., Any]) -> None:
    asked = Asked(pictures=2, forget=("nude",), retain=("dressed",))
    f, r = sd().forgotten(TEXT, asked), sd().retained(TEXT, asked)
    assert (f.prompts, f.others, r.prompts) == (("nude",) * 2, {"nude": ("dressed",)}, ("dressed",) * 2)


@pytest.mark.parametrize(
    ("said", "other"),
    [("a ZQ sky", "a ab sky"), ("zqx", "ab"), ("hot zq pie", "xy pie"), ("storm", "ab"), ("empty", "")],
)
def test_the_anchor_takes_the_concepts_place(said: str, other: str) -> None:
    task = Task(name="t", concepts=("zq", "hot zq", "empty"), anchors=("ab", "xy", ""))
    assert latents.instead(task, said) == other


def test_nothing_that_stays_is_the_empty_prompt() -> None:
    assert latents.staying(Task(name="t", concepts=("zq",)), Asked()) == ("",)


# --- loss and relabel ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_toward_teaches_the_models_own_prediction_under_the_other_prompt(sd: Callable[..., Any], prediction: str) -> None:
    target = sd(prediction=prediction)
    w = target.trainable("full")
    x_0 = torch.randn(3, 4, 8, 8)
    batch = {"latent": x_0, "prompt": ["zq", "ab", "zq"], "toward": ["q", "r", "s"]}
    torch.manual_seed(5)
    noise, t = torch.randn_like(x_0), torch.randint(1000, (3,))
    a = target.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    said, other = (target.encode(batch[k]) for k in ("prompt", "toward"))
    student, goal = target.eps(x_t, t, said), target.eps(x_t, t, other)
    wanted = F.mse_loss(student, goal.detach())
    torch.manual_seed(5)
    got = target.loss(batch)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert got.item() > 0
    mine, theirs = (torch.autograd.grad(v, list(w.values()), allow_unused=True, materialize_grads=True) for v in (got, wanted))
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-7) for x, y in zip(mine, theirs, strict=True))
    plain = {"latent": x_0, "prompt": batch["prompt"]}
    torch.manual_seed(5)
    assert target.loss(plain).item() == pytest.approx(F.mse_loss(student, target.goal(x_0, noise, t)).item(), rel=1e-4)


def test_relabel_goes_by_the_policy(sd: Callable[..., Any]) -> None:
    target = sd()
    batch = {"prompt": ["p"] * 60, "others": [("q", "r")] * 60}
    assert set(target.relabel(batch, "next")["toward"]) == {"q"}
    assert set(target.relabel(batch, "other")["toward"]) == {"q", "r"}
    assert set(target.relabel(batch, "any")["toward"]) == {"p", "q", "r"}
    assert target.relabel({"prompt": ["p", "q", "p"]}, "next")["toward"] == ["q", "p", "q"]
    assert target.relabel({"prompt": ["p", "p"]})["toward"] == ["", ""]


# --- the methods --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", [PICTURES, TEXT], ids=["pictures", "text"])
def test_salun_moves_its_mask_alone(sd: Callable[..., Any], task: Task) -> None:
    target, fresh = sd(), sd().named()
    SalUn(density=0.25, **QUICK)(target, task, seed=1)
    moved = sum(int((p != fresh[n]).sum()) for n, p in target.named().items())
    size = sum(p.numel() for p in target.select("full").values())
    assert 0.1 * size < moved <= 0.25 * size


def test_a_saliency_file_is_of_its_pictures(sd: Callable[..., Any], tmp_path: Path) -> None:
    file = str(tmp_path / "s.safetensors")
    first, second = sd(), sd()
    rows: list[dict[str, float]] = []
    SalUn(saliency_file=file, **QUICK)(first, TEXT, seed=1)
    SalUn(saliency_file=file, **QUICK)(second, TEXT, seed=1, log=rows.append)
    assert rows[0]["cached_seconds"] > 0
    assert all(torch.equal(p, second.named()[n]) for n, p in first.named().items())
    with pytest.raises(RefusedError, match="another data"):
        SalUn(saliency_file=file, **QUICK)(sd(), Task(name="t", concepts=("other",)), seed=1)


def test_training_leaves_the_forgotten_pictures_behind(sd: Callable[..., Any]) -> None:
    rows: list[dict[str, float]] = []
    fields: dict[str, Any] = {**QUICK, "steps": 30, "batch": 32, "lr": 5e-3}
    GA(**fields)(sd(), PICTURES, seed=1, log=rows.append)
    assert sum(r["forget"] for r in rows[-5:]) > sum(r["forget"] for r in rows[:5])


def test_ga_draws_only_what_is_to_be_forgotten(sd: Callable[..., Any], made: list[str]) -> None:
    GA(prompts=("nude",), **QUICK)(sd(), TEXT, seed=1)
    assert len(made) == 1
    assert "'nude'" in made[0]


@pytest.mark.parametrize("method", [SalUn, GA])
def test_no_pictures_are_refused(method: Any) -> None:
    with pytest.raises(UsageError, match="pictures"):
        method(pictures=0)
