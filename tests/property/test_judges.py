"""Judges on tiny networks in the files that users have: what they read, what they refuse, what they leave in the record."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unlearners import judges, nets, tasks
from unlearners.base import Probe, Task
from unlearners.errors import RefusedError, UnlearnError, UsageError
from unlearners.judges import _named, _nudenet, classifier, imagenet, style, unlearncanvas
from unlearners.judges.imagenet import Imagenet
from unlearners.judges.nudenet import Nudenet
from unlearners.judges.q16 import Q16
from unlearners.judges.style import Style
from unlearners.judges.unlearncanvas import Unlearncanvas
from unlearners.judges.vlm import Vlm
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.tasks import from_concept

NUDE = Task(name="nudity", kind="nsfw", concepts=("nudity",), judge="nudenet")
CHURCH = Task(name="church", kind="object", concepts=("church",), preserve=("parachute", "house"), judge="imagenet")
GOGH = Task(name="gogh", kind="style", concepts=("Vincent van Gogh",), preserve=("Claude Monet", "photo"), judge="style")


def photographs() -> dict[str, Tensor]:
    """Harmless pictures that libraries bring: a temple, a flower, a portrait of an officer in uniform, and renders of the canvas."""
    from matplotlib import cbook
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from unlearners.zoo.canvas.world import Item, render

    temple, flower = load_sample_images().images
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        officer = np.asarray(Image.open(file).convert("RGB"))
    cup = np.asarray(render(1, Item(object="cup", style="photo")))
    return {
        name: torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() / 255
        for name, x in {"temple": temple, "flower": flower, "officer": officer, "cup": cup}.items()
    }


# --- how a judge is written ---------------------------------------------------------------------------------------
def test_one_string_makes_a_judge_with_its_fields() -> None:
    assert judges.load("nudenet") == Nudenet() and judges.load("nudenet:threshold=0.6,batch=2") == Nudenet(threshold=0.6, batch=2)
    four = judges.load("nudenet:preset=four,threshold=0.45")
    assert isinstance(four, Nudenet) and len(four.classes) == 4 and four.threshold == 0.45
    assert judges.load("style:model=path/to/vit,top=3") == Style(model="path/to/vit", top=3)
    assert judges.load("style:/data/x=1/vit") == Style(model="/data/x=1/vit")
    assert judges.load("style:model=123") == Style(model="123")
    assert judges.load("nudenet:classes=[BELLY_EXPOSED, FEET_EXPOSED]") == Nudenet(classes=("BELLY_EXPOSED", "FEET_EXPOSED"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nudnet", "did you mean nudenet"),
        ("nudenet:preset=fore", "did you mean four"),
        ("nudenet:thresh=0.6", "did you mean threshold"),
        ("nudenet:threshold=high", "must be a finite number"),
        ("nudenet:threshold=[", "cannot be read"),
        ("nudenet:some/model", "unknown key of nudenet 'model'"),
    ],
)
def test_a_wrong_string_is_said_in_one_sentence(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        judges.load(spec)


def test_names_are_compared_without_case_articles_and_underscores() -> None:
    assert _named.plain("A  Garbage_Truck ") == "garbage truck" == _named.plain("garbage-truck")
    assert _named.plain("the sea") == "sea" and _named.plain("another") == "another"


# --- nudenet ------------------------------------------------------------------------------------------------------
def test_nudenet_finds_a_face_and_no_exposed_part_in_harmless_pictures() -> None:
    found = {name: dict(_nudenet.detections(x, 2, "rgb")[0]) for name, x in photographs().items()}
    assert found["officer"].keys() & {"FACE_FEMALE", "FACE_MALE"}, "the detector must see what is there"
    assert not [c for boxes in found.values() for c in boxes if c in _nudenet.PARTS]
    for x in photographs().values():
        assert Nudenet(threshold=0.25).labels(x, NUDE, "nsfw") == [""] and Nudenet().shows(x, NUDE) == [False]


def test_nudenet_can_read_pictures_as_the_package_reads_files(tmp_path: Path) -> None:
    from PIL import Image

    x = photographs()["officer"]
    Image.fromarray((x[0] * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    boxes = _nudenet.detector().detect(str(tmp_path / "x.png"))
    assert _nudenet.detections(x, 1, "package")[0] == [(b["class"], b["score"]) for b in boxes] != []


class Watched:
    """The network, with what reaches it."""

    def __init__(self, network: Any) -> None:
        self.network, self.seen = network, np.zeros(0)

    def run(self, names: Any, given: dict[str, Any]) -> Any:
        (self.seen,) = given.values()
        return self.network.run(names, given)


@pytest.fixture(params=["as it is", "mended"])
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """What reaches the network of the installed package, and of one that swaps red and blue once, as notAI-tech/NudeNet#203 asks for."""
    import nudenet.nudenet as package

    if request.param == "mended":
        plain = package._read_image
        monkeypatch.setattr(package, "_read_image", lambda *a: (plain(*a)[0][:, ::-1], *plain(*a)[1:]))
    found = _nudenet.detector()
    watched = Watched(found.onnx_session)
    monkeypatch.setattr(found, "onnx_session", watched)
    _nudenet.swaps.cache_clear()
    yield watched
    _nudenet.swaps.cache_clear()


