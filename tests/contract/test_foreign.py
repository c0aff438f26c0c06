"""Models that somebody else erased: each form in which they are published becomes an ordinary run, from the command line, by path."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unlearners import imports, ldm, load, patch, tasks
from unlearners.adopt import adopt
from unlearners.cli import main
from unlearners.errors import RefusedError, UsageError
from unlearners.methods.plug import Plug
from unlearners.targets.base import hub_config
from unlearners.targets.clip import CLIP
from unlearners.targets.llava import Llava

Cli = Callable[..., tuple[int, dict[str, Any], str]]
FAST = ("--task", "canvas/neon", "--prompts", "2", "--steps", "2", "--device", "cpu")
FORMS = ("pipeline", "esd.safetensors", "compvis.safetensors", "esd.pt", "te", "te/model.safetensors", "te.bin", "sharded", "ours")


def weights(target: Any) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in patch.live(target.modules).items()}


def erased(make: Callable[..., Any], pattern: str, **how: Any) -> Any:
    """A tiny pipeline whose weights that match ``pattern`` were changed."""
    target = make(**how)
    with torch.no_grad():
        for p in target.select(pattern).values():
            p.add_(0.25)
    return target


@pytest.fixture(scope="module")
def forms(sd: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with an erased model in each of ``FORMS``: in the first four and the last the UNet forgot, else the text encoder."""
    place = tmp_path_factory.mktemp("forms")
    text, unet = erased(sd, "text_encoder"), erased(sd, "xattn")
    text.pipe.save_pretrained(place / "pipeline")
    text.pipe.text_encoder.save_pretrained(place / "te")
    torch.save(text.pipe.text_encoder.state_dict(), place / "te.bin")
    part = {n.removeprefix("unet."): p.detach().clone() for n, p in unet.select("xattn").items()}
    save_file(part, place / "esd.safetensors")
    torch.save(part, place / "esd.pt")
    names = ldm.unet_names(unet.modules["unet"].state_dict())
    save_file({f"model.diffusion_model.{names[n]}": t for n, t in part.items()}, place / "compvis.safetensors")
    (place / "sharded").mkdir()
    states = sorted(text.pipe.text_encoder.state_dict().items())
    for i, rows in enumerate((states[:5], states[5:])):
        save_file({n: t.contiguous() for n, t in rows}, place / "sharded" / f"model-{i + 1:05}-of-00002.safetensors")
    whole = {f"unet.{n}": t for n, t in part.items()}
    patch.save(patch.Patch(tensors=whole, base={"unet": unet.base["sha256"]["unet"]}), place / "ours")
    return place


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli("attack", …)`` with --json in an empty folder: exit code, the printed object, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = main((*words, "--json"))
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


def record(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "run.json").read_text())
    return found


# --- each form is attacked by path --------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_an_erased_model_is_attacked_by_path(form: str, forms: Path, cli: Cli, sd: Callable[..., Any]) -> None:
    path = forms / form
    code, said, err = cli("attack", "random-tokens", str(path), "--base", "tiny", "--tries", "1", *FAST)
    assert code == 0, err
    assert said["prompts"] == 2
    folder = Path(said["folder"])
    assert folder.parent == Path("runs")
    assert said["file"] == str(folder / "attacks" / "random_tokens.json")
    run = record(folder)
    assert run["run"]["target"] == "tiny"
    assert run["run"]["method"] | {"name": "plug", "patch": str(path), "digest": imports.digest(path)} == run["run"]["method"]
    assert run["warnings"] == []
    text = form in ("pipeline", "te", "te/model.safetensors", "te.bin", "sharded")
    wanted, got = weights(erased(sd, "text_encoder" if text else "xattn")), weights(load(str(folder)))
    assert all(torch.equal(t, got[n]) for n, t in wanted.items())
    assert {n.partition(".")[0] for n in run["weights"]["changed"]} == {"text_encoder" if text else "unet"}


def test_the_digest_of_a_file_is_its_sha256(forms: Path, tmp_path: Path) -> None:
    import hashlib

    assert imports.digest(forms / "esd.pt") == hashlib.sha256((forms / "esd.pt").read_bytes()).hexdigest()
    assert imports.digest(forms / "te") == imports.digest(forms / "te" / "model.safetensors")
    assert imports.digest(forms / "pipeline") not in (imports.digest(forms / "te"), imports.digest(forms / "sharded"))


