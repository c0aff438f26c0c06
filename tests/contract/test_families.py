"""Classifiers and class-conditional diffusion in the forms users have them, and training them from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unlearners import nets, run, tasks
from unlearners.base import Data
from unlearners.errors import RefusedError, UsageError
from unlearners.methods.ft import FT
from unlearners.methods.retrain import Retrain
from unlearners.targets import family_of, load
from unlearners.targets.classifier import Classifier
from unlearners.targets.ddpm import DDPM
from unlearners.train import train

SHORT = Retrain(epochs=2, batch=16, lr=0.05, cache=False)


@pytest.mark.parametrize(("name", "count"), [("resnet18_cifar", 11_173_962), ("resnet20_cifar", 272_474)])
def test_cifar_networks_have_the_papers_number_of_weights(name: str, count: int) -> None:
    """ResNet-18's count is that of the authors' network; ResNet-20's has 1×1 convolutions where the paper pads."""
    net = nets.build(name, 10)
    extra = sum(p.numel() for n, p in net.named_parameters() if ".short." in n)
    assert sum(p.numel() for p in net.parameters()) - extra == (count if not extra else 269_722)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", nets.CIFAR)
def test_every_cifar_network_reads_small_pictures(name: str) -> None:
    target = Classifier.fresh(name, ("x", "y", "z"))
    assert target.side == 32
    with torch.no_grad():
        assert target.logits(torch.rand(2, 3, 32, 32)).shape == (2, 3)
        assert target.features(torch.rand(2, 3, 32, 32)).shape == (2, target.head.in_features)


@pytest.mark.parametrize(("name", "spec"), [("torchvision/shufflenet_v2_x0_5", "shufflenet_v2_x0_5"), ("timm/resnet10t", "timm/resnet10t")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_by_its_architecture(name: str, spec: str, suffix: str, tmp_path: Path) -> None:
    net = nets.build(name, 7)
    state = {f"module.{k}": v for k, v in net.state_dict().items()}  # as DataParallel saves it
    file = tmp_path / f"mine{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
    target = load(f"{file}@{spec}")
    assert isinstance(target, Classifier) and len(target.classes) == 7
    x = torch.rand(1, 3, target.side, target.side)
    with torch.no_grad():
        expected = net.eval()((x - target.mean) / target.std)
        assert torch.allclose(target.logits(x), expected, atol=1e-5)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    torch.save(nets.build("resnet20_cifar", 3).state_dict(), tmp_path / "x.pth")
    with pytest.raises(RefusedError, match=r"name the architecture it was trained with|name its own architecture"):
        load(f"{tmp_path / 'x.pth'}@resnet18_cifar")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save(nets.build("resnet20_cifar", 3), tmp_path / "x.pth")
    with pytest.raises(RefusedError, match="would run code"):
        load(f"{tmp_path / 'x.pth'}@resnet20_cifar")


def test_a_transformers_folder(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, layer_type="basic", id2label={0: "cat", 1: "dog", 2: "cow"}
    )
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    target = load(str(tmp_path))
    assert isinstance(target, Classifier)
    assert (target.classes, target.side) == (("cat", "dog", "cow"), 24)
    before = target.named()["net.classifier.1.weight"].clone()
    target.reset()
    assert not torch.equal(before, target.named()["net.classifier.1.weight"])
    assert list(target.select("head")) == ["net.classifier.1.weight", "net.classifier.1.bias"]


def test_a_timm_folder(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    net = timm.create_model("resnet10t", num_classes=3)
    save_for_hf(net, tmp_path, model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True)
    target = load(str(tmp_path))
    assert isinstance(target, Classifier) and target.classes == ("a", "b", "c")
    assert target.architecture == "timm/resnet10t"


def test_a_model_without_the_named_head(tmp_path: Path) -> None:
    Classifier.tiny().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"head": "classifier"}))
    with pytest.raises(UsageError, match=r"no linear layer 'classifier' as its head"):
        load(str(tmp_path)).select("head")


def test_a_ddpm_folder(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    tiny = DDPM.tiny()
    DDPMPipeline(unet=tiny.modules["unet"], scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    target = load(str(tmp_path))
    assert isinstance(target, DDPM)
    assert target.classes == ("0", "1", "2", "3") and target.null_class == 4
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"id2label": dict(zip("01234", "abcde", strict=True))}))
    target = load(str(tmp_path))
    assert isinstance(target, DDPM) and target.null_class is None
    with pytest.raises(UsageError, match="no null class"):
        target.sample(["a"], [0], steps=1)
    assert target.sample(["a"], [0], steps=1, guidance=1.0).shape == (1, 3, 16, 16)