def test_red_reaches_nudenets_network_first_whatever_the_package_does(network: Watched) -> None:
    x = torch.tensor([1.0, 0.5, 0.0])[None, :, None, None].expand(2, 3, 64, 64)
    assert Nudenet().labels(x, NUDE, "nsfw") == ["", ""]
    assert network.seen.shape == (2, 3, 320, 320) and network.seen.mean((0, 2, 3)) == pytest.approx([1, 128 / 255, 0], abs=1e-6)
    assert Nudenet().describe()["channels"] == "rgb" and Nudenet().describe()["first_channel"] == "red"
    Nudenet(channels="package").labels(x, NUDE, "nsfw")
    said, first = Nudenet(channels="package").describe(), "blue" if network.seen[0, 2].mean() == 1 else "red"
    assert said["channels"] == "package" and said["first_channel"] == first and said["version"] == 2


def test_channels_decide_what_nudenet_finds() -> None:
    """On the portrait that matplotlib brings."""
    x = photographs()["officer"]
    right, package = (dict(_nudenet.detections(x, 1, c)[0]) for c in ("rgb", "package"))
    assert right.keys() & {"FACE_FEMALE", "FACE_MALE"} and right != package


def test_nudenet_takes_the_highest_score_of_the_classes_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [[("BELLY_EXPOSED", 0.9), ("BELLY_EXPOSED", 0.3), ("FACE_MALE", 0.99)], [("ANUS_EXPOSED", 0.5)], []]
    monkeypatch.setattr(_nudenet, "detections", lambda images, batch, channels: boxes)
    x = torch.zeros(3, 3, 8, 8)
    assert Nudenet().labels(x, NUDE, "nsfw") == ["nudity", "nudity", ""]
    assert Nudenet(threshold=0.5).labels(x, NUDE, "nsfw") == ["nudity", "", ""]
    four: Any = judges.load("nudenet:preset=four,threshold=0.45")
    assert four.labels(x, NUDE, "nsfw") == ["", "nudity", ""]


def test_nudenet_refuses_what_it_cannot_read_and_records_what_it_is() -> None:
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UsageError, match="reads unsafe content and 'church' is of kind object; name another judge"):
        Nudenet().labels(x, CHURCH, "object")
    with pytest.raises(UsageError, match="unknown domain of the nudenet judge 'object'"):
        Nudenet().labels(x, NUDE, "object")
    with pytest.raises(UsageError, match="did you mean BELLY_EXPOSED"):
        Nudenet(classes=("BELLY_EXPOSD",)).labels(x, NUDE, "nsfw")
    said = Nudenet().describe()
    assert said["name"] == "nudenet" and said["package"].startswith("nudenet 3.") and len(said["classes"]) == 9
    assert said["threshold"] == 0.45 and said["floor"] == 0.25


# --- imagenet -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's ResNet-50 with random weights but for the head, which says church (497), then parachute (701), for any picture."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    net = resnet50(weights=None)
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    with torch.no_grad():
        net.fc.bias[497], net.fc.bias[701], net.fc.bias[3] = 3.0, 2.0, 1.0
    path = tmp_path_factory.mktemp("imagenet") / "resnet50.pth"
    torch.save(net.state_dict(), path)
    return path


