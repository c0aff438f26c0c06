"""Every form in which a user has a pipeline loads, and every file that must not be used is refused in one sentence."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unlearners import patch, run, targets, tasks
from unlearners.base import Task
from unlearners.errors import RefusedError, UnlearnError, UsageError
from unlearners.exports import export
from unlearners.methods.esd import ESD
from unlearners.methods.uce import UCE
from unlearners.patch import Patch
from unlearners.targets.stable_diffusion import StableDiffusion

UNET, VAE, TEXT = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
KINDS: dict[str, dict[str, Any]] = {"eps": {}, "v": {"prediction": "v_prediction"}, "xl": {"xl": True}}
TASK = Task(name="zq", kind="style", concepts=("zq",), anchors=("art",), preserve=("ink",))


@pytest.fixture(scope="module")
def made() -> dict[str, StableDiffusion]:
    return {name: StableDiffusion.tiny(seed=5, **fields) for name, fields in KINDS.items()}


@pytest.fixture(scope="module")
def disk(made: dict[str, StableDiffusion], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipelines as diffusers folders; tests that change one take a copy."""
    at = tmp_path_factory.mktemp("pipelines")
    for name, target in made.items():
        target.pipe.save_pretrained(at / name)
    return at


@pytest.fixture
def copy(disk: Path, tmp_path: Path) -> Path:
    """A copy of the SD folder, to be damaged."""
    return Path(shutil.copytree(disk / "eps", tmp_path / "copy"))


def equal(a: Any, b: Any) -> None:
    """The same weights in every editable part and in the VAE."""
    assert a.modules.keys() == b.modules.keys()
    for one, other in zip((*a.modules.values(), a.vae), (*b.modules.values(), b.vae), strict=True):
        x, y = one.state_dict(), other.state_dict()
        assert x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x)


def sentence(error: BaseException) -> str:
    """The message, after checking that it is one line that names the mend."""
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    assert ";" in text
    return text


def refused(kind: type[UnlearnError], spec: str, match: str, **options: Any) -> None:
    with pytest.raises(kind, match=match) as caught:
        targets.load(spec, **options)
    assert type(caught.value) is kind
    sentence(caught.value)


# --- diffusers folders --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", KINDS)
def test_a_diffusers_folder(name: str, made: dict[str, StableDiffusion], disk: Path) -> None:
    target: Any = targets.load(str(disk / name))
    equal(target, made[name])
    assert target.base["sha256"] == made[name].base["sha256"]
    assert target.xl is (name == "xl")
    assert target.scheduler.config.prediction_type == KINDS[name].get("prediction", "epsilon")
    assert target.special == made[name].special
    assert torch.equal(target.tokens(["zq, art"]), made[name].tokens(["zq, art"]))
    x_0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    a = target.scheduler.alphas_cumprod[t].view(2, 1, 1, 1)
    wanted = a.sqrt() * noise - (1 - a).sqrt() * x_0 if name == "v" else noise
    assert torch.allclose(target.goal(x_0, noise, t), wanted, atol=1e-6)
    pictures = [m.sample(["zq"], [1], steps=2) for m in (target, made[name])]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_precision(dtype: str, disk: Path) -> None:
    target: Any = targets.load(str(disk / "eps"), dtype=dtype)
    assert {p.dtype for p in target.named().values()} == {targets.DTYPES[dtype]}
    tiny: Any = targets.load("tiny", dtype=dtype)
    assert {p.dtype for m in tiny.modules.values() for p in m.parameters()} == {targets.DTYPES[dtype]}
    asked = {"float16": torch.float32}.get(dtype, targets.DTYPES[dtype])  # the VAE's config says that float16 overflows
    assert {p.dtype for p in tiny.vae.parameters()} == {asked}