def test_it_is_an_ordinary_run_and_is_made_once(forms: Path, cli: Cli) -> None:
    words = (str(forms / "pipeline"), "--base", "tiny", *FAST)
    code, said, err = cli("attack", "unlearndiffatk", *words, "--timesteps", "1", "--iterations", "1")
    assert code == 0, err
    folder = Path(said["folder"])
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.is_file()}
    assert cli("attack", "unlearndiffatk", *words, "--timesteps", "1", "--iterations", "1")[:2] == (0, said)
    assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*") if p.is_file()} == before

    code, found, err = cli("evaluate", words[0], "--base", "tiny", "--task", "canvas/neon", "--metrics", "ua", "asr", "--seeds", "1",
                           "--steps", "2", "--device", "cpu")  # fmt: skip
    assert code == 0, err
    assert found["folder"] == str(folder)
    assert {"ua", "asr/unlearndiffatk"} <= {r["metric"] for r in found["results"]}
    assert cli("report", str(folder))[0] == 0
    assert "plug" in (folder / "report.html").read_text()
    assert cli("attack", "random-tokens", str(folder), "--tries", "1", "--prompts", "1")[1]["folder"] == str(folder)
    assert [p.name for p in Path("runs").iterdir() if (p / "run.json").exists()] == [folder.name]


def test_it_says_where_the_run_is(forms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(("attack", "random-tokens", str(forms / "te"), "--base", "tiny", "--tries", "1", "--runs", "mine", *FAST)) == 0
    (folder,) = (p for p in Path("mine").iterdir() if (p / "run.json").exists())
    assert capsys.readouterr().out.splitlines()[0] == f"{forms / 'te'} is now a run: {folder}"


def test_a_concept_stands_for_a_task(forms: Path, cli: Cli) -> None:
    words = ("--base", "tiny", "--concept", "neon", "--kind", "style", "--preserve", "fresco", "--dtype", "float16", "--dry-run")
    code, said, err = cli("attack", "random-tokens", str(forms / "te"), *words)
    assert code == 0, err
    assert Path(said["folder"]).parent == Path("runs")
    assert not Path("runs").exists()
    code, same, _ = cli("evaluate", str(forms / "te"), *words)
    assert code == 0
    assert str(Path(same["file"]).parent) == said["folder"]


def test_a_changed_file_is_another_run(forms: Path, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "esd.safetensors"
    shutil.copy(forms / "esd.safetensors", file)
    words = ("attack", "random-tokens", str(file), "--base", "tiny", "--tries", "1", *FAST)
    _, first, _ = cli(*words)
    save_file({k: t + 1 for k, t in patch.read_tensors(file).items()}, file)
    _, second, _ = cli(*words)
    assert first["folder"] != second["folder"]
    with pytest.raises(RefusedError, match="not the file that this run was asked for"):
        method = {k: v for k, v in record(first["folder"])["run"]["method"].items() if k not in ("name", "components")}
        Plug(**method)(load("tiny"), tasks.load("canvas/neon"))


# --- nobody says what it was before -------------------------------------------------------------------------------
def test_a_whole_model_can_do_without_a_base(forms: Path, cli: Cli) -> None:
    path = str(forms / "pipeline")
    code, said, err = cli("attack", "random-tokens", path, "--tries", "1", *FAST)
    assert code == 0, err
    run = record(said["folder"])
    assert run["run"]["target"] == path
    assert "name it with --base" in run["warnings"][0]
    code, error, _ = cli("attack", "unlearndiffatk", path, *FAST)
    assert code == 2
    assert "name that model with --base" in error["error"]
    code, error, _ = cli("attack", "ring-a-bell", path, *FAST)
    assert code == 2
    assert "needs the model before the erasure" in error["error"]


# --- the hub ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["pipeline", "te"])
def test_a_hub_id_is_a_folder_that_is_fetched(form: str, forms: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, place = "0123456789abcdef0123456789abcdef01234567", Path("hub").resolve() / f"models--someone--erased-{form}"
    shutil.copytree(forms / form, place / "snapshots" / commit)  # as after a download
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place.parent))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(place.parent))
    hub_config.cache_clear()
    code, said, err = cli("attack", "random-tokens", f"someone/erased-{form}", "--base", "tiny", "--tries", "1", *FAST)
    assert code == 0, err
    assert record(said["folder"])["run"]["method"]["patch"] == str(place / "snapshots" / commit)