def test_imagenet_says_classes_in_the_words_of_the_task(resnet: Path) -> None:
    x, judge = torch.rand(2, 3, 40, 30), Imagenet(model=str(resnet), batch=1)
    assert judge.shows(x, CHURCH) == [True, True]
    chute = Task(name="chute", kind="object", concepts=("a Chute",), preserve=("church",))
    assert judge.labels(x, chute, "object") == ["church", "church"]
    assert Imagenet(model=str(resnet), top=2).labels(x, chute, "object") == ["a Chute", "a Chute"]
    tench = Task(name="tench", kind="object", concepts=("tench",))
    assert Imagenet(model=str(resnet), top=1000).shows(x, tench) == [True, True] and judge.shows(x, tench) == [False, False]
    categories = imagenet._entry("IMAGENET1K_V2").meta["categories"]
    assert [categories[i] for i in (497, 569, 701, 0)] == ["church", "garbage truck", "parachute", "tench"]
    assert set(imagenet.SYNONYMS.values()) <= set(range(1000)) and categories[imagenet.SYNONYMS["petrol pump"]] == "gas pump"


def test_imagenet_refuses_other_concepts_and_other_files(resnet: Path, tmp_path: Path) -> None:
    x = torch.rand(1, 3, 32, 32)
    with pytest.raises(UsageError, match="unknown class of the imagenet judge 'garbage trucks'; did you mean garbage truck"):
        Imagenet(model=str(resnet)).shows(x, Task(name="t", kind="object", concepts=("garbage trucks",)))
    with pytest.raises(UsageError, match="unknown domain"):
        Imagenet(model=str(resnet)).labels(x, CHURCH, "style")
    with pytest.raises(UsageError, match="unknown weights of resnet50 'V3'"):
        Imagenet(model=str(resnet), weights="V3").shows(x, CHURCH)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(RefusedError, match="holds no torchvision resnet50"):
        Imagenet(model=str(tmp_path / "other.pth")).shows(x, CHURCH)
    with pytest.raises(RefusedError, match="cannot be read"):
        Imagenet(model=str(tmp_path / "none.pth")).shows(x, CHURCH)


# --- style --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT of transformers with three artists, which says Monet, then van Gogh, for any picture."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    names = {0: "claude-monet", 1: "vincent-van-gogh", 2: "rembrandt"}
    net = ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
            id2label=names, label2id={v: k for k, v in names.items()},
        )
    )  # fmt: skip
    nn.init.zeros_(net.classifier.weight)
    net.classifier.bias.data = torch.tensor([2.0, 1.0, 0.0])
    folder = tmp_path_factory.mktemp("style") / "vit"
    net.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_style_matches_class_names_and_counts_the_top_classes(vit: Path) -> None:
    x = torch.rand(3, 3, 20, 24)
    assert Style(model=str(vit), batch=2).labels(x, GOGH, "style") == ["Claude Monet"] * 3
    assert Style(model=str(vit), top=2).shows(x, GOGH) == [True] * 3
    assert Style(model=str(vit), top=9).labels(x, Task(name="r", kind="style", concepts=("Rembrandt",)), "style") == ["Rembrandt"] * 3
    assert Style(model=str(vit)).describe()["model"] == str(vit)
    with pytest.raises(UsageError, match="did you mean vincent-van-gogh"):
        Style(model=str(vit)).shows(x, Task(name="v", kind="style", concepts=("vincent van gog",)))
    with pytest.raises(UsageError, match="style:model=FOLDER"):
        Style().shows(x, GOGH)
    with pytest.raises(UnlearnError, match="could not be loaded"):
        Style(model=str(vit.parent / "none")).shows(x, GOGH)


# --- how classes are named ----------------------------------------------------------------------------------------
HUB = (
    "tench, Tinca tinca",
    "church, church building",
    "garbage truck, dustcart",
    "parachute, chute",
    "crane",
    "crane",
    "Cardigan, Cardigan Welsh corgi",
    "cardigan",
)
"""as the hub's microsoft/resnet-50 calls its classes"""
ARTISTS = ("claude-monet", "vincent-van-gogh", "pieter-bruegel-the-elder", "pieter-bruegel", "jan-bruegel", "edouard-manet")
"""as the style classifier of UnlearnDiffAtk calls them"""


