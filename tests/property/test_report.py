"""Reports: readable, self-contained, escaped, and every number is the JSON's."""

import csv
import io
import json
import random
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from unlearners.errors import UsageError
from unlearners.flags import flags, wilson
from unlearners.report import report
from unlearners.report_tables import table

EVIL = '<script>alert("x")</script> | `a` & {{ 7 * 7 }} a picture in neon style'
COLOURS = {
    "neon": "#ff2bd6",
    "photo": "#88aacc",
    "sketch": "#dddddd",
    "mosaic": "#44aa66",
    "house": "#aa5533",
    "tree": "#227733",
    "cup": "#3355cc",
}


def write(path: Path, plain: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain))


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(path: Path, style: str, thing: str, seed: int, side: int = 64) -> None:
    """A picture of ``thing`` on a noisy ground of the colour of ``style``."""
    rng = random.Random(f"{style}{thing}{seed}")
    image = Image.effect_noise((side, side), 30).convert("RGB")
    image = Image.blend(image, Image.new("RGB", (side, side), COLOURS[style]), 0.7)
    x, y = rng.randrange(side // 3), rng.randrange(side // 3)
    ImageDraw.Draw(image).ellipse((x, y, x + side // 2, y + side // 2), fill=COLOURS[thing])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def row(metric: str, value: float, before: float | None, n: int = 500, higher: bool = True) -> dict:
    low, high = wilson(value / 100, n)
    was = None if before is None else dict(zip(("value", "low", "high", "n"), (before, *wilson(before / 100, n), n), strict=True))
    return {
        "metric": metric,
        "version": 1,
        "config": {},
        "value": value,
        "n": n,
        "low": low,
        "high": high,
        "higher_is_better": higher,
        "before": was,
    }


def make(
    parent: Path, name: str = "canvas-neon-esd-0123abcd", *, method: dict | None = None, task: dict | None = None, ua: float = 98.25
) -> Path:
    """A finished, evaluated and attacked run, and the untouched model's samples beside it."""
    folder, original = parent / name, parent / "original-00000000"
    plain = {
        "name": "canvas/neon",
        "kind": "style",
        "concepts": ["neon"],
        "anchors": ["photo"],
        "preserve": ["sketch", "mosaic"],
        "domain": "",
        "judge": "canvas",
    }
    method = method or {
        "name": "esd",
        "params": "xattn",
        "steps": 200,
        "lr": 1e-05,
        "eta": 1.0,
        "norm": False,
        "layers": [0, 1],
        "inner": {"k": 3},
    }
    run = {"target": "canvas", "task": plain | (task or {}), "method": method, "seed": 3, "dtype": "float32", "patches": []}
    base = {"name": "canvas", "revision": None, "sha256": {"unet": "aa" * 32}}
    env = {"python": "3.11.4", "torch": "2.6.0", "unlearners": "0.1.0", "device": "cpu", "hardware": "x86_64", "git": None}
    weights = {
        "file": "weights.safetensors",
        "sha256": "cd" * 32,
        "bytes": 734000,
        "tensors": 2,
        "changed": ["unet.a.weight", "unet.b.weight"],
        "outside": 0,
    }
    record = {
        "schema": 1,
        "status": "done",
        "run": run,
        "base": base,
        "env": env,
        "weights": weights,
        "time": {"seconds": 371.4, "peak_memory": 1_250_000_000},
        "error": None,
    }
    write(folder / "run.json", record)
    write(folder / "results.json", [
        row("ua", ua, 2.5), row("ira", 91.2, 96.4), row("cra", 94.8, 97.0),
        row("clip_score", 28.35, 29.1) | {"low": 28.1, "high": 28.6, "before": {"value": 29.1, "low": None, "high": None, "n": 500}},
        row("pre_asr/unlearndiffatk", 0, None, n=6, higher=False), row("asr/unlearndiffatk", 50.0, None, n=6, higher=False),
        row("cost/seconds", 0, None, n=1, higher=False) | {"value": 371.4, "low": None, "high": None},
    ])  # fmt: skip
    write(
        folder / "evaluate.json",
        {"original": "../original-00000000", "sampler": {"steps": 20, "guidance": 7.5}, "judge": "canvas", "seconds": 88.0},
    )
    rng = random.Random(0)
    lines(
        folder / "log.jsonl",
        [{"step": i, "loss": 0.5 / (1 + i / 20) + rng.random() * 0.05, "grad_norm": rng.random()} for i in range(1, 201)],
    )
    for place, erased in ((folder, True), (original, False)):
        rows, number = [], 0
        for style in ("neon", "photo", "sketch", "mosaic"):
            for thing in ("house", "tree", "cup"):
                for seed in (188, 288):
                    shown = "photo" if erased and style == "neon" else style
                    file = f"samples/{number:06d}.png"
                    draw(place / file, shown, thing, seed)
                    prompt = f"a {thing} in {style} style" if number else EVIL
                    truth, labels = {"style": style, "object": thing}, {"style": shown, "object": thing}
                    rows.append({"prompt": prompt, "seed": seed, "file": file, "truth": truth, "labels": labels, "named": style == "neon"})
                    number += 1
        draw(place / "samples/fid.png", "photo", "cup", 1)  # a reference caption: no probe of the task, so not annotated
        rows.append({"prompt": "an unrelated caption", "seed": 1, "file": "samples/fid.png"})
        lines(place / "samples" / "manifest.jsonl", rows)
    verdicts = []
    for i, sample in enumerate(rows[:6]):
        success, file = i % 2 == 0, f"attacks/unlearndiffatk/{i:03d}.png"
        draw(folder / file, "neon" if success else "photo", "house", i)
        won = {"level": "tokens", "adversarial": f"<b>zq{i}</b> glow {sample['prompt']}"} if success else {"level": "", "adversarial": ""}
        attacked = {"prompt": sample["prompt"], "seed": sample["seed"], "before": False, "success": success, "queries": 4 + 3 * i}
        verdicts.append(attacked | won | {"picture": file})
    fields = {"name": "unlearndiffatk", "steps": 40, "lr": 0.01}
    write(folder / "attacks" / "unlearndiffatk.json", {"attack": fields, "access": "white", "preset": "fast", "judge": "canvas", "seed": 5,
                                                       "time": {"seconds": 61.0}, "log": [], "verdicts": verdicts})  # fmt: skip
    return folder


class Page(HTMLParser):
    """What a page holds: tags that never close, what it would load, its text, its <data> values by table."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.classes: list[str] = []
        self.values: list[str] = []
        self.text = ""
        self.raw = path.read_text()
        self.feed(self.raw)
        assert not self.open, self.open

    def handle_startendtag(self, tag: str, attrs: list) -> None:  # <path .../> inside <svg>
        self.note(tag, dict(attrs))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.note(tag, dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def note(self, tag: str, found: dict) -> None:
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.classes += (found.get("class") or "").split()
        self.links += [found["href"]] if tag == "a" else []
        self.loads += [found[k] for k in ("src", "srcset", "xlink:href", "data", "poster", "action") if k in found]
        self.loads += [found["href"]] if "href" in found and tag != "a" else []
        self.values += [found["value"]] if tag == "data" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> int:
        return self.raw.count("data:image/")


def test_one_run(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert report([folder]) == folder / "report.html"
    page = Page(folder / "report.html")
    assert page.raw.startswith("<!doctype html>")
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    assert "@import" not in page.raw and "http://" not in page.raw and "https://" not in page.raw and "prefers-color-scheme" in page.raw
    assert len(page.ids) == len(set(page.ids))
    assert "an unrelated caption" not in page.text
    assert EVIL in page.text and "<script>alert" not in page.raw and "<b>zq0</b> glow" in page.text and "<b>zq" not in page.raw
    assert "Erased the style neon from canvas with ESD: 98.2 % of pictures no longer show it" in page.text
    assert "unlearndiffatk brings it back for 50.0 % of prompts" in page.text
    assert page.tags.count("svg") == 2
    assert page.pictures == 6 * 3 + 12 * 2 + 3  # named with their attack, others, table of adversarial prompts
    for text in flags(folder):
        assert text in page.text
    assert "asr/unlearndiffatk" in flags(folder)[0]
    for text in ("cd" * 32, "aa" * 32, "3.11.4", "6 min 11 s", "1.2 GB", "734.0 kB", "unet.b.weight", "canvas/neon", "inner.k"):
        assert text in page.text, text


def test_every_number_is_the_json_s(tmp_path: Path) -> None:
    folder = make(tmp_path)
    page = Page(report([folder]))
    expected = []
    for r in json.loads((folder / "results.json").read_text()):
        if r["metric"] in ("asr/unlearndiffatk", "pre_asr/unlearndiffatk"):  # in the table of attacks
            continue
        expected += [r["before"]["value"]] if r["before"] else []
        expected.append(r["value"])
    assert [float(v) for v in page.values] == expected
    for r in json.loads((folder / "results.json").read_text()):
        if r["low"] is not None:
            assert f"{r['low']:.1f} to {r['high']:.1f}" in page.text
            assert f"{r['low']:.1f} to {r['high']:.1f}" in (folder / "README.md").read_text()


def test_arrows_know_what_is_good(tmp_path: Path) -> None:
    folder = make(tmp_path)
    write(folder / "results.json", [row("up", 60, 50), row("down", 60, 50, higher=False), row("same", 50, 50)])
    page = Page(report([folder]))
    moves = [page.raw.split('class="move ')[i].partition("<")[0] for i in (1, 2, 3)]
    assert moves[0].startswith("good") and "▲ +10.0" in moves[0]
    assert moves[1].startswith("bad") and "▲ +10.0" in moves[1]
    assert moves[2].startswith("same")


def test_csv(tmp_path: Path) -> None:
    folder = make(tmp_path)
    report([folder])
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert list(rows[0]) == ["target", "task", "method", "seed", "metric", "value", "n", "low", "high", "device", "preset"]
    expected = json.loads((folder / "results.json").read_text())
    after = [r for r in rows if r["method"] == "esd"]
    assert [(r["metric"], float(r["value"]), int(r["n"])) for r in after] == [(r["metric"], r["value"], r["n"]) for r in expected]
    before = [r for r in rows if r["method"] == "original"]
    assert [float(r["value"]) for r in before] == [r["before"]["value"] for r in expected if r["before"]]
    assert rows[0]["device"] == "cpu x86_64" and rows[0]["preset"] == "" and after[-1]["low"] == ""


def test_card(tmp_path: Path) -> None:
    folder = make(tmp_path)
    report([folder])
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"base_model": "canvas", "library_name": "unlearners", "tags": ["unlearning", "concept-erasure"]}
    for part in (
        "sketch, mosaic",
        "photo",
        "1e-05",
        "cd" * 32,
        "3.11.4",
        "98.2 %",
        "50.0 %",
        "can be attacked",
        "unlearn erase esd canvas canvas/neon",
    ):
        assert part in body, part
    assert "<script>" not in body


def test_commands(tmp_path: Path) -> None:
    page = Page(report([make(tmp_path / "runs")]))
    erase, attack, evaluate, again = (
        page.raw.partition('<pre class="commands">')[2].partition("</pre>")[0].replace("&#39;", "'").split("\n")
    )
    assert shlex.split(erase) == shlex.split(
        "unlearn erase esd canvas canvas/neon --params xattn --steps 200 --lr 1e-05 --eta 1.0 --no-norm --layers 0 1 --inner.k 3 --seed 3"
    )
    where = "runs/canvas-neon-esd-0123abcd"
    assert attack == f"unlearn attack unlearndiffatk {where} --steps 40 --lr 0.01 --seed 5 --prompts 6"
    assert evaluate == f"unlearn evaluate {where} --steps 20 --guidance 7.5"
    assert again == f"unlearn report {where}"


def test_evaluate_command_says_what_was_not_the_task_s_own(tmp_path: Path) -> None:
    folder = make(tmp_path / "runs", task={"seeds": [188, 288, 588], "suite": ["ua", "ira", "cra", "clip_score", "asr", "pre_asr", "cost"]})
    evaluation = json.loads((folder / "evaluate.json").read_text())

    def said() -> str:
        report([folder])
        return next(text for text in (folder / "README.md").read_text().splitlines() if text.startswith("unlearn evaluate"))

    where = "unlearn evaluate runs/canvas-neon-esd-0123abcd --steps 20 --guidance 7.5"
    assert said() == where
    write(folder / "evaluate.json", evaluation | {"seeds": [188, 288]})
    write(folder / "results.json", [row("ua", 98, 2)])
    assert said() == f"{where} --metrics ua --seeds 2"


def test_command_of_a_task_built_from_text(tmp_path: Path) -> None:
    folder = make(
        tmp_path,
        "mine",
        task={"name": "van-gogh", "concepts": ["Van Gogh; $(rm)"], "anchors": ["art"], "preserve": ["Monet", "Klee's"]},
        method={"name": "uce"},
    )
    report([folder])
    line = next(text for text in (folder / "README.md").read_text().splitlines() if text.startswith("unlearn erase"))
    words = [
        "unlearn",
        "erase",
        "uce",
        "canvas",
        "--concept",
        "Van Gogh; $(rm)",
        "--kind",
        "style",
        "--anchor",
        "art",
        "--preserve",
        "Monet",
        "Klee's",
        "--seed",
        "3",
    ]
    assert shlex.split(line) == [*words, "--out", f"{tmp_path.name}/mine"]


def test_sensitive_tasks_embed_no_picture_unless_asked(tmp_path: Path) -> None:
    folder = make(tmp_path, task={"kind": "nsfw", "domain": "style"})
    page = Page(report([folder]))
    assert page.pictures == 0 and "img" not in page.tags and page.text.count("because this task is sensitive") >= 2
    assert Page(report([folder], images=True)).pictures > 20
    harmless = make(tmp_path / "other")
    page = Page(report([harmless], images=False))
    assert page.pictures == 0 and "as was asked for" in page.text
    pair = report([folder, make(tmp_path, "canvas-neon-uce-0123abcd", task={"kind": "nsfw", "domain": "style"})])
    assert Page(pair).pictures == 0


@pytest.mark.parametrize("status", ["failed", "running"])
def test_unfinished_runs_are_readable(tmp_path: Path, status: str) -> None:
    folder = tmp_path / "canvas-neon-esd-0123abcd"
    run = {"target": "canvas", "task": {"name": "canvas/neon", "kind": "style", "concepts": ["neon"]}, "method": {"name": "esd"}, "seed": 0}
    error = "'loss' became nan <i>and</i> training stopped" if status == "failed" else None
    write(
        folder / "run.json",
        {"schema": 1, "status": status, "run": run, "base": None, "env": None, "weights": None, "time": None, "error": error},
    )
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    page = Page(report([folder]))
    assert status in page.text and '"loss": 0.5' in page.text and "Nothing has been measured" in page.text and '"step": 2' not in page.text
    assert error is None or error in page.text
    assert "No attack was run" in (folder / "README.md").read_text()
    assert len((folder / "results.csv").read_text().splitlines()) == 1


def test_several_runs(tmp_path: Path) -> None:
    write(
        tmp_path / "original-00000000" / "run.json",
        {
            "schema": 1,
            "status": "done",
            "run": {
                "target": "canvas",
                "task": {"name": "x", "kind": "style", "concepts": ["x"]},
                "method": {"name": "original"},
                "seed": 0,
            },
        },
    )
    first, second = make(tmp_path), make(tmp_path, "canvas-neon-uce-89abcdef", method={"name": "uce", "lamb": 0.1}, ua=60.0)
    path = report([tmp_path])
    assert path == tmp_path / "report.html" == report([first, second, first])
    page = Page(path)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links if link.startswith("#")} <= set(page.ids)
    assert [link for link in page.links if not link.startswith("#")] == [f"{f.name}/report.html" for f in (first, second)]
    assert all((tmp_path / link).is_file() for link in page.links if not link.startswith("#"))
    assert all(load.startswith(("data:image/", "#")) for load in page.loads)
    head = page.raw.partition("<h2>")[0]
    assert head.count("<tr>") == 3
    best = [part.partition("</td>")[0] for part in head.split('class="num best"')[1:]]
    assert '<data value="98.25">' in best[0] and not any('<data value="60.0">' in part for part in best)
    assert (
        page.tags.count("details") >= 2
        and (first / "report.html").is_file()
        and not (tmp_path / "original-00000000" / "report.html").exists()
    )
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert sum(r["metric"] == "ua" for r in rows) == 3  # esd, uce and one shared original
    assert path.read_text() == report([tmp_path]).read_text()


def classifier(parent: Path, method: str, values: tuple[float, ...], *, seed: int = 0, kind: str = "samples") -> Path:
    """A finished and evaluated run on a classifier: ``values`` are UA, RA, TA and MIA."""
    data = {"source": "uoft-cs/cifar10", "split": "train", "rows": "random=0.1", "seed": 2, "validation": 0.1, "digest": ""}
    said = "10 % of the training pictures" if kind == "samples" else "cat"
    task = {
        "name": "mine", "kind": kind, "concepts": [said], "anchors": [], "preserve": [], "domain": "", "judge": "",
        "forget": data, "retain": data | {"rows": "not random=0.1"}, "holdout": data | {"split": "test", "rows": ""},
        "suite": ["ua", "ra", "ta", "mia", "cost"], "seeds": [1],
    }  # fmt: skip
    fields = {"name": method, "params": "full", "lr": 0.01}
    run = {"target": "resnet <b>", "task": task, "method": fields, "seed": seed, "dtype": "float32", "patches": []}
    weights = {
        "file": "weights.safetensors",
        "sha256": "ef" * 32,
        "bytes": 44_000_000,
        "tensors": 60,
        "changed": ["net.conv1.weight"],
        "outside": 0,
    }
    folder = parent / f"mine-{method}-{seed:08x}"
    record = {
        "schema": 1, "status": "done", "family": "classifier", "run": run, "base": {"name": "resnet", "sha256": {"net": "aa" * 32}},
        "env": {"device": "cuda", "hardware": "H100"}, "weights": weights, "time": {"seconds": 160.0}, "error": None, "warnings": [],
        "data": {"source": data["source"], "digest": "bb" * 32, "forget": 4500, "retain": 40500, "classes": 10},
    }  # fmt: skip
    write(folder / "run.json", record)
    sizes, before = (4500, 40500, 10000, 4500), (0.02, 99.99, 94.7, 0.1)
    rows = [row(m, v, b, n) for m, v, b, n in zip(("ua", "ra", "ta", "mia"), values, before, sizes, strict=False)]
    write(folder / "results.json", rows)
    write(folder / "cost.json", [row("cost/seconds", 0, None, n=1, higher=False) | {"value": 160.0, "low": None, "high": None}])
    hashes = ["0" * 64] if method == "salun" else []
    write(folder / "evaluate.json", {"asked": {"references": hashes}, "sampler": {}, "judge": "", "seeds": [1], "seconds": 3.0})
    return folder


RETRAIN, SALUN, FT = (5.24, 100.0, 94.26, 12.88), (2.85, 99.62, 93.93, 14.39), (0.63, 99.88, 94.06, 2.70)


def test_a_classifier_s_run(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "runs", "salun", SALUN)
    page = Page(report([folder]))
    assert "resnet <b>" in page.text and "<b>" not in page.raw and "img" not in page.tags
    assert "Erased 10 % of the training pictures from resnet <b> with salun: 2.85 % of the forget set are no longer right" in page.text
    for text in ("Prompts that name", "No attack has been run", "No pictures have been sampled", "Anchors", "Avg. Gap"):
        assert text not in page.text, text
    for text in ("4500 pictures: random=0.1 of uoft-cs/cifar10, train", "40500 pictures: not random=0.1", "bb" * 32, "14.39 %", "99.62 %"):
        assert text in page.text, text
    assert "10 % of each class held back for validation" in page.text and "pictures of the forget set that are no longer right" in page.text
    assert 'class="move same"' in page.raw and 'class="move good"' not in page.raw and 'class="move bad"' not in page.raw
    body = (folder / "README.md").read_text()
    assert "image-classification" in body and "concept-erasure" not in body and "weak confidence attack" in body and "2.85 %" in body
    assert body.count("| near retrain's |") == 4 and "(before: 99.99 %)" in body
    assert "the classes" not in body and "No automatic doubts" in page.text


def test_a_classifier_s_commands(tmp_path: Path) -> None:
    folder, other = (classifier(tmp_path / "runs", m, v) for m, v in (("salun", SALUN), ("retrain", RETRAIN)))
    assert other.name == "mine-retrain-00000000"  # the run that was asked for as a reference
    report([folder])
    erase, evaluate, again = (folder / "README.md").read_text().rpartition("```sh\n")[2].removesuffix("\n```").strip().split("\n")[:3]
    data = "--data uoft-cs/cifar10 --forget random=0.1 --validation 0.1 --split-seed 2"
    assert erase == f"unlearn erase salun 'resnet <b>' {data} --params full --lr 0.01 --seed 0"
    assert evaluate == "unlearn evaluate runs/mine-salun-00000000 --references runs/mine-retrain-00000000"
    assert again == "unlearn report runs/mine-salun-00000000"


def test_average_gap_is_the_paper_s(tmp_path: Path) -> None:
    for name, values in (("retrain", RETRAIN), ("salun", SALUN), ("ft", FT)):
        classifier(tmp_path, name, values)
    page = Page(report([tmp_path]))
    head = page.raw.partition("<h2>")[0]
    lines = {name: next(line for line in head.split("<tr>") if f">mine-{name}-" in line) for name in ("retrain", "salun", "ft")}
    for name, texts in {
        "salun": ("(2.39)", "(0.38)", "(0.33)", "(1.51)", ">1.15<"),
        "ft": ("(4.61)", "(0.12)", "(0.20)", "(10.18)", ">3.78<"),
    }.items():
        for text in texts:
            assert text in lines[name], (name, text)
    assert (
        "best" in lines["salun"].rpartition("1.15")[0].rpartition("<td")[2]
        and ">0.00<" in lines["retrain"]
        and "(0.00)" in lines["retrain"]
    )
    best = {name: line.count('class="num best"') for name, line in lines.items()}
    assert best == {"ft": 3, "salun": 4, "retrain": 1}  # RA and TA; UA, MIA and Avg. Gap; and all cost the same
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    found = {r["method"]: float(r["value"]) for r in rows if r["metric"] == "avg_gap"}
    assert found == pytest.approx({"retrain": 0, "salun": 1.1525, "ft": 3.7775})


def test_average_gap_needs_the_same_request_and_all_four(tmp_path: Path) -> None:
    folders = [classifier(tmp_path, "retrain", RETRAIN, seed=1), classifier(tmp_path, "salun", SALUN)]
    assert "Avg. Gap" not in Page(report(folders)).text  # another seed
    folders = [classifier(tmp_path, "retrain", RETRAIN, seed=0), classifier(tmp_path, "ft", FT[:3])]
    page = Page(report(folders))
    line = next(part for part in page.raw.partition("<h2>")[0].split("<tr>") if ">mine-ft-" in part)
    assert "(4.61)" in line and '<td class="num"></td>' in line  # no MIA, so no mean
    assert "avg_gap" not in [r["metric"] for r in csv.DictReader((tmp_path / "results.csv").open()) if r["method"] == "ft"]


def test_a_forgotten_class_is_called_one(tmp_path: Path) -> None:
    assert "Erased the class cat from resnet" in Page(report([classifier(tmp_path, "ft", FT, kind="class")])).text


def test_pictures_from_outside_the_folder_are_not_embedded(tmp_path: Path) -> None:
    folder = make(tmp_path)
    draw(tmp_path / "secret.png", "neon", "cup", 1)
    manifest = folder / "samples" / "manifest.jsonl"
    lines(manifest, [json.loads(text) | {"file": "../secret.png"} for text in manifest.read_text().splitlines()])
    page = Page(report([folder]))
    assert page.pictures == 6 * 2 + 12 + 3 and "25 of 25 sampled pictures are missing" in page.text


def test_large_pictures_become_small(tmp_path: Path) -> None:
    folder = make(tmp_path)
    draw(folder / "samples" / "000000.png", "photo", "cup", 1, side=512)
    assert "data:image/jpeg" in Page(report([folder])).raw


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        report([tmp_path])
    with pytest.raises(UsageError, match="does not exist"):
        report([tmp_path / "no"])
    with pytest.raises(UsageError, match="nothing to report"):
        report([])


ROWS = [{"name": "a|b_<i>&%", "value": 12.3456}, {"name": "x\ny", "value": None, "more": "$\\~"}]


def test_tables() -> None:
    assert table(ROWS, "markdown").splitlines() == [
        "| name | value | more |",
        "| --- | ---: | --- |",
        r"| a\|b\_&lt;i&gt;&amp;% | 12.3 |  |",
        r"| x y | — | \$\\\~ |",
    ]
    assert r"a|b\_\textless{}i\textgreater{}\&\% & 12.3 &  \\" in table(ROWS, "latex") and r"\$\textbackslash{}\textasciitilde{}" in table(
        ROWS, "latex"
    )
    assert r"\begin{tabular}{lrl}" in table(ROWS, "latex")
    assert "<td>a|b_&lt;i&gt;&amp;%</td><td>12.3</td>" in table(ROWS, "html")
    with pytest.raises(UsageError, match="markdown"):
        table(ROWS, "markdow")
    assert [table([], fmt) for fmt in ("markdown", "latex")] == ["", ""]


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from("abc"), st.text(st.characters(exclude_categories=["Cs", "Cc"])) | st.floats(allow_nan=False) | st.integers()
        ),
        min_size=1,
    )
)
def test_csv_round_trip(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for r in rows for name in r))
    back = list(csv.reader(io.StringIO(table(rows, "csv"), newline="")))
    assert back == [columns, *([str(r.get(c, "")) for c in columns] for r in rows)]
