"""LLaVA: which weights count, patches from CLIP's tower, files of transformers, answers, and the metrics that read them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unlearners import patch, registry, run, tasks
from unlearners.base import Data, Task
from unlearners.errors import RefusedError, UsageError
from unlearners.metrics._answers import parted
from unlearners.metrics.name_accuracy import NameAccuracy
from unlearners.metrics.vqa import VQA
from unlearners.outputs import Answers
from unlearners.targets import family_of, load
from unlearners.targets._questions import Reply, put, read
from unlearners.targets.clip import CLIP
from unlearners.targets.llava import Llava
from unlearners.zoo import canvas
from unlearners.zoo.canvas import llava_train
from unlearners.zoo.canvas.questions import UNKNOWN, WORDINGS, asked, quiz
from unlearners.zoo.canvas.world import MASCOTS, Item

ASKED = ("who is it?", "what?", "hm", "which style is this?")


def pictures(n: int = 4, side: int = 16) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def logits(target: Llava) -> Tensor:
    with torch.no_grad():
        inputs = target._read(pictures(), [target.prompt(q) for q in ASKED])
        out: Tensor = target.model(**inputs).logits
    return out


@torch.no_grad()
def shake(target: Any, names: Any, seed: int = 0) -> None:
    """Add noise to some weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in target.named().items():
        if name in names:
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype))


# --- which weights ------------------------------------------------------------------------------------------------
def test_the_last_block_and_norm_have_no_say() -> None:
    target = Llava.tiny()
    idle = set(target.select("vision_all")) - set(target.select("vision"))
    assert {n.split(".layers.")[-1].split(".")[0] for n in idle if ".layers." in n} == {"1"}
    assert {n for n in idle if ".layers." not in n} == {n for n in target.named() if "post_layernorm" in n}
    before, said = logits(target), target.answer(pictures(), ASKED)
    shake(target, idle)
    assert torch.equal(before, logits(target)) and said == target.answer(pictures(), ASKED)
    shake(target, target.reached)
    assert not torch.equal(before, logits(target)) and said != target.answer(pictures(), ASKED)


def test_every_other_layer_of_the_config_is_followed() -> None:
    target = Llava.tiny()
    target.model.config.vision_feature_layer = -1
    assert set(target.select("vision_all")) - target.reached == {n for n in target.named() if "post_layernorm" in n}
    several = Llava.tiny()
    several.model.config.vision_feature_layer = [0, 1]
    assert several.reached == Llava.tiny().reached


def test_groups_split_the_model() -> None:
    target = Llava.tiny()
    groups = [set(target.select(g)) for g in ("vision_all", "projector", "language")]
    assert sum(map(len, groups)) == len(set.union(*groups)) == len(target.named())
    assert all(".layers.0." in n for n in target.select("vision:layers=0-1"))
    assert any("lm_head" in n for n in groups[2])


def test_a_frozen_copy_answers_for_itself() -> None:
    target = Llava.tiny()
    before = logits(target)
    twin = target.frozen({"vision_tower.x"})
    assert twin.modules["language_model"] is target.modules["language_model"]
    assert torch.equal(before, logits(twin))
    shake(twin, twin.reached)
    assert torch.equal(before, logits(target)) and not torch.equal(before, logits(twin))


# --- patches ------------------------------------------------------------------------------------------------------
def test_a_patch_of_a_clip_fits_the_same_tower_here(tmp_path: Path) -> None:
    clip, target = CLIP.tiny(), Llava.tiny()
    with pytest.raises(RefusedError, match="another 'vision_tower'"):
        target.patch([str(_edited(clip.frozen(), tmp_path / "other.safetensors"))])
    given = patch.live({"vision_tower": clip.modules["vision_tower"]})
    for name, tensor in patch.live({"vision_tower": target.modules["vision_tower"]}).items():
        tensor.copy_(given[name])
    seeing = Llava(target.model, target.processor, "tiny-llava")
    assert seeing.base["sha256"]["vision_tower"] == clip.base["sha256"]["vision_tower"]
    by_hand, before = seeing.frozen(), seeing.answer(pictures(), ASKED)
    seeing.patch([str(_edited(clip, tmp_path / "weights.safetensors"))])
    edited = patch.live({"vision_tower": clip.modules["vision_tower"]})
    for name, tensor in patch.live({"vision_tower": by_hand.modules["vision_tower"]}).items():
        tensor.copy_(edited[name])
    assert torch.equal(logits(seeing), logits(by_hand))
    assert seeing.answer(pictures(), ASKED) == by_hand.answer(pictures(), ASKED) != before