# --- what is refused ----------------------------------------------------------------------------------------------
def left() -> list[Path]:
    return list(Path("runs").glob("*"))


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        ("nowhere --task canvas/neon --base tiny", 2, "also with sld and negative_prompt"),
        ("no/where --task canvas/neon", 2, "a model folder, a file of weights, or a hub id"),
        ("{forms}/te --base tiny", 2, "--task"),
        ("{forms}/te --base tiny --task canvas/neon --concept neon", 2, "in one way"),
        ("{forms}/te --base tiny --task canvas/neon --kind style", 2, "leave them out"),
        ("{forms}/te --base tiny --task canvas/neonn", 2, "did you mean neon"),
        ("{forms}/te --task canvas/neon", 2, "say with --base which model they were made from"),
        ("{forms}/esd.pt --task canvas/neon", 2, "say with --base which model they were made from"),
        ("{forms}/pipeline --task canvas/neon --base {forms}/pipeline", 2, "leave --base out"),
        ("{forms}/esd.safetensors --task canvas/neon --base {forms}/te", 2, "model_index.json"),
    ],
)
def test_a_wrong_request_leaves_nothing_behind(words: str, code: int, hint: str, forms: Path, cli: Cli) -> None:
    for verb in (("attack", "random-tokens"), ("evaluate",)):
        got, error, _ = cli(*verb, *words.format(forms=forms).split())
        assert (got, error["exit_code"]) == (code, code)
        assert hint in error["error"]
        assert "\n" not in error["error"]
        assert not left()


def test_a_run_says_itself_what_was_erased(forms: Path, cli: Cli) -> None:
    _, said, _ = cli("attack", "random-tokens", str(forms / "te"), "--base", "tiny", "--tries", "1", *FAST)
    for flag in (("--task", "canvas/neon"), ("--base", "tiny"), ("--kind", "style"), ("--dtype", "float32")):
        code, error, _ = cli("evaluate", said["folder"], *flag)
        assert code == 2
        assert f"leave {flag[0]} out" in error["error"]


class Code:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def broken(name: str, make: Callable[..., Any], place: Path) -> Path:
    """A file or folder that cannot be plugged into the tiny model."""
    path = place / name
    if name == "code.pt":
        path.write_bytes(pickle.dumps({"conv_in.weight": Code()}))
    elif name == "text.pt":
        path.write_text("no weights")
    elif name == "other.safetensors":
        save_file({"encoder.block.weight": torch.ones(2)}, path)
    elif name == "shape.safetensors":
        save_file({"conv_in.weight": torch.ones(2, 2)}, path)
    elif name == "same.safetensors":
        save_file({k: t.half() for k, t in make().pipe.unet.state_dict().items()}, path)
    elif name == "same":
        make().pipe.save_pretrained(path)
    elif name == "xl":
        make(xl=True).pipe.save_pretrained(path)
    elif name == "velocity":
        erased(make, "xattn", prediction="v_prediction").pipe.save_pretrained(path)
    elif name == "clip":
        CLIP.tiny().save(path)
        make().pipe.tokenizer.save_pretrained(path)
    elif name == "torn":
        erased(make, "xattn").pipe.save_pretrained(path)
        file = path / "unet" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    else:
        path.mkdir()
        for file in {"two": ("a.safetensors", "b.safetensors"), "shards": ("m-00001-of-00003.bin",), "empty": ()}[name]:
            torch.save({"w": torch.ones(1)}, path / file)
    return path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("code.pt", "would run code"),
        ("text.pt", "damaged"),
        ("other.safetensors", "nothing in"),
        ("shape.safetensors", "another shape"),
        ("same.safetensors", "nothing was erased"),
        ("same", "nothing was erased"),
        ("xl", "another architecture"),
        ("velocity", "predicts 'v_prediction'"),
        ("clip", "lacks"),
        ("torn", "corrupt or truncated"),
        ("two", "give the one that is meant"),
        ("shards", "1 of 3 parts"),
        ("empty", "holds no file of weights"),
    ],
)
def test_what_cannot_be_plugged_in_is_refused(name: str, hint: str, sd: Callable[..., Any], cli: Cli, tmp_path: Path) -> None:
    path = broken(name, sd, tmp_path)
    code, error, _ = cli("attack", "random-tokens", str(path), "--base", "tiny", "--tries", "1", *FAST)
    assert code == error["exit_code"] == RefusedError.exit_code
    assert hint in error["error"]
    assert "\n" not in error["error"]
    assert error["error"].count(". ") == 0
    assert not left()
    assert not Path("ran").exists()