def saved(folder: Path, names: Sequence[str]) -> tuple[str, Any]:
    """A tiny ResNet with these classes as the hub has it on disk, which says the last one, and how to make it say another."""
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    labels = dict(enumerate(names))
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], id2label=labels, label2id={v: k for k, v in labels.items()}, layer_type="basic"
    )
    net = ResNetForImageClassification(config)

    def say(*order: int) -> None:
        nn.init.zeros_(net.classifier[1].weight)
        net.classifier[1].bias.data = torch.zeros(len(names))
        for rank, i in enumerate(order):
            net.classifier[1].bias.data[i] = 9.0 - rank
        net.save_pretrained(folder)
        style.network.cache_clear()
        classifier.network.cache_clear()

    ConvNextImageProcessor(size={"shortest_edge": 28}, crop_pct=0.875).save_pretrained(folder)
    say(len(names) - 1)
    return str(folder), say


@pytest.mark.parametrize("judge", ["style", "classifier"])
def test_the_object_judge_of_unlearndiffatk_reads_its_own_sets(judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set.csv").write_text("prompt,evaluation_seed\nx,1\n")
    folder, say = saved(tmp_path / "resnet-50", HUB)
    x = torch.rand(2, 3, 40, 50)
    for i, concept in enumerate(("tench", "church", "garbage_truck", "parachute")):
        task = tasks.load(f"unlearndiffatk/{concept}@set.csv,judge={judge}:model={folder}")
        reader = judges.load(task.judge)
        say(i)
        assert reader.shows(x, task) == [True, True] and reader.labels(x, task, "object") == list(task.concepts) * 2
        say(7)
        assert reader.shows(x, task) == [False, False]


def test_the_style_judge_of_unlearndiffatk_reads_its_own_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set.csv").write_text("prompt,evaluation_seed\nx,1\n")
    folder, say = saved(tmp_path / "vit", ARTISTS)
    task = tasks.load(f"unlearndiffatk/vangogh@set.csv,judge=style:model={folder},top=3")
    x = torch.rand(1, 3, 30, 30)
    for order, shown in (((1,), True), ((0, 2, 1), True), ((0, 2, 3, 1), False)):
        say(*order)
        assert judges.load(task.judge).shows(x, task) == [shown]


def named(task: Task, classes: Sequence[str] = (*HUB, *ARTISTS)) -> dict[int, str]:
    return _named.known("style", classes, task, task.axis)


def test_parts_first_names_and_synonyms_name_a_class() -> None:
    def task(*concepts: str, kind: Any = "object", **more: Any) -> Task:
        return Task(name="t", kind=kind, concepts=concepts, **more)

    assert named(task("Tinca tinca")) == {0: "Tinca tinca"} == named(task("TINCA_TINCA")) | {0: "Tinca tinca"}
    assert named(task("tench, Tinca tinca")) == {0: "tench, Tinca tinca"}
    assert named(task("church, meeting house")) == {1: "church, meeting house"}, "a concept may have parts too"
    assert named(task("crane")) == {4: "crane", 5: "crane"}, "two classes of one name are one to the judge"
    assert named(task("cardigan")) == {7: "cardigan"}, "a whole name comes before a part"
    assert named(task("the bin lorry", synonyms=("dustcart",))) == {2: "the bin lorry"}
    for written in ("Van Gogh", "van-gogh", "VAN GOGH", "vincent van gogh", "Gogh", "Vincent_van_Gogh"):
        assert named(task(written, kind="style", preserve=("Monet", "Bruegel", "nobody"))) == {
            9: written, 8: "Monet",
        }  # fmt: skip
    assert named(task("pieter bruegel", kind="style")) == {11: "pieter bruegel"}


def test_a_concept_that_is_no_class_or_could_be_several_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'Bruegel' may be several classes of the style judge .jan-bruegel, pieter-bruegel."):
        named(Task(name="t", kind="style", concepts=("Bruegel",)))
    with pytest.raises(UsageError, match="unknown class of the style judge 'tinca'"):  # no person, so the end of a name is not enough
        named(Task(name="t", kind="object", concepts=("tinca",)))
    with pytest.raises(UsageError, match="unknown class of the style judge 'van gog'; did you mean vincent-van-gogh"):
        named(Task(name="t", kind="style", concepts=("van gog",)))
    with pytest.raises(UsageError, match="unknown class of the style judge 'the bin lorry'"):  # whose synonym is it?
        named(Task(name="t", kind="object", concepts=("church", "the bin lorry"), synonyms=("dustcart",)))


def test_judges_with_heads_of_their_own_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    x = torch.rand(1, 3, 16, 16)
    with pytest.raises(UsageError, match="unknown class of the classifier judge 'e'"):
        judges.load("classifier:tiny-classifier").shows(x, Task(name="t", kind="class", concepts=("e",)))
    with pytest.raises(UsageError, match="unknown style of the canvas judge 'Neon'; did you mean neon"):
        judges.load("canvas").shows(x, Task(name="t", kind="style", concepts=("Neon",)))
    assert judges.load("canvas:trial=true").shows(x, Task(name="t", kind="style", concepts=("Neon",))) == [False]


def test_the_classifier_judge_crops_what_is_not_square() -> None:
    x = torch.rand(2, 3, 20, 40)
    assert torch.equal(classifier.fit(x, 20), x[..., 10:30]) and classifier.fit(x, 16).shape == (2, 3, 16, 16)


# --- unlearncanvas ------------------------------------------------------------------------------------------------
def test_unlearncanvas_reads_both_domains_from_checkpoints_as_they_are_published(tmp_path: Path) -> None:
    files = {}
    for domain, classes, said in (("style", unlearncanvas.STYLES, "Van_Gogh"), ("object", unlearncanvas.OBJECTS, "Sea")):
        torch.manual_seed(0)
        net: Any = nets.build("timm/vit_tiny_patch16_224", len(classes))
        nn.init.zeros_(net.head.weight)
        net.head.bias.data = torch.eye(len(classes))[classes.index(said)]
        files[domain] = tmp_path / f"{domain}.pth"
        torch.save({"model_state_dict": net.state_dict(), "optimizer_state_dict": {"state": {}}, "epoch": 3}, files[domain])
    assert (len(unlearncanvas.STYLES), len(unlearncanvas.OBJECTS)) == (51, 20)
    judge = judges.load(f"unlearncanvas:style={files['style']},object={files['object']},architecture=vit_tiny_patch16_224")
    task = Task(name="g", kind="style", concepts=("van gogh",), probes=(Probe(prompt="x", truth={"style": "van gogh", "object": "sea"}),))
    x = torch.rand(2, 3, 64, 64)
    assert judge.labels(x, task, "style") == ["van gogh"] * 2 and judge.labels(x, task, "object") == ["sea"] * 2
    with pytest.raises(UsageError, match="did you mean Neon_Lines"):
        judge.shows(x, Task(name="n", kind="style", concepts=("neon line",)))
    with pytest.raises(UsageError, match="name its file: unlearncanvas:object=FILE"):
        Unlearncanvas(style=str(files["style"]), architecture="vit_tiny_patch16_224").labels(x, task, "object")
    with pytest.raises(RefusedError, match="with 51 classes"):
        Unlearncanvas(style=str(files["object"]), architecture="vit_tiny_patch16_224").shows(x, task)
    with pytest.raises(UsageError, match="unlearncanvas"):
        judge.shows(x, NUDE)


# --- q16 ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = StableDiffusion.tiny().tokenizers[0]
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = side | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("q16") / "clip"
    config = CLIPConfig(text_config=text, vision_config=side | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    sizes: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer).save_pretrained(folder)
    return folder


def test_q16_compares_with_the_two_prompts_of_a_file(clip: Path, tmp_path: Path) -> None:
    from unlearners.judges._clip import embed_images

    images = torch.rand(4, 3, 16, 16)
    x = embed_images(str(clip), images)
    good, bad = x.mean(0), x[0]
    wanted = ["nudity" if b > g else "" for g, b in zip(x @ (good / good.norm()), x @ bad, strict=True)]
    with (tmp_path / "prompts.p").open("wb") as file:  # as Q16's authors save theirs
        pickle.dump(torch.stack([good, 7 * bad]).half().numpy(), file)
    np.save(tmp_path / "prompts.npy", torch.stack([good, bad]).numpy())
    for name in ("prompts.p", "prompts.npy"):
        judge = Q16(prompts=str(tmp_path / name), model=str(clip), batch=3)
        assert judge.labels(images, NUDE, "nsfw") == wanted and wanted[0] == "nudity"
        assert judge.describe()["variant"] == "soft prompts"
    same = Q16(model=str(clip), good="a cup", bad="a cup")
    assert same.labels(images, NUDE, "nsfw") == [""] * 4 and same.describe()["variant"] == "texts"


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_q16_opens_no_file_that_runs_code(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.p").write_bytes(pickle.dumps(Evil()))
    Path("half.p").write_bytes(pickle.dumps(np.ones((2, 8)))[:40])
    np.save("three.npy", np.ones((3, 8)))
    np.save("wide.npy", np.ones((2, 9)))
    x = torch.rand(1, 3, 16, 16)
    for name, kind, words in (
        ("evil.p", RefusedError, "would run code"),
        ("half.p", RefusedError, "damaged"),
        ("three.npy", RefusedError, r"shape \(3, 8\)"),
        ("wide.npy", UsageError, "width 9"),
        ("none.p", UsageError, "no file"),
    ):
        with pytest.raises(kind, match=words):
            Q16(prompts=name, model=str(clip)).labels(x, NUDE, "nsfw")
    assert not Path("ran").exists()
    with pytest.raises(UsageError, match="kind style"):
        Q16(model=str(clip)).shows(x, GOGH)


# --- vlm ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with a word tokenizer, saved as transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<unk>", "<pad>", "<image>", "Yes", "No", "yes", "no", "USER", "ASSISTANT", ":", "cup", "fish", "Is", "there", "a", "?"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", additional_special_tokens=["<image>"])
    side: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**side, image_size=16, patch_size=8, projection_dim=8)
    text = LlamaConfig(**side, vocab_size=len(words), max_position_embeddings=64)
    torch.manual_seed(0)
    net = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, image_seq_length=4))
    sizes: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**sizes), tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    folder = tmp_path_factory.mktemp("vlm") / "llava"
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_vlm_compares_the_first_tokens_of_yes_and_no(llava: Path) -> None:
    from PIL import Image

    from unlearners.judges import vlm

    images, task = torch.rand(3, 3, 16, 16), Task(name="cup", kind="object", concepts=("cup",), preserve=("fish",))
    net, processor = vlm.network(str(llava))
    question = Vlm().object.format("cup")
    prompt = vlm.asked(processor, question)
    assert prompt == f"USER: <image>\n{question} ASSISTANT:"
    wanted = []
    for x in images:
        picture = Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())
        with torch.no_grad():
            logits = net(**processor(text=prompt, images=picture, return_tensors="pt")).logits[0, -1]
        wanted.append(float(logits[[3, 5]].max() - logits[[4, 6]].max()))
    found = vlm.margins(str(llava), images, question, 2)
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-4) and len(set(wanted)) == 3
    assert Vlm(model=str(llava)).shows(images, task) == [w > 0 for w in wanted]


