"""Exports: each loads with plain diffusers or transformers in a process that imports nothing of ours, with the very weights."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unlearners import imports, patch, run, targets
from unlearners.base import Task
from unlearners.errors import RefusedError, UnlearnError, UsageError
from unlearners.exports import export, hub
from unlearners.exports.lora import LoRA
from unlearners.methods.esd import ESD
from unlearners.methods.uce import UCE
from unlearners.targets.stable_diffusion import StableDiffusion

TASK = Task(name="zq", kind="style", concepts=("zq",), anchors=("art",), preserve=("ink",))


def sd2() -> Any:
    """SD 2.x's layout: OpenCLIP's activation, linear projections around attention, v-prediction."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    pipe = StableDiffusion.tiny(seed=3, prediction="v_prediction").pipe
    torch.manual_seed(3)
    pipe.text_encoder.config.hidden_act = "gelu"
    pipe.text_encoder = CLIPTextModel(pipe.text_encoder.config)
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "use_linear_projection": True})
    return pipe


def sdxl() -> Any:
    """SDXL's layout: two text encoders of different widths, as the converters tell them apart by."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    pipe = StableDiffusion.tiny(seed=4, xl=True).pipe
    torch.manual_seed(4)
    config = deepcopy(pipe.text_encoder_2.config)  # tiny's two encoders share one
    config.hidden_size, config.num_hidden_layers, config.projection_dim, config.hidden_act = 24, 11, 24, "gelu"
    pipe.text_encoder_2 = CLIPTextModelWithProjection(config)
    size = {"cross_attention_dim": 40, "projection_class_embeddings_input_dim": 48, "use_linear_projection": True}
    blocks = {  # SDXL attends where the picture is small
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, **size, **blocks})
    return pipe


MAKERS: dict[str, Any] = {"sd1": lambda: StableDiffusion.tiny(seed=5).pipe, "sd2": sd2, "sdxl": sdxl}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run on each layout, all weights of attention and of the text encoder's layers changed."""
    at, made = tmp_path_factory.mktemp("exports"), {}
    for name, maker in MAKERS.items():
        maker().save_pretrained(at / name)
        made[name] = run.erase(UCE(), str(at / name), TASK, runs=at / "runs")
    made["text"] = run.erase(ESD(params="text_encoder", steps=1, sampler_steps=2, lr=1e-3), str(at / "sd1"), TASK, runs=at / "runs")
    return made


def base(folder: Path) -> str:
    return str(run.read_run(folder)["run"]["target"])


def alone(code: str, tmp: Path, **paths: Any) -> dict[str, Tensor]:
    """Run ``code``, which leaves ``parts``, a dict of modules, in a process without our package; all of their weights by hub key."""
    dump = tmp / "dump.safetensors"
    lines = [f"{k} = {str(v)!r}" for k, v in paths.items()]
    tail = f"""
from safetensors.torch import save_file
found = {{f'{{c}}.{{k}}': t for c, m in parts.items() for k, t in m.state_dict().items()}}
save_file({{k: t.detach().float().contiguous().clone() for k, t in found.items()}}, {str(dump)!r})
assert not [m for m in sys.modules if m.split('.')[0] == 'unlearners']
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(["import sys, torch", *lines, code, tail])],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {patch.hub_key(k): t for k, t in load_file(dump).items()}


PARTS = "parts = {c: getattr(pipe, c) for c in ('unet', 'vae', 'text_encoder', 'text_encoder_2') if getattr(pipe, c, None) is not None}"
SINGLE = f"""
import json, pathlib, diffusers
cls = getattr(diffusers, json.loads((pathlib.Path(config) / 'model_index.json').read_text())['_class_name'])
pipe = cls.from_single_file(file, config=config, torch_dtype=torch.float32)
{PARTS}
"""


def weights(target: Any) -> dict[str, Tensor]:
    return patch.live({**target.modules, "vae": target.vae})


@pytest.mark.parametrize("name", MAKERS)
def test_a_single_file_goes_back_bit_for_bit(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    file = export("single_file", runs[name], tmp_path / "out", dtype="float32")
    wanted = weights(targets.load(str(runs[name])))
    found = alone(SINGLE, tmp_path, file=file, config=base(runs[name]))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_the_canvas_as_a_single_file(tmp_path: Path) -> None:
    folder = run.erase("original", "canvas", TASK, runs=tmp_path)
    file = export("single_file", folder, tmp_path / "out")  # float16, as it is on disk
    wanted = weights(targets.load("canvas"))
    found = alone(SINGLE, tmp_path, file=file, config=StableDiffusion.aliases["canvas"])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_a_unet_and_a_text_encoder_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    unet, text = (
        export("unet", runs["sd1"], tmp_path / "u", dtype="float32"),
        export("text_encoder", runs["text"], tmp_path / "t", dtype="float32"),
    )
    code = """
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel
parts = {'unet': UNet2DConditionModel.from_pretrained(unet), 'text_encoder': CLIPTextModel.from_pretrained(text)}
"""
    found = alone(code, tmp_path, unet=unet, text=text)
    wanted = patch.live({"unet": targets.load(str(runs["sd1"])).modules["unet"]})
    wanted |= patch.live({"text_encoder": targets.load(str(runs["text"])).modules["text_encoder"]})
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert all(k.startswith("text_model.") for k in load_file(text / "model.safetensors"))  # transformers 4's spelling
    assert json.loads((text / "config.json").read_text())["architectures"] == ["CLIPTextModel"]
    part = load_file(export("unet", runs["sd1"], tmp_path / "p", changed=True))
    assert {f"unet.{k}" for k in part} == set(run.read_run(runs["sd1"])["weights"]["changed"])
    with pytest.raises(UsageError, match="no weight of the UNet"):
        export("unet", runs["text"], tmp_path / "n", changed=True)
    with pytest.raises(UsageError, match="text_encoder_2"):
        export("text_encoder", runs["sd1"], tmp_path / "n", which="text_encoder_2")


# --- LoRA ---------------------------------------------------------------------------------------------------------
FUSED = f"""
import diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(folder)
pipe.fuse_lora()
pipe.unload_lora_weights()
{PARTS}
"""


@pytest.fixture(scope="module")
def moved(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs whose every Linear and Conv2d has changed."""
    from safetensors import safe_open

    at, made = tmp_path_factory.mktemp("moved"), {}
    for name in ("sd1", "sdxl"):
        folder = at / name
        folder.mkdir()
        (folder / "run.json").write_text((runs[name] / "run.json").read_text())
        target = targets.load(base(runs[name]))
        live, draw = patch.live(target.modules), torch.Generator().manual_seed(1)
        from unlearners import lora_files

        layers = [k for k in lora_files.layers(live) if "text_projection" not in k]
        tensors = {k: live[k] + 0.1 * torch.randn(live[k].shape, generator=draw) for k in layers}
        patch.save(patch.Patch(tensors=tensors, base=target.base["sha256"]), folder / "weights.safetensors")
        with safe_open(folder / "weights.safetensors", framework="pt") as file:
            assert len(list(file.keys())) == len(layers)
        made[name] = folder
    return made