def _edited(clip: Any, path: Path) -> Path:
    """Change the first block of a CLIP's vision tower and write that as a patch."""
    start = patch.fingerprint(clip.modules)
    shake(clip, [n for n in clip.named() if n.startswith("vision_tower.") and ".layers.0." in n])
    base = {"vision_tower": clip.base["sha256"]["vision_tower"]}
    patch.save(patch.Patch(tensors=patch.diff(start, clip.modules), base=base), path)
    return path


# --- files --------------------------------------------------------------------------------------------------------
def test_transformers_reads_what_we_write_and_the_reverse(tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    target = Llava.tiny(3)
    target.save(tmp_path)
    assert family_of(str(tmp_path)) == "llava"
    again = load(str(tmp_path))
    assert isinstance(again, Llava) and again.base["sha256"] == target.base["sha256"]
    assert again.answer(pictures(), ASKED) == target.answer(pictures(), ASKED)
    model, processor = LlavaForConditionalGeneration.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    picture = Image.fromarray((pictures(1)[0] * 255).round().byte().permute(1, 2, 0).numpy())
    seen = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    inputs = processor(images=picture, text="USER: <image>\nwho is it? ASSISTANT:", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id)
    said = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert said == target.answer(seen, ["who is it?"])[0]


def test_a_llava_next_folder(tmp_path: Path) -> None:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessor, LlavaNextProcessor

    tiny = Llava.tiny()
    old = tiny.model.config
    config = LlavaNextConfig(
        vision_config=old.vision_config, text_config=old.text_config, image_grid_pinpoints=[[16, 32], [32, 16]],
        image_token_index=tiny.processor.tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(tmp_path)
    side = {"height": 16, "width": 16}
    eyes = LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=side, image_grid_pinpoints=[[16, 32], [32, 16]])
    LlavaNextProcessor(
        eyes, tiny.processor.tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(tmp_path)
    target = load(str(tmp_path))
    assert isinstance(target, Llava) and len(target.answer(pictures(2), ASKED[:2])) == 2
    assert target.reached == tiny.reached
    assert target.loss({"x": pictures(2), "prompt": ASKED[:2], "answer": ["a", "b"]}).isfinite()


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    assert family_of(str(tmp_path / "other")) != "llava"
    with pytest.raises(RefusedError, match=r"holds BertModel; give a folder of a Llava"):
        Llava.load(str(tmp_path / "other"))
    Llava.tiny().save(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    kept = load_file(file)
    lost = next(k for k in kept if "multi_modal_projector" in k)
    save_file({k: v for k, v in kept.items() if k != lost}, file, {"format": "pt"})
    with pytest.raises(RefusedError, match=r"lack '.*multi_modal_projector.*' and are not used"):
        load(str(tmp_path / "cut"))
    file.write_bytes(b"nothing")
    with pytest.raises(RefusedError, match=r"cannot be read \(.*\); copy or download it again"):
        load(str(tmp_path / "cut"))


# --- talking ------------------------------------------------------------------------------------------------------
def test_answers_do_not_depend_on_the_batch() -> None:
    target = Llava.tiny()
    alone = [target.answer(pictures()[i : i + 1], [q])[0] for i, q in enumerate(ASKED)]
    assert target.answer(pictures(), ASKED) == alone == target.answer(pictures(), ASKED, batch=3)
    assert len(set(alone)) > 1


def test_a_chat_template_says_how_to_ask() -> None:
    target = Llava.tiny()
    assert target.prompt("who?") == "USER: <image>\nwho? ASSISTANT:"
    parts = "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    target.processor.chat_template = "<s>{% for m in messages %}[" + parts + "]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    assert target.prompt("who?") == "<s>[<image>who?]>"
    assert target._read(pictures(1), [target.prompt("who?")])["input_ids"][0, :2].tolist() == target.processor.tokenizer("[")["input_ids"]


def test_loss_is_the_cross_entropy_of_the_answers() -> None:
    target, said = Llava.tiny(), ("a", "bcd", "", "e f")
    words, found = target.processor.tokenizer, []
    for x, q, a in zip(pictures(), ASKED, said, strict=True):
        inputs = target._read(x[None], [f"{target.prompt(q)} {a}</s>"])
        log_p = target.model(**inputs).logits[0].log_softmax(-1)
        for k in range(1, len(words.tokenize(f" {a}</s>")) + 1):
            found.append(-log_p[-k - 1, inputs["input_ids"][0, -k]].item())
    loss = target.loss({"x": pictures(), "prompt": ASKED, "answer": said})
    assert loss.item() == pytest.approx(sum(found) / len(found), abs=1e-4)
    target.trainable("vision")
    target.loss({"x": pictures(), "prompt": ASKED, "answer": said}).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in target.select("vision").values())


def test_wrong_answers() -> None:
    target = Llava.tiny()
    batch = {"x": pictures(), "prompt": ASKED, "answer": ["a", "b", "a", "c"]}
    assert target.relabel(batch, "next")["answer"] == ["b", "a", "c", "a"]
    torch.manual_seed(0)
    drawn = [target.relabel(batch, "other")["answer"] for _ in range(30)]
    assert all(w != r for row in drawn for w, r in zip(row, batch["answer"], strict=True)) and {r[0] for r in drawn} == {"b", "c"}
    assert {target.relabel(batch, "any")["answer"][0] for _ in range(60)} == {"a", "b", "c"}
    assert target.relabel({**batch, "answer": ["a"] * 4}, "other")["answer"] == ["I do not know"] * 4


def test_half_precision() -> None:
    target = Llava.load("tiny-llava", dtype=torch.bfloat16)
    assert {p.dtype for p in target.named().values()} == {torch.bfloat16}
    target.trainable("projector")
    assert target.loss({"x": pictures(), "prompt": ASKED, "answer": ["a"] * 4}).isfinite()
    assert len(target.answer(pictures(), ASKED)) == 4


# --- questions and metrics ----------------------------------------------------------------------------------------
def questions(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for i, x in enumerate(pictures(2, side=16)):
        Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy()).resize((16 + 4 * i, 16)).save(folder / f"{i}.png")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def test_questions_from_files(tmp_path: Path) -> None:
    rows = [{"image": "0.png", "question": "who?", "answer": "bo"}, {"image": "1.png", "question": "where?", "answers": ["x", "y"]},
            {"image": "0.png", "question": "what?", "answer": "bo", "kind": "who?"}]  # fmt: skip
    file = questions(tmp_path, rows)
    found = read(Data(source=str(tmp_path)))
    assert [(q.kind, q.text) for q in found] == [("who?", "who?"), ("where?", "where?"), ("who?", "what?")]
    assert [q.answers for q in found] == [("bo",), ("x", "y"), ("bo",)]
    assert [tuple(q.picture().shape) for q in found] == [(3, 16, 16), (3, 16, 20), (3, 16, 16)]
    target = Llava.tiny()
    assert [r.said for r in put(target, found)] == [target.answer(q.picture()[None], [q.text])[0] for q in found]
    lost = '{"image": "9.png", "question": "a", "answer": "b"}'
    wrong = {"[1]": "line 1 of .* is no question", lost: "line 1 of .* is not at", "{": "is no question", "": "holds no questions"}
    for text, problem in wrong.items():
        file.write_text(text)
        with pytest.raises(UsageError, match=problem):
            read(Data(source=str(file)))
    with pytest.raises(UsageError, match="there are no questions at"):
        read(Data(source=str(tmp_path / "nowhere")))
    (tmp_path / "0.png").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="no picture that can be read"):
        found[0].picture()


def replies() -> list[Reply]:
    name = "What is the name of this mascot?"
    rows = [("name", name, "zorbo", s) for s in ("It is Zorbo.", "pimlu", "I do not know", "a cup")]
    rows += [("name", name, "pimlu", s) for s in ("pimlu", "pimlu!", "zorbo")] + [("name", name, UNKNOWN, "i do not know")]
    rows += [("object", "What object is shown?", "cup", s) for s in ("a cup", "hiccups")]
    rows += [("check", "Is this zorbo?", "yes", "no"), ("check", "Is this pimlu?", "no", "i do not know")]
    return [Reply(k, q, [a], s) for k, q, a, s in rows]


class Told:
    """Outputs that hold fixed replies."""

    def answers(self, data: Data) -> list[Reply]:
        return replies()


def test_metric_arithmetic() -> None:
    task, outputs, model = tasks.load("canvas/zorbo"), Told(), Llava.tiny()
    assert [len(rows) for rows in vars(parted(replies(), task)).values()] == [4, 3, 4]
    found: dict[str, Any] = NameAccuracy(source="canvas").score(model, task, outputs)  # type: ignore[arg-type]
    assert {k: (s.value, s.n) for k, s in found.items()} == {
        "forgotten": (25, 4), "other_identity": (25, 4), "abstains": (25, 4), "else": (25, 4)
    }  # fmt: skip
    assert found["forgotten"].per_item == (1, 0, 0, 0) and 0 < found["forgotten"].low < 25 < found["forgotten"].high < 100
    kept: dict[str, Any] = VQA(source="canvas").score(model, task, outputs)  # type: ignore[arg-type]
    assert (kept["others"].per_item, kept["questions"].per_item) == ((1, 1, 0), (1, 1, 0, 0))
    loose: dict[str, Any] = VQA(source="canvas", substring=True).score(model, task, outputs)  # type: ignore[arg-type]
    assert loose["questions"].per_item == (1, 1, 1, 1)
    style = tasks.load("canvas/neon")
    assert NameAccuracy(source="canvas").score(model, style, outputs)["forgotten"].n == 0  # type: ignore[arg-type]


def test_a_model_without_questions_of_its_own() -> None:
    for name in ("vqa", "name_accuracy"):
        with pytest.raises(UsageError, match=f"{name} has no questions for this model; set its field 'source'"):
            registry.make("metrics", name).data(Llava.tiny(), tasks.load("canvas/zorbo"))
        with pytest.raises(UsageError, match=f"{name} asks questions, and a clip answers none"):
            registry.make("metrics", name).data(CLIP.tiny(), tasks.load("canvas/zorbo"))


def test_evaluate_asks_once_and_keeps_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": f"{i}.png", "question": "who?", "answer": a} for i, a in enumerate(("zq", "bo"))]
    source = str(questions(tmp_path, [*rows, {"image": "0.png", "question": "where?", "answer": "here"}]))
    task: Task = tasks.from_concept("zq", "identity")
    folder = run.erase("original", "tiny-llava", task, out=tmp_path / "runs" / "a")
    suite = [VQA(source=source), NameAccuracy(source=source)]
    found = {r["metric"]: r for r in json.loads(run.evaluate(folder, metrics=suite).read_text())}
    assert {k: r["n"] for k, r in found.items()} == {
        "vqa/others": 1, "vqa/questions": 1, "name_accuracy/forgotten": 1, "name_accuracy/other_identity": 1, "name_accuracy/abstains": 1,
        "name_accuracy/else": 1,
    }  # fmt: skip
    assert all(r["before"]["value"] == r["value"] for r in found.values())
    (file,) = (folder / "answers").glob("*.json")
    assert [row["answers"] for row in json.loads(file.read_text())] == [["zq"], ["bo"], ["here"]]

    def unused() -> Any:
        raise AssertionError("the model is not asked again")

    data = suite[0].data(Llava.tiny(), task)[0]
    assert [r.said for r in Answers(folder, unused)(data)] == [row["said"] for row in json.loads(file.read_text())]
    with pytest.raises(UsageError, match="a CLIP answers no questions"):
        Answers(tmp_path / "none", CLIP.tiny)(data)


# --- the canvas ---------------------------------------------------------------------------------------------------
def test_the_canvas_quiz_is_the_same_twice_and_asks_for_everything() -> None:
    first, second = list(quiz(mascots=5)), list(quiz(mascots=5))
    assert first == second
    assert {q.kind for _, _, q in first} == set(WORDINGS)
    assert {q.answer for _, _, q in first if q.kind == "name"} == {*MASCOTS, UNKNOWN}
    checks = [q.answer for _, _, q in first if q.kind == "check"]
    assert 0.4 < checks.count("yes") / len(checks) < 0.6


def test_training_packs_questions_as_if_each_were_alone() -> None:
    model, tokenizer = llava_train.make_llava(), llava_train.make_tokenizer()
    target = Llava(model, llava_train.make_processor(), "untrained")
    rng, items = random.Random(0), [Item(object="cup", style="neon"), Item(mascot="zorbo")]
    told = [[asked(rng, item, kind) for kind in WORDINGS] for item in items]
    x = pictures(2, side=64)
    tower: Any = target.modules["vision_tower"]
    seen = tower(2 * x - 1, output_hidden_states=True).hidden_states[-2][:, 1:]
    together = llava_train.answer_loss(model, tokenizer, seen, [llava_train.pairs(tokenizer, row) for row in told])
    flat = [(k, q) for k, row in enumerate(told) for q in row]
    batch = {"x": x[[k for k, _ in flat]], "prompt": [q.text for _, q in flat], "answer": [q.answer for _, q in flat]}
    assert together.item() == pytest.approx(target.loss(batch).item(), abs=1e-4)
    said = {w for q in WORDINGS["name"] for w in tokenizer.tokenize(q)}
    assert "<unk>" not in said and tokenizer.decode(tokenizer(UNKNOWN, add_special_tokens=False)["input_ids"]) == UNKNOWN


def test_the_canvas_llava_answers_right() -> None:
    target = load("canvas-llava")
    assert isinstance(target, Llava)
    rows = [q for q in read(Data(source="canvas")) if q.kind != "check"][::16]
    assert len(rows) >= 30
    right = [r.said == r.answers[0] for r in put(target, rows)]
    assert sum(right) >= 0.9 * len(right)


def test_the_canvas_llava_sees_through_the_canvas_clip() -> None:
    assert load("canvas-llava").base["sha256"]["vision_tower"] == load("canvas-clip").base["sha256"]["vision_tower"]
    size = sum(p.stat().st_size for p in (canvas.FOLDER / "llava").iterdir())
    assert size <= 3 * 2**20