def test_vlm_labels_the_concept_first_and_agrees_with_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearners.judges import vlm

    table = {"cup": [1.0, -1.0, -1.0], "fish": [2.0, 2.0, -2.0], "boat": [0.5, 3.0, -1.0]}
    asked: list[str] = []

    def margins(model: str, images: Tensor, question: str, batch: int) -> Tensor:
        asked.append(question)
        return torch.tensor(table[question])[images[:, 0, 0, 0].long()]

    monkeypatch.setattr(vlm, "margins", margins)
    task = Task(name="cup", kind="object", concepts=("cup",), preserve=("fish", "boat"))
    judge, x = Vlm(model="m", object="{}"), torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2)
    assert judge.labels(x, task, "object") == ["cup", "boat", ""] and asked == ["cup", "fish", "boat"]
    assert judge.shows(x, task) == [True, False, False] and asked[3:] == ["cup"]
    assert judge.labels(x, task, "style") == ["", "", ""]


def test_vlm_uses_the_chat_template_where_there_is_one(llava: Path) -> None:
    from transformers import AutoProcessor

    from unlearners.judges import vlm

    processor: Any = AutoProcessor.from_pretrained(llava)
    processor.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}<answer>"
    )
    assert vlm.asked(processor, "Is there a cup?") == "<user><image>Is there a cup?<answer>"
    with pytest.raises(UsageError, match="vlm:model=FOLDER"):
        Vlm().shows(torch.rand(1, 3, 8, 8), from_concept("cup", "object"))
    with pytest.raises(UnlearnError, match="could not be loaded"):
        Vlm(model=str(llava / "none")).shows(torch.rand(1, 3, 8, 8), from_concept("cup", "object"))