def test_a_unet_of_another_architecture_is_refused(sd: Callable[..., Any], cli: Cli, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    other = sd()
    other.pipe.unet = UNet2DConditionModel.from_config({**other.pipe.unet.config, "block_out_channels": (8, 24)})
    other.pipe.save_pretrained(tmp_path / "other")
    code, error, _ = cli("attack", "random-tokens", str(tmp_path / "other"), "--base", "tiny", *FAST)
    assert code == RefusedError.exit_code
    assert "the unet in" in error["error"]
    assert "another architecture" in error["error"]
    assert not left()


def test_another_vae_is_noted(sd: Callable[..., Any], tmp_path: Path) -> None:
    made = erased(sd, "xattn")
    with torch.no_grad():
        for p in made.vae.parameters():
            p.add_(0.25)
    made.pipe.save_pretrained(tmp_path / "made")
    folder = adopt(tmp_path / "made", tasks.load("canvas/neon"), base="tiny", runs=tmp_path / "runs")
    assert "has another VAE" in record(folder)["warnings"][0]


def test_a_patch_of_ours_must_be_of_the_base(forms: Path, sd: Callable[..., Any], tmp_path: Path) -> None:
    sd(seed=1).pipe.save_pretrained(tmp_path / "other")
    with pytest.raises(RefusedError, match="does not share the 'unet'"):
        adopt(forms / "ours", tasks.load("canvas/neon"), base=str(tmp_path / "other"), runs=tmp_path / "runs")
    with pytest.raises(UsageError, match="--base"):
        adopt(forms / "ours", tasks.load("canvas/neon"), runs=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*"))


# --- an erasure made on a CLIP ------------------------------------------------------------------------------------
def tower(clip: Any, component: str, path: Path) -> Any:
    """A patch file that adds 1 to a tower of ``clip``, and what it holds."""
    chosen = {n: t.clone() + 1 for n, t in patch.live({component: clip.modules[component]}).items() if t.is_floating_point()}
    patch.save(patch.Patch(tensors=chosen, base={component: clip.base["sha256"][component]}), path)
    return chosen


@pytest.mark.parametrize(("component", "family"), [("text_encoder", "sd"), ("vision_tower", "llava")])
def test_a_clip_patch_fits_what_shares_the_tower(component: str, family: str, sd: Callable[..., Any], tmp_path: Path) -> None:
    clip, file = CLIP.tiny(), tmp_path / "tower.safetensors"
    given = tower(clip, component, file)
    target: Any = sd() if family == "sd" else Llava.tiny()
    task = tasks.from_concept("zq", "object")
    with pytest.raises(RefusedError, match=f"does not share the '{component}'"):
        Plug(patch=str(file))(target, task)
    with torch.no_grad():  # the very tower that the CLIP has
        theirs = patch.live({component: clip.modules[component]})
        for n, t in patch.live({component: target.modules[component]}).items():
            t.copy_(theirs[n])
    before = weights(target)
    Plug(patch=str(file))(target, task)
    after = weights(target)
    assert all(torch.equal(after[n], t) for n, t in given.items())
    assert all(torch.equal(after[n], t) for n, t in before.items() if n not in given)


@pytest.mark.parametrize(("component", "target"), [("text_encoder", "canvas"), ("vision_tower", "canvas-llava")])
def test_the_bundled_models_share_their_towers(component: str, target: str, tmp_path: Path) -> None:
    given = tower(load("canvas-clip"), component, tmp_path / "tower.safetensors")
    model = load(target)
    Plug(patch=str(tmp_path / "tower.safetensors"))(model, tasks.load("clip/zorbo"))
    assert all(torch.equal(weights(model)[n], t) for n, t in given.items())


def test_a_whole_clip_of_others_is_a_run(tmp_path: Path, sd: Callable[..., Any]) -> None:
    made = CLIP.tiny()
    with torch.no_grad():
        for p in made.select("vision").values():
            p.add_(0.25)
    made.save(tmp_path / "made")
    sd().pipe.tokenizer.save_pretrained(tmp_path / "made")
    folder = adopt(tmp_path / "made", tasks.from_concept("zq", "object"), base="tiny-clip", runs=tmp_path / "runs")
    assert {n.partition(".")[0] for n in record(folder)["weights"]["changed"]} == {"vision_tower", "projections"}
    with pytest.raises(RefusedError, match="lacks"):
        Plug(patch=str(tmp_path / "made"), unshared=True)(sd(), tasks.from_concept("zq", "object"))
    Plug(patch=str(tmp_path / "made"), unshared=True, components=("text_encoder",))(sd(), tasks.from_concept("zq", "object"))