@pytest.mark.parametrize(("name", "parts"), [("eps", ["text_encoder"]), ("xl", ["text_encoder", "text_encoder_2"])])
def test_both_spellings_of_text_encoders_load(
    name: str, parts: list[str], made: dict[str, StableDiffusion], disk: Path, tmp_path: Path
) -> None:
    """The hub's files have ``text_model.`` before each name; transformers 5 writes some without."""
    for prefixed in (True, False):
        folder = Path(shutil.copytree(disk / name, tmp_path / str(prefixed)))
        for part in parts:
            path = folder / part / "model.safetensors"
            bare = {k.removeprefix("text_model."): t for k, t in load_file(path).items()}
            spelled = {f"text_model.{k}" if prefixed and not k.startswith("text_projection") else k: t for k, t in bare.items()}
            if part == "text_encoder_2" and not prefixed:
                spelled = load_file(path)  # its class has kept the prefix
            save_file(spelled, path, {"format": "pt"})
        target = targets.load(str(folder))
        equal(target, made[name])
        assert target.base["sha256"] == made[name].base["sha256"]


def test_a_tokenizer_that_does_not_know_its_length(made: dict[str, StableDiffusion], copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_max_length"}))
    target: Any = targets.load(str(copy))
    assert torch.equal(target.tokens(["zq"]), made["eps"].tokens(["zq"]))


# --- single files -------------------------------------------------------------------------------------------------
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
TOP = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
PLACES = (  # of a UNet with one layer in each of its two blocks, diffusers on the left, ldm on the right
    ("down_blocks.0.resnets.0", "input_blocks.1.0"), ("down_blocks.0.attentions.0", "input_blocks.1.1"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"), ("down_blocks.1.resnets.0", "input_blocks.3.0"),
    ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"), ("mid_block.resnets.1", "middle_block.2"),
    ("up_blocks.0.resnets.0", "output_blocks.0.0"), ("up_blocks.0.resnets.1", "output_blocks.1.0"),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv"),
    ("up_blocks.1.resnets.0", "output_blocks.2.0"), ("up_blocks.1.attentions.0", "output_blocks.2.1"),
    ("up_blocks.1.resnets.1", "output_blocks.3.0"), ("up_blocks.1.attentions.1", "output_blocks.3.1"),
)  # fmt: skip


def ldm_unet(key: str) -> str:
    if key.startswith("time_embedding"):
        return re.sub(r"time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}", key)
    for ours, theirs in (*TOP.items(), *PLACES):
        if key.startswith(f"{ours}."):
            rest = key.removeprefix(f"{ours}.")
            if ".resnets." in f".{ours}":
                part, _, kind = rest.partition(".")
                rest = f"{RESNET[part]}.{kind}"
            return f"{theirs}.{rest}"
    raise AssertionError(key)


def ldm_vae(key: str) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0" in key:
        key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm").replace("to_out.0", "proj_out")
        key = re.sub(r"to_([qkv])\b", r"\1", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", key)


def ldm(target: StableDiffusion) -> dict[str, Tensor]:
    """A tiny SD pipeline's weights under their names in the original code, as CompVis published checkpoints."""
    out = {f"model.diffusion_model.{ldm_unet(k)}": t for k, t in target.pipe.unet.state_dict().items()}
    for k, t in target.pipe.vae.state_dict().items():
        matrix = "mid_block.attentions" in k and t.dim() == 2  # 1 × 1 convolutions there
        out[f"first_stage_model.{ldm_vae(k)}"] = t[:, :, None, None] if matrix else t
    for k, t in target.pipe.text_encoder.state_dict().items():
        out[f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}"] = t
    assert len(out) == sum(len(m.state_dict()) for m in (target.pipe.unet, target.pipe.vae, target.pipe.text_encoder))
    return {k: t.contiguous() for k, t in out.items()}


@pytest.fixture(scope="module")
def singles(made: dict[str, StableDiffusion], tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("single")
    state = ldm(made["eps"])
    save_file(state, at / "model.safetensors")
    torch.save({"state_dict": state, "global_step": 7}, at / "model.ckpt")
    torch.save(state, at / "bare.ckpt")
    torch.save({"state_dict": state}, at / "old.ckpt", _use_new_zipfile_serialization=False)
    return at


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "bare.ckpt", "old.ckpt"])
def test_a_single_file_in_the_original_layout(name: str, made: dict[str, StableDiffusion], disk: Path, singles: Path) -> None:
    target: Any = targets.load(f"{singles / name}@{disk / 'eps'}")
    equal(target, made["eps"])
    assert target.base["sha256"] == made["eps"].base["sha256"]
    assert torch.equal(target.sample(["zq"], [1], steps=2), made["eps"].sample(["zq"], [1], steps=2))


def test_erasing_a_single_file(disk: Path, singles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given by relative paths; the run folder still loads from elsewhere."""
    monkeypatch.chdir(singles.parent)
    config = Path("..", *disk.parts[-2:], "eps") if disk.parent != singles.parent else Path(disk.name, "eps")
    folder = run.erase(UCE(), f"{singles.name}/model.safetensors@{config}", TASK, runs=tmp_path)
    monkeypatch.chdir(tmp_path)
    before, after = targets.load(str(disk / "eps")), targets.load(str(folder))
    changed = {n for n, p in after.named().items() if not torch.equal(p, before.named()[n])}
    assert changed == set(before.select("xattn-kv"))


def test_a_folder_whose_name_has_an_at(disk: Path, singles: Path, tmp_path: Path, made: dict[str, StableDiffusion]) -> None:
    odd = tmp_path / "me@home"
    shutil.copytree(disk / "eps", odd / "sd")
    shutil.copy(singles / "model.safetensors", odd)
    equal(targets.load(str(odd / "sd")), made["eps"])
    equal(targets.load(f"{odd / 'model.safetensors'}@{odd / 'sd'}"), made["eps"])


def test_a_single_file_needs_its_configuration_when_offline(singles: Path) -> None:
    refused(RefusedError, str(singles / "model.safetensors"), "@FOLDER")


@pytest.mark.parametrize("name", ["no.safetensors", "no.ckpt"])
def test_a_single_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    refused(UsageError, str(tmp_path / name), "no such file")


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "old.ckpt"])
@pytest.mark.parametrize("size", [0, 5, 1000, -1000])
def test_a_truncated_single_file(name: str, size: int, singles: Path, disk: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((singles / name).read_bytes()[:size])
    refused(RefusedError, f"{tmp_path / name}@{disk / 'eps'}", "corrupt|damaged")


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.pt"])
def test_noise_for_a_single_file(name: str, disk: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)) * 8)
    refused(RefusedError, f"{tmp_path / name}@{disk / 'eps'}", "corrupt|damaged")


def test_a_checkpoint_of_something_else(disk: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    refused(RefusedError, f"{tmp_path / 'a.safetensors'}@{disk / 'eps'}", "could not be read as a Stable Diffusion checkpoint")
    inpainting = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}
    save_file(inpainting, tmp_path / "b.safetensors")
    refused(UsageError, str(tmp_path / "b.safetensors"), "'inpainting'")


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_a_malicious_pickle_runs_nothing(how: str, suffix: str, singles: Path, disk: Path, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / f"evil{suffix}"
    state = {"state_dict": {**load_file(singles / "model.safetensors"), "x": Payload(mark)}}
    if how == "bare":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "zip")
    refused(RefusedError, f"{path}@{disk / 'eps'}", "would run code|corrupt")
    refused(RefusedError, "tiny", "pickle|damaged", patches=[str(path)])
    assert not mark.exists()
    with path.open("rb") as file:  # it is as malicious as it looks
        pickle.load(file) if how == "bare" else torch.load(file, weights_only=False)
    assert mark.exists()


# --- folders that must not be used --------------------------------------------------------------------------------
@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
@pytest.mark.parametrize("how", ["truncated", "noise", "empty"])
def test_a_damaged_weight_file(part: str, how: str, copy: Path) -> None:
    whole = (copy / part).read_bytes()
    (copy / part).write_bytes({"truncated": whole[: len(whole) // 2], "noise": whole[::-1], "empty": b""}[how])
    refused(RefusedError, str(copy), rf"{Path(part).name} is corrupt or truncated")


@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
def test_a_weight_file_without_one_weight(part: str, copy: Path) -> None:
    """The libraries would fill it with random numbers, or leave it out, and only warn."""
    state = load_file(copy / part)
    lost = sorted(state)[3]
    save_file({k: t for k, t in state.items() if k != lost}, copy / part, {"format": "pt"})
    refused(RefusedError, str(copy), f"lack '.*{lost}'")


@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
def test_a_weight_of_another_shape(part: str, copy: Path) -> None:
    state = load_file(copy / part)
    save_file(state | {sorted(state)[3]: torch.zeros(3, 5)}, copy / part, {"format": "pt"})
    refused(RefusedError, str(copy), "cannot be read")


@pytest.mark.parametrize("part", [UNET, TEXT])
def test_only_a_pickle_in_the_folder(part: str, copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    name = "diffusion_pytorch_model.bin" if part == UNET else "pytorch_model.bin"
    torch.save({**load_file(copy / part), "x": Payload(mark)}, (copy / part).with_name(name))
    (copy / part).unlink()
    refused(RefusedError, str(copy), "safetensors")
    assert not mark.exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_is_missing(part: str, copy: Path) -> None:
    shutil.rmtree(copy / part)
    refused(RefusedError, str(copy), f"no folder '{part}'")


def test_a_damaged_configuration(copy: Path) -> None:
    (copy / "unet" / "config.json").write_text("{")
    refused(RefusedError, str(copy), "cannot be read")
    for text in ("", "{", "[]", "{}", '"StableDiffusionPipeline"'):
        (copy / "model_index.json").write_text(text)
        refused(RefusedError, str(copy), "model_index.json is damaged")


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionInpaintPipeline", ["my_code", "Pipeline"]])
def test_another_pipeline(name: Any, copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    refused(UsageError, str(copy), "this target takes StableDiffusionPipeline or StableDiffusionXLPipeline")


def test_what_is_no_model(tmp_path: Path) -> None:
    refused(UsageError, str(tmp_path), "neither model_index.json nor run.json")
    refused(UsageError, str(tmp_path / "nothing"), "no such folder or file")
    (tmp_path / "notes.txt").touch()
    refused(UsageError, str(tmp_path / "notes.txt"), "no model file")


@pytest.mark.parametrize("name", ["nobody/nothing-here", "nothing-here"])
def test_an_unknown_hub_id_offline(name: str) -> None:
    refused(UsageError, name, "could not be fetched from the hub")


def test_an_unknown_precision() -> None:
    refused(UsageError, "tiny", "float32, float16", dtype="int8")


# --- patches and run folders --------------------------------------------------------------------------------------
def weights(target: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in target.named().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def erased(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders: UCE on keys and values, and ESD on the text encoder, each on the untouched pipeline."""
    runs = tmp_path_factory.mktemp("runs")
    text = ESD(params="text_encoder", steps=1, sampler_steps=2, lr=1e-3)
    return {name: run.erase(method, str(disk / "eps"), TASK, runs=runs) for name, method in {"uce": UCE(), "text": text}.items()}


def test_a_run_folder(disk: Path, erased: dict[str, Path]) -> None:
    base, target = weights(targets.load(str(disk / "eps"))), targets.load(str(erased["uce"]))
    tensors = load_file(erased["uce"] / "weights.safetensors")
    assert tensors.keys() == set(target.select("xattn-kv"))
    for n, p in target.named().items():
        assert torch.equal(p, tensors[n] if n in tensors else base[n])
    patched = targets.load(str(disk / "eps"), patches=[str(erased["uce"])])
    assert same(weights(patched), weights(target))


def test_a_text_encoder_patch_is_spelled_as_on_the_hub(disk: Path, erased: dict[str, Path]) -> None:
    tensors = load_file(erased["text"] / "weights.safetensors")
    assert tensors
    assert all(k.startswith("text_encoder.text_model.") for k in tensors)
    changed = run.read_run(erased["text"])["weights"]
    assert changed["outside"] == 0
    assert set(changed["changed"]) == set(tensors)
    base, target = weights(targets.load(str(disk / "eps"))), weights(targets.load(str(erased["text"])))
    moved = {n for n in base if not torch.equal(base[n], target[n])}
    assert {patch.hub_key(n) for n in moved} == set(tensors)


def test_stacked_patches(disk: Path, erased: dict[str, Path]) -> None:
    """Patches of different parts do not touch one another; the order does not matter."""
    uce, text = str(erased["uce"]), str(erased["text"])
    one = weights(targets.load(str(disk / "eps"), patches=[uce, f"{text}/weights.safetensors"]))
    alone = {n: weights(targets.load(str(erased[n]))) for n in erased}
    for n, t in one.items():
        assert torch.equal(t, alone["uce" if n.startswith("unet.") else "text"][n])
    for spec, patches in ((str(disk / "eps"), [text, uce]), (uce, [text]), (text, [uce])):
        assert same(weights(targets.load(spec, patches=patches)), one)


def test_an_erasure_on_top_of_another(disk: Path, erased: dict[str, Path], tmp_path: Path) -> None:
    """By patches or by naming the run folder; both change the same matrices, and the second run's folder stands alone."""
    again = Task(name="xw", kind="style", concepts=("xw",), anchors=("art",), preserve=("ink",))
    wanted: Any = targets.load(str(erased["uce"]))
    start = weights(wanted)
    UCE()(wanted, again)
    hashes = set()
    for target, patches in ((str(disk / "eps"), [str(erased["uce"])]), (str(erased["uce"]), [])):
        folder = run.erase(UCE(), target, again, runs=tmp_path, patches=patches)
        assert same(weights(targets.load(str(folder))), weights(wanted))
        record = run.read_run(folder)
        assert record["weights"]["outside"] == 0
        assert not same(start, weights(wanted))
        hashes.add(record["start"])
        alone = targets.load(str(disk / "eps"), patches=[str(folder)])
        assert same(weights(alone), weights(wanted))
    assert hashes != {run.read_run(erased["uce"])["start"]}
    assert len(hashes) == 1
    third = run.erase(ESD(steps=1, sampler_steps=2), str(folder), TASK, runs=tmp_path)
    assert not same(weights(targets.load(str(third))), weights(wanted))


def test_pictures_of_the_original_are_not_shared_between_different_originals(erased: dict[str, Path], tmp_path: Path) -> None:
    again = Task(name="xw", kind="style", concepts=("xw",))
    folder = run.erase(UCE(), str(erased["uce"]), again, runs=erased["uce"].parent)
    first, second = (run._original_folder(f, run.read_run(f)) for f in (erased["uce"], folder))
    assert first != second
    assert first == run._original_folder(erased["text"], run.read_run(erased["text"]))


def test_a_patch_for_another_base(erased: dict[str, Path], tmp_path: Path) -> None:
    patched = str(erased["uce"])
    refused(RefusedError, "tiny", "--force", patches=[patched])
    target = targets.load("tiny")
    before = weights(target)
    with pytest.raises(RefusedError):
        target.patch([patched])
    assert same(before, weights(target))
    target.patch([patched], force=True)
    tensors = load_file(erased["uce"] / "weights.safetensors")
    assert same({n: tensors.get(n, t) for n, t in before.items()}, weights(target))
    with pytest.raises(RefusedError, match="--force"):
        run.erase(UCE(), "tiny", TASK, runs=tmp_path, patches=[patched])
    folder = run.erase(UCE(), "tiny", TASK, runs=tmp_path, patches=[patched], force=True)
    UCE()(target, TASK)
    assert same(weights(targets.load(str(folder))), weights(target))  # which needs no force
    original = run._original(run.read_run(folder), "cpu")
    assert same(weights(original), {n: tensors.get(n, t) for n, t in before.items()})


@pytest.mark.parametrize("force", [False, True])
def test_a_patch_that_does_not_fit_is_never_half_applied(force: bool, disk: Path, tmp_path: Path) -> None:
    target = targets.load(str(disk / "eps"))
    name, wrong = list(target.select("xattn-kv"))[:2]
    good = target.named()[name].detach() + 1
    for bad in ({wrong: torch.zeros(3, 3)}, {"unet.no.such.weight": torch.zeros(3)}):
        path = tmp_path / "bad.safetensors"
        patch.save(Patch(tensors={name: good, **bad}, base={"unet": target.base["sha256"]["unet"]}), path)
        before = weights(target)
        with pytest.raises(RefusedError) as caught:
            target.patch([str(path)], force=force)
        sentence(caught.value)
        assert same(before, weights(target))
    fits = tmp_path / "good.safetensors"
    patch.save(Patch(tensors={name: good}, base={"unet": target.base["sha256"]["unet"]}), fits)
    with pytest.raises(RefusedError):
        target.patch([str(fits), str(path)], force=force)  # the first fits
    assert same(before, weights(target))


@pytest.mark.parametrize("size", [0, 7, 100, -100])
def test_a_truncated_patch(size: int, erased: dict[str, Path], disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes((erased["uce"] / "weights.safetensors").read_bytes()[:size])
    refused(RefusedError, str(disk / "eps"), "damaged", patches=[str(path)])
    refused(RefusedError, str(disk / "eps"), "cannot be read", patches=[str(tmp_path / "none.safetensors")])


def test_an_alias_wins_over_a_folder_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = run.erase(UCE(), "tiny", TASK, runs="runs")
    assert run.read_run(folder)["run"]["target"] == "tiny"


# --- end to end ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "kind"), [("eps", "style"), ("v", "object"), ("xl", "identity"), ("eps", "nsfw")])
def test_a_folder_on_disk_with_a_bare_concept(name: str, kind: Any, disk: Path, tmp_path: Path) -> None:
    """Erase text from any pipeline on disk, export it, and load that with diffusers alone."""
    import diffusers

    task = tasks.from_concept("Zq", kind, preserve=("ink",))
    folder = run.erase(ESD(steps=1, lr=1e-3, sampler_steps=2), str(disk / name), task, runs=tmp_path)
    out = export("diffusers", folder, tmp_path / "out", dtype="float32")
    cls = diffusers.StableDiffusionXLPipeline if name == "xl" else diffusers.StableDiffusionPipeline
    pipe = cls.from_pretrained(out)
    target: Any = targets.load(str(folder))
    for part, module in target.modules.items():
        ours, theirs = patch.live({part: module}), patch.live({part: getattr(pipe, part)})
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    changed = set(run.read_run(folder)["weights"]["changed"])
    assert changed == set(target.select("noxattn" if kind in ("object", "nsfw") else "xattn"))
    assert pipe.scheduler.config.prediction_type == target.scheduler.config.prediction_type
    again: Any = targets.load(str(out))
    equal(again, target)
    assert torch.equal(again.sample(["zq"], [1], steps=2), target.sample(["zq"], [1], steps=2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_exporting_a_run_at_another_precision(dtype: str, disk: Path, tmp_path: Path) -> None:
    folder = run.erase(UCE(), str(disk / "eps"), TASK, runs=tmp_path, dtype=dtype)
    target: Any = targets.load(str(folder))  # at the run's precision
    assert {p.dtype for p in target.named().values()} == {targets.DTYPES[dtype]}
    again = targets.load(str(export("diffusers", folder)))
    assert all(torch.equal(p.half(), again.named()[n].half()) for n, p in target.named().items())


def test_exporting_an_unfinished_run_is_refused(erased: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(erased["uce"], tmp_path / "run"))
    record = run.read_run(folder)
    (folder / "run.json").write_text(json.dumps(record | {"status": "stopped"}))
    with pytest.raises(UsageError, match="stopped"):
        export("diffusers", folder)