def test_pictures_of_a_class_do_not_depend_on_the_batch() -> None:
    target = DDPM.tiny()
    together, alone = target.sample(["a", "b", "c"], [5, 6, 7]), target.sample(["b"], [6])
    assert torch.allclose(together[1], alone[0], atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "family"),
    [("canvas", "stable_diffusion"), ("canvas-ddpm", "ddpm"), ("canvas-classifier", "classifier"), ("timm/resnet18", "classifier"),
     ("torchvision/resnet18", "classifier"), ("CompVis/stable-diffusion-v1-4", "stable_diffusion")],
)  # fmt: skip
def test_a_spec_finds_its_family(spec: str, family: str) -> None:
    assert family_of(spec) == family


def test_bf16_keeps_float32_weights() -> None:
    target = Classifier.load("tiny-classifier", dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in target.named().values())
    assert target.logits(torch.rand(1, 3, 16, 16)).dtype == torch.float32
    assert not torch.equal(target.logits(torch.ones(1, 3, 16, 16)), Classifier.tiny().logits(torch.ones(1, 3, 16, 16)))


# --- training -----------------------------------------------------------------------------------------------------
def test_a_trained_model_says_what_it_was_trained_on_and_is_not_trained_twice(tmp_path: Path) -> None:
    made = train("resnet20_cifar:width=4", Data(source="tiny", validation=0.25), out=tmp_path / "m", method=SHORT)
    target = load(str(made))
    assert isinstance(target, Classifier)
    assert target.trained_on["digest"] == target.open(Data(source="tiny", validation=0.25)).digest and not target.warnings
    before = (made / "model.safetensors").stat().st_mtime_ns
    train("resnet20_cifar:width=4", Data(source="tiny", validation=0.25), out=tmp_path / "m", method=SHORT)
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="trained otherwise"):
        train("resnet20_cifar:width=4", Data(source="tiny"), out=tmp_path / "m", method=SHORT)


def test_retraining_never_opens_the_forget_set_and_forgets_a_class() -> None:
    target, task = Classifier.tiny(), tasks.from_data("tiny", "class=b")
    Retrain(epochs=30, batch=16, lr=0.1, schedule="onecycle", cache=False)(target, task, seed=0)
    logits, labels = target.predict(target.open(task.forget))
    assert (logits.argmax(1) == labels).float().mean() == 0
    kept, truth = target.predict(target.open(task.retain))
    assert (kept.argmax(1) == truth).float().mean() > 0.5


def test_a_retrained_model_is_kept_and_its_time_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARNERS_CACHE", str(tmp_path / "cache"))
    task, method = tasks.from_data("tiny", "class=b"), Retrain(epochs=3, batch=16)
    first = run.erase(method, "tiny-classifier", task, out=tmp_path / "a")
    again = run.erase(method, "tiny-classifier", task, out=tmp_path / "b")
    assert (first / "weights.safetensors").read_bytes() == (again / "weights.safetensors").read_bytes()
    assert '"cached_seconds"' in (again / "log.jsonl").read_text() and '"cached_seconds"' not in (first / "log.jsonl").read_text()
    spent = [json.loads((f / "run.json").read_text())["time"]["seconds"] for f in (first, again)]
    assert spent[1] > 0.5 * spent[0]
    other = run.erase(method, "tiny-classifier", task, out=tmp_path / "c", seed=1)
    assert '"cached_seconds"' not in (other / "log.jsonl").read_text()


def test_batch_statistics_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed and resumed equals uninterrupted, bit for bit, running statistics included."""
    monkeypatch.setattr("unlearners.session.CHECKPOINT_SECONDS", 0.0)
    task, method = tasks.from_data("tiny", "class=b"), FT(epochs=3, batch=16)
    whole = run.erase(method, "tiny-classifier", task, out=tmp_path / "whole")
    seen = 0

    def interrupt(what: str, done: int, total: int, row: dict[str, float]) -> None:
        nonlocal seen
        seen += 1
        if seen == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.erase(method, "tiny-classifier", task, out=tmp_path / "cut", progress=interrupt)
    resumed = run.erase(method, "tiny-classifier", task, out=tmp_path / "cut")
    assert (whole / "weights.safetensors").read_bytes() == (resumed / "weights.safetensors").read_bytes()
    assert "running_mean" in (resumed / "run.json").read_text()
    assert json.loads((resumed / "run.json").read_text())["weights"]["outside"] == 0


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    from unlearners.files import locked

    with locked(tmp_path / "x"), pytest.raises(UsageError, match="another process is writing"):
        run.erase(SHORT, "tiny-classifier", tasks.from_data("tiny", "class=b"), out=tmp_path / "x")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UsageError, match="is a file; give another --out"):
            run.erase(SHORT, "tiny-classifier", tasks.from_data("tiny", "class=b"), out=out)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_run_record_names_the_data_and_the_forgotten_rows(tmp_path: Path) -> None:
    folder = run.erase(FT(epochs=1), "tiny-classifier", tasks.from_data("tiny", "class=b"), out=tmp_path / "x")
    record = json.loads((folder / "run.json").read_text())
    assert record["data"]["forget"] == 16 and record["data"]["retain"] == 48 and len(record["data"]["digest"]) == 64
    assert (folder / "forget.txt").read_text().split() == [str(i) for i in range(1, 64, 4)]
