"""CLIP: transformers and open_clip say the same of the same weights, and so does SLUG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from unlearners import clip_maps, targets
from unlearners.errors import RefusedError, UsageError
from unlearners.methods.slug import SLUG
from unlearners.targets.clip import CLIP, MEAN
from unlearners.testing import quick, task_for

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small open_clip model with random weights, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "ViT-tiny-test.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-tiny-test").eval()
    for p in model.parameters():  # fresh ones have zero biases and so small weights that errors would not be seen
        p.data = p.data + 0.2 * torch.randn_like(p) if p.ndim else p.data
    torch.save(model.state_dict(), folder / "model.pt")
    return model, folder / "model.pt"


def test_names_go_both_ways(theirs: tuple[Any, Path]) -> None:
    state = {k: v for k, v in theirs[0].state_dict().items() if not k.endswith("attn_mask")}
    back = clip_maps.to_open_clip(clip_maps.to_transformers(state))
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())


def test_the_embeddings_are_open_clips(theirs: tuple[Any, Path]) -> None:
    model, file = theirs
    target: Any = targets.load(f"{file}@open_clip/ViT-tiny-test")
    assert isinstance(target, CLIP)
    x, texts = torch.rand(3, 3, 32, 32), ["a cup", "a picture of a very red house", ""]
    with torch.no_grad():
        v = model.encode_image((x - target.mean) / target.std, normalize=True)
        t = model.encode_text(open_clip.get_tokenizer("ViT-tiny-test")(texts), normalize=True)
        assert torch.allclose(target.images(x), v, atol=1e-5)
        assert torch.allclose(target.texts(texts), t, atol=1e-5)
    assert float(target.scale.detach()) == pytest.approx(float(model.logit_scale.exp().detach()), rel=1e-5)


def test_slug_chooses_the_same_layer_of_both(theirs: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = theirs
    one: Any = targets.load(f"{file}@open_clip/ViT-tiny-test")
    one.save(tmp_path / "hf")
    found = []
    for spec in (f"{file}@open_clip/ViT-tiny-test", "again"):
        target: Any = CLIP(_shell(tmp_path / "hf"), one.tokenize, one.look, "again", "cpu", torch.float32) if spec == "again" else one
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / spec.rpartition("/")[2]))
        rows: list[dict[str, float]] = []
        quick(SLUG())(target, task_for(target), seed=0, log=rows.append)
        found.append(rows)
    assert found[0][-1]["chosen"] == found[1][-1]["chosen"] and found[0][-1]["alpha"] == found[1][-1]["alpha"]
    for a, b in zip(*found, strict=True):
        assert a.get("importance") == pytest.approx(b.get("importance")) and a.get("front") == b.get("front")


def _shell(folder: Path) -> Any:
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder)


def test_a_saved_clip_is_transformers_own(tmp_path: Path) -> None:
    target = CLIP.tiny(seed=2)
    target.save(tmp_path)
    model = _shell(tmp_path)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        seen = model.vision_model(pixel_values=(x - target.mean) / target.std).pooler_output
        v = torch.nn.functional.normalize(model.visual_projection(seen), dim=-1)
        assert torch.allclose(target.images(x), v, atol=1e-6)


def test_siglip_is_read_and_edited(tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = CLIP.tiny()
    words = {"vocab_size": 200, "max_position_embeddings": 24, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text_config=side | words, vision_config=side | {"image_size": 16, "patch_size": 8}))
    target = CLIP(model, base.tokenize, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "siglip", "cpu", torch.float32)
    task = task_for(target)
    assert torch.isfinite(target.loss(target.open(task.retain).batch(torch.arange(6))))
    rows: list[dict[str, float]] = []
    quick(SLUG())(target, task, seed=0, log=rows.append)
    assert rows[-1]["edited"] == 1


def test_what_open_clip_has_and_transformers_has_not_is_refused(tmp_path: Path, theirs: tuple[Any, Path]) -> None:
    with pytest.raises(RefusedError, match="no place for"):
        clip_maps.to_transformers({"visual.trunk.x": torch.zeros(1)})
    with pytest.raises(RefusedError, match="no plain ViT"):
        clip_maps.config(open_clip.get_model_config("convnext_base"))
    with pytest.raises(UsageError, match="no model 'ViT-B-33'"):
        targets.load("open_clip/ViT-B-33/laion400m_e32")
    with pytest.raises(UsageError, match="names no weights"):
        targets.load("open_clip/ViT-B-32")
    with pytest.raises(RefusedError, match="do not match"):
        targets.load(f"{theirs[1]}@open_clip/ViT-B-32")


def test_the_loss_is_info_nce_also_where_texts_repeat() -> None:
    """An equal text elsewhere in the batch is a negative, as in CLIP's training and the authors' code."""
    target = CLIP.tiny(seed=1)
    x, texts = torch.rand(5, 3, 16, 16), ["a", "b", "a", "a", "c"]
    with torch.no_grad():
        logits = (target.scale * target.images(x) @ target.texts(texts).T).double()
        wanted = sum(-torch.log(torch.exp(m[i, i]) / torch.exp(m[i]).sum()) for m in (logits, logits.T) for i in range(5)) / 10
        assert float(target.loss({"x": x, "text": texts})) == pytest.approx(float(wanted), rel=1e-5)
        alike = float(target.loss({"x": x, "text": ["a"] * 5}))
    assert alike >= 0.5 * torch.log(torch.tensor(5.0)), "five equal texts cannot be told apart"


def _folder(tmp_path: Path, **files: dict[str, Any]) -> Path:
    """canvas-clip without what says how images are normalized, and with ``files`` instead."""
    from unlearners.zoo.canvas import FOLDER

    for path in (FOLDER / "clip").iterdir():
        if "processor" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    for name, held in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(held))
    return tmp_path


def test_an_assumed_normalization_is_said(tmp_path: Path) -> None:
    target: Any = targets.load(str(_folder(tmp_path)))
    (said,) = target.warnings
    assert "no preprocessor_config.json" in said and "0.481, 0.458, 0.408" in said and target.look["mean"] == MEAN
    assert not targets.load("canvas-clip").warnings and not targets.load("tiny-clip").warnings


def test_the_mean_and_std_of_open_clips_file_are_used(tmp_path: Path) -> None:
    given = {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    target: Any = targets.load(str(_folder(tmp_path, open_clip_config=given)))
    assert not target.warnings and target.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert target.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_a_saved_clip_says_how_its_images_are_normalized(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    tiny = CLIP.tiny()
    tiny.save(tmp_path / "a")
    one = CLIP(_shell(tmp_path / "a"), tiny.tokenize, {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}, "own", "cpu", torch.float32)
    one.save(tmp_path)
    found = CLIPImageProcessor.from_pretrained(tmp_path)
    assert list(found.image_mean) == [0.1, 0.2, 0.3] and list(found.image_std) == [0.4, 0.5, 0.6]
    assert found.size["shortest_edge"] == one.side


def test_open_clips_own_statistics_come_with_its_weights(monkeypatch: pytest.MonkeyPatch, theirs: tuple[Any, Path]) -> None:
    target: Any = targets.load(f"{theirs[1]}@open_clip/ViT-tiny-test")
    assert len(target.warnings) == 1 and "no preprocess_cfg" in target.warnings[0]
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)})
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: theirs[0])
    target = targets.load("open_clip/ViT-tiny-test/some")
    assert not target.warnings and target.look["mean"] == (0.1, 0.2, 0.3)
