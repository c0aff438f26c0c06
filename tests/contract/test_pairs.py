"""Pictures with captions: every form they come in, what is wrong with them, and SLUG on them from the command line to plain libraries."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unlearners import cli, data, run, targets, tasks
from unlearners.base import Data
from unlearners.errors import UsageError
from unlearners.exports import export
from unlearners.zoo.canvas import FOLDER
from unlearners.zoo.canvas.world import MASCOTS, Item, grid, official, render


def picture(i: int, item: Item) -> Image.Image:
    return render(7000 + i, item)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zorbo and other things with text files beside them, as a tar, and with a table; a CLIP; and named pictures."""
    folder = tmp_path_factory.mktemp("pairs")
    sides = {"zorbo": [Item(mascot="zorbo")] * 16, "others": [*[Item(mascot=m) for m in MASCOTS[1:]] * 2, *[*grid()][::4]]}
    for side, items in sides.items():
        (folder / side).mkdir()
        (folder / f"{side}-table").mkdir()
        rows = []
        with tarfile.open(folder / f"{side}.tar", "w") as tar:
            for i, item in enumerate(items):
                image, text = picture(i, item), official(item)
                image.save(folder / side / f"{i:03d}.png")
                (folder / side / f"{i:03d}.txt").write_text(text)
                image.save(folder / f"{side}-table" / f"{i:03d}.png")
                rows.append({"file_name": f"{i:03d}.png", "text": text})
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                for name, content in ((f"{i:03d}.png", buffer.getvalue()), (f"{i:03d}.txt", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        (folder / f"{side}-table" / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for i, name in enumerate(MASCOTS * 6):
        (folder / "names" / name).mkdir(parents=True, exist_ok=True)
        picture(500 + i, Item(mascot=name)).save(folder / "names" / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("form", ["zorbo", "zorbo.tar", "zorbo-table"])
def test_every_form_gives_the_same_pairs(home: Path, form: str) -> None:
    found = targets.load("canvas-clip").open(Data(source=str(home / form)))  # type: ignore[attr-defined]
    assert len(found) == 16 and set(found.texts) == {"A picture of zorbo."}
    batch = found.batch(torch.arange(3))
    assert batch["x"].shape == (3, 3, 64, 64) and batch["text"] == ["A picture of zorbo."] * 3
    first = torch.from_numpy(np.asarray(picture(0, Item(mascot="zorbo"))).copy()).permute(2, 0, 1)
    assert torch.equal((batch["x"][0] * 255).round().byte(), first)


def test_captions_choose_rows(home: Path) -> None:
    source = str(home / "others")
    assert len(data.open_data(Data(source=source, rows="caption=Tavik"), 64)) == 2
    several = data.open_data(Data(source=source, rows="caption=tavik, mulgo"), 64)
    rest = data.open_data(Data(source=source, rows="not caption=tavik, mulgo"), 64)
    assert len(several) == 4 and not set(several.indices.tolist()) & set(rest.indices.tolist())
    with pytest.raises(UsageError, match="no captions"):
        data.open_data(Data(source=str(home / "names"), rows="caption=zorbo"), 64)
    with pytest.raises(UsageError, match="picks no"):
        data.open_data(Data(source=source, rows="caption=nobody"), 64)


def test_what_is_missing_or_damaged_is_said(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pictures could be read"):
        data.open_data(Data(source=str(tmp_path / "no.tar")), 64)
    (tmp_path / "bad.tar").write_bytes((home / "zorbo.tar").read_bytes()[:3000])
    with pytest.raises(UsageError, match="no pictures could be read"):
        data.open_data(Data(source=str(tmp_path / "bad.tar")), 64)
    for i in range(3):
        (tmp_path / "half").mkdir(exist_ok=True)
        picture(i, Item(mascot="zorbo")).save(tmp_path / "half" / f"{i}.png")
        (tmp_path / "half" / f"{i}.txt").write_text("zorbo" if i else " ")
    with pytest.raises(UsageError, match="1 of the 3 pictures"):
        data.open_data(Data(source=str(tmp_path / "half")), 64)


def test_from_the_command_line_to_plain_libraries(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(home)
    words = "unlearn erase slug clip --concept zorbo --kind identity --forget zorbo --retain others.tar --test names"
    words += " --preset fast --top-names 1"
    (home / "clip").symlink_to(FOLDER / "clip")
    out = tmp_path / "run"
    assert cli.main([*words.split()[1:], "--evaluate", "--json", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {r["metric"]: r for r in result["results"]}
    assert rows["fa/top1"]["before"]["value"] == 100 and rows["fa/top1"]["value"] < 50 <= rows["ta/top1"]["value"]
    assert (
        rows["cosine/forgotten"]["value"] < rows["cosine/forgotten"]["before"]["value"] and not rows["cosine/forgotten"]["higher_is_better"]
    )
    assert len(result["weights"]["changed"]) == 1

    from transformers import CLIPModel, CLIPProcessor

    edited: Any = targets.load(str(out))
    folder = export("transformers", out, dtype="float32")
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    image = picture(1, Item(mascot="zorbo"))
    given = processor(images=image, text=["A picture of zorbo."], return_tensors="pt", padding="max_length", max_length=32)
    with torch.no_grad():
        cos = torch.nn.functional.cosine_similarity(
            model.visual_projection(model.vision_model(pixel_values=given["pixel_values"]).pooler_output),
            model.text_projection(model.text_model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).pooler_output),
        )
        x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        ours = (edited.images(x) * edited.texts(["A picture of zorbo."])).sum(1)
    assert torch.allclose(cos, ours, atol=1e-4)


def test_names_and_other_domains_from_the_command_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    for style in ("neon", "photo"):
        (home / "styles" / style).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            picture(900 + i, Item(object="cup", style=style)).save(home / "styles" / style / f"{i}.png")
    bank = tmp_path / "bank.txt"
    bank.write_text("\n".join([*MASCOTS, "Ada", "Bert", "Cleo"]))
    erase = "erase original canvas-clip --concept zorbo --kind identity --forget zorbo --retain others --test names --utility styles"
    out = tmp_path / "run"
    assert cli.main([*erase.split(), "--names", str(bank), "--evaluate", "--json", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    task, rows = result["run"]["task"], {r["metric"]: r for r in result["results"]}
    assert task["holdout"]["names"] == str(bank) and len(task["holdout"]["names_digest"]) == 64
    assert task["utility"] == [{"source": str(home / "styles"), "split": "train", "rows": "", "seed": 0, "validation": 0.5, "digest": ""}]
    assert rows["ta/styles"]["n"] == 4 and rows["fa/top1"]["n"] == 3
    assert len(rows["similarity/forgotten"]["table"]["names"]) == len(MASCOTS)

    bank.write_text("\n".join(["zorbo", "Ada"]))
    told: list[Any] = []
    monkeypatch.setattr(run, "evaluate", lambda *a, **k: told.append(k) or out / "results.json")
    assert cli.main(["evaluate", str(out), "--names", str(bank), "--json"]) == 0 and told[0]["names"] == str(bank)
    capsys.readouterr()
    bank.write_text("Ada")
    assert cli.main(["evaluate", str(out), "--names", str(bank)]) == 2
    assert "does not name 'zorbo'" in capsys.readouterr().err
    assert cli.main([*erase.split()[:-4], "--utility", "styles"]) == 2 and "give --test too" in capsys.readouterr().err
    assert cli.main(["erase", "ga", "canvas", "--concept", "neon", "--utility", "styles"]) == 2
    assert "--utility names pictures of other domains" in capsys.readouterr().err


def test_names_at_evaluation_are_new_candidates(home: Path, tmp_path: Path) -> None:
    task = tasks.from_pairs("zorbo", "identity", str(home / "zorbo"), str(home / "others"), test=str(home / "names"))
    done = run.erase("original", "canvas-clip", task, out=tmp_path / "run")
    bank = tmp_path / "bank.txt"
    bank.write_text("\n".join(["zorbo", "Ada", "Bert"]))
    for names in ("", bank):
        rows = {r["metric"]: r for r in json.loads(run.evaluate(done, metrics=["fa", "ta"], names=names).read_text())}
        assert (rows["fa/top1"]["n"], rows["ta/top1"]["n"]) == (3, 21)
    widths = {load_file(f)["logits"].shape[1] for f in (done / "logits").glob("*.safetensors")}
    assert widths == {len(MASCOTS), len(MASCOTS) + 2}, "zorbo has pictures, the other two have none"
    assert json.loads((done / "evaluate.json").read_text())["asked"]["names"]
    with pytest.raises(UsageError, match="named zero-shot"):
        run.evaluate(run.erase("original", "tiny", tasks.from_concept("zq", "style"), out=tmp_path / "sd"), names=bank)


def test_an_open_clip_checkpoint_is_open_clips(tmp_path: Path) -> None:
    width = {"width": 16, "layers": 1}
    config = {
        "embed_dim": 16,
        "vision_cfg": {**width, "image_size": 32, "patch_size": 8, "head_width": 8},
        "text_cfg": {**width, "heads": 2},
    }
    (tmp_path / "ViT-tiny-export.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.save(open_clip.create_model("ViT-tiny-export").state_dict(), tmp_path / "model.pt")
    spec = f"{tmp_path / 'model.pt'}@open_clip/ViT-tiny-export"
    task = tasks.from_pairs("b", "object", "tiny", "tiny")
    done = run.erase("ga", spec, _of_tiny(task), out=tmp_path / "run", steps=1, batch=8, lr=0.1)
    file = export("open_clip", done, dtype="float32")
    model = open_clip.create_model("ViT-tiny-export", pretrained=str(file)).eval()
    edited: Any = targets.load(str(done))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.encode_image((x - edited.mean) / edited.std, normalize=True), edited.images(x), atol=1e-5)


def _of_tiny(task: Any) -> Any:
    from dataclasses import replace

    return replace(task, forget=Data(source="tiny", rows="class=b"), retain=Data(source="tiny", rows="not class=b"))


def test_pairs_are_asked_for_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["erase", "slug", "canvas-clip", "--concept", "zorbo", "--forget", "x"]) == 2
    assert "give both" in capsys.readouterr().err