@pytest.mark.parametrize("naming", ["peft", "kohya"])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_lora_of_full_rank_gives_the_erased_weights(name: str, naming: str, moved: dict[str, Path], tmp_path: Path) -> None:
    file = export("lora", moved[name], tmp_path / "out", rank=0, naming=naming, dtype="float32")
    assert LoRA().about(file)["residual"] < 1e-6
    wanted = patch.live(targets.load(str(moved[name])).modules)
    found = alone(FUSED, tmp_path, base=base(moved[name]), folder=tmp_path / "out")
    assert max(float((found[k] - wanted[k]).abs().max()) for k in wanted) < 1e-5
    start = targets.load(base(moved[name]))
    start.patch([str(file)])  # and read back as a file of others
    assert max(float((t - wanted[k]).abs().max()) for k, t in patch.live(start.modules).items()) < 1e-5


def test_a_lora_of_low_rank_says_what_it_loses(moved: dict[str, Path], tmp_path: Path) -> None:
    old, new = (patch.live(targets.load(s).modules) for s in (base(moved["sd1"]), str(moved["sd1"])))
    residuals = []
    for rank in (1, 4, 8):
        file = export("lora", moved["sd1"], tmp_path / f"{rank}", rank=rank, dtype="float32")
        residuals.append(LoRA().about(file)["residual"])
        start = targets.load(base(moved["sd1"]))
        start.patch([str(file)])
        live = patch.live(start.modules)
        left = sum(float((live[k] - new[k]).double().square().sum()) for k in new)
        total = sum(float((new[k] - old[k]).double().square().sum()) for k in new)
        assert residuals[-1] == pytest.approx((left / total) ** 0.5, rel=1e-3)
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[0] > residuals[-1] > 0


def test_a_layer_that_readers_of_kohya_names_would_lose_is_refused(tmp_path: Path) -> None:
    StableDiffusion.tiny(xl=True).pipe.save_pretrained(tmp_path / "base")  # its first up block has an upsampler and no attention
    folder = run.erase("original", str(tmp_path / "base"), TASK, runs=tmp_path)
    target, k = targets.load(str(tmp_path / "base")), "unet.up_blocks.0.upsamplers.0.conv.weight"
    changed = {k: patch.live(target.modules)[k] + 1}
    patch.save(patch.Patch(tensors=changed, base={"unet": target.base["sha256"]["unet"]}), folder / "weights.safetensors")
    with pytest.raises(UsageError, match=r"naming peft"):
        export("lora", folder, tmp_path / "out", naming="kohya")
    assert LoRA().about(export("lora", folder, tmp_path / "out", naming="peft", rank=0))["layers"] == 1


def test_what_a_lora_cannot_hold(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"layer_norm|bias.*leave_out"):
        export("lora", runs["text"], tmp_path / "out")
    file = export("lora", runs["text"], tmp_path / "out", rank=0, leave_out=True, dtype="float32")
    about = LoRA().about(file)
    assert 0 < about["residual"] < 1
    assert any("layer_norm" in k for k in about["left_out"])
    with pytest.raises(UsageError, match="changed no weight"):
        export("lora", run.erase("original", base(runs["sd1"]), TASK, runs=tmp_path), tmp_path / "o")
    with pytest.raises(UsageError, match="rank"):
        LoRA(rank=-1)


# --- hub ----------------------------------------------------------------------------------------------------------
class Api:
    """Writes down what it is asked."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.asked = fails, []  # type: ignore[var-annotated]

    def create_repo(self, name: str, **how: Any) -> None:
        if self.fails:
            raise ConnectionError("no route\nto host")
        self.asked.append((name, how))

    def upload_folder(self, **how: Any) -> None:
        self.asked.append(how)


@pytest.mark.parametrize("layout", ["diffusers", "patch"])
def test_a_hub_folder_with_its_card(layout: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    api = Api()
    monkeypatch.setattr(hub, "_api", lambda: api)
    out = export("hub", runs["sd1"], tmp_path / "out", layout=layout, licence="creativeml-openrail-m", push="me/gone")
    assert api.asked[0] == ("me/gone", {"private": True, "exist_ok": True})
    assert api.asked[1]["folder_path"] == str(out)
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["base_model"], front["license"]) == (base(runs["sd1"]), "creativeml-openrail-m")
    for path in out.rglob("*.safetensors"):
        assert hub._sha(path) in text
    assert all(word in text for word in ("uce", "zq", "ink", "Hyper-parameters", "Limits", "torch", "Seed"))
    assert (out / ("model_index.json" if layout == "diffusers" else "weights.safetensors")).is_file()
    api.fails = True
    with pytest.raises(UnlearnError, match="not on the hub") as caught:
        export("hub", runs["sd1"], out, layout=layout, push="me/gone")
    assert "\n" not in str(caught.value)


# --- imports ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MAKERS)
def test_a_whole_original_checkpoint_as_a_patch(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    file = export("single_file", runs[name], tmp_path / "out", dtype="float32")
    state = {**load_file(file), "betas": torch.ones(3), "model_ema.decay": torch.ones(())}
    torch.save({"state_dict": state}, tmp_path / "erased.ckpt")
    unet = {k: t for k, t in load_file(file).items() if k.startswith("model.diffusion_model.")}
    torch.save({k.removeprefix("model.diffusion_model."): t for k, t in unet.items()}, tmp_path / "unet.pt")
    for given in ("erased.ckpt", "unet.pt"):
        target = targets.load(base(runs[name]), patches=[str(tmp_path / given)])
        wanted = patch.live(targets.load(str(runs[name])).modules)
        assert all(torch.equal(t, wanted[k]) for k, t in patch.live(target.modules).items())


def test_files_that_load_nothing_or_only_in_part_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    bad: dict[str, dict[str, Tensor]] = {
        "nothing": {"a.b": torch.ones(2)},
        "vae": {"first_stage_model.encoder.conv_in.weight": torch.ones(2)},
        "half": {"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3)},
        "loha": {"lora_unet_conv_in.hada_w1_a": torch.ones(2, 4)},
        "layer": {"lora_unet_conv_up.lora_down.weight": torch.ones(2, 4), "lora_unet_conv_up.lora_up.weight": torch.ones(4, 2)},
        "text": {"text_model.embeddings.token_embedding.weight": torch.ones(9, 768)},
        "open": {"cond_stage_model.model.ln_final.weight": torch.ones(1024)},
    }
    for name, tensors in bad.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(RefusedError) as caught:
            targets.load(base(runs["sd1"]), patches=[str(tmp_path / f"{name}.safetensors")])
        assert "\n" not in str(caught.value)
        assert ";" in str(caught.value)


def test_an_import_becomes_a_run_and_is_kept_as_a_patch(runs: dict[str, Path], tmp_path: Path) -> None:
    file = export("unet", runs["sd1"], tmp_path / "esd", changed=True, dtype="float32")
    folder = run.erase("original", base(runs["sd1"]), TASK, runs=tmp_path, patches=[str(file)])
    wanted = patch.live(targets.load(str(runs["sd1"])).modules)
    assert all(torch.equal(t, wanted[k]) for k, t in patch.live(targets.load(str(folder)).modules).items())
    assert imports.facts(folder / "weights.safetensors")["kind"] == "value"
    assert imports.facts(file)["form"] == "diffusers names"
