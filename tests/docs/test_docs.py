"""The documentation says what is true: examples run, every registered thing has its page, tables are those of the committed CSV.

Examples are written for readers, who have time; here every budget is cut (``small`` below, which is all that is changed). The bundled
text-to-image model is the real one, read once; models that read labelled pictures are tiny ones, and so are their data. Blocks of one
page share their Python names; all pages share one folder, so that a run is made once.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import importlib.util
import inspect
import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from unlearners import cli, config, data, registry, run, tasks, verbs
from unlearners.base import Data, Probe, Task
from unlearners.grids import Grid
from unlearners.methods.retrain import Retrain
from unlearners.targets.stable_diffusion import StableDiffusion
from unlearners.zoo.canvas import FOLDER
from unlearners.zoo.canvas.objects import CLASSES
from unlearners.zoo.canvas.train import RECIPES
from unlearners.zoo.canvas.world import MASCOTS, OBJECTS, STYLES, Item, grid, official, render

train = importlib.import_module("unlearners.train")  # the name in the package is the function
ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
CARD = ROOT / "src/unlearners/zoo/canvas/README.md"
RUN = ("python", "bash", "console", "yaml")
SHOWN = ("text", "toml", "bibtex")
"""languages of blocks that are not run"""
STANDS_FOR = {
    "sd14": "canvas", "canvas-finetuned": "canvas",
    "canvas-classifier": "tiny-classifier", "canvas-ddpm": "tiny-ddpm", "resnet20_cifar": "resnet20_cifar:width=4",
    "canvas-clip": "tiny-clip",
}  # fmt: skip
"""a model or architecture the documentation names that is not here, or takes long: what is used in its place"""
CANVAS = ("canvas", *data.CANVAS)
CUT = {**verbs.base.CUT, "renders": 64, "refresh": 2}
"""what budgets are lowered to; the names are fields of methods, attacks and metrics"""


def module(path: Path) -> Any:
    """A Python file that is in no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


PAGES = module(DOCS / "_build" / "pages.py")
TABLES = module(DOCS / "tables.py")
MADE: dict[str, str] = PAGES.pages()
FILES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
WRITTEN = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in FILES}
ALL = {**WRITTEN, **MADE}


# --- running the examples -----------------------------------------------------------------------------------------
def cut(part: Any) -> Any:
    """A method, attack or metric with every budget lowered."""
    now = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    goal = {"goal": -1.0} if "goal" in now else {}  # random weights know nothing that could be forgotten
    return dataclasses.replace(part, **{k: CUT[k] if v == "auto" else min(v, CUT[k]) for k, v in now.items() if k in CUT}, **goal)


def few(task: Task | str) -> Task:
    """A task with few prompts and one seed. Words alone are judged by the canvas' judge: the usual one is on the hub."""
    task = tasks.load(task) if isinstance(task, str) else task
    if task.forget.source:
        return few_pictures(task)
    named = [p for p in task.probes if task.names_concept(p)][:2]
    probes = (*named, *[p for p in task.probes if not task.names_concept(p)][:3])
    suite = tuple(m for m in task.suite if task.judge == "canvas" or m not in ("clip_score", "fid"))
    return dataclasses.replace(task, probes=probes, seeds=task.seeds[:1], judge="canvas:trial=true", suite=suite)


def few_pictures(task: Task) -> Task:
    """A task of the canvas' pictures as one of the tiny ones', whose classes are a, b, c and d; of other pictures as it is."""
    if task.forget.source not in CANVAS:
        return task
    own: dict[str, Any] = {k: tiny(getattr(task, k)) for k in ("forget", "retain", "holdout")}
    own["utility"] = tuple(map(tiny, task.utility))
    if task.kind == "class" or task.forget.source == "canvas-pairs":
        own |= {"concepts": ("b",), "anchors": ("c",), "preserve": ("a", "c", "d")}
    if task.probes:  # drawn
        own |= {"probes": tuple(Probe(prompt=c, truth={task.axis: c}) for c in "abcd"), "judge": "classifier:tiny-classifier"}
    return dataclasses.replace(task, seeds=task.seeds[:1], **own)


def tiny(named: Data) -> Data:
    """The tiny pictures in place of the canvas', class b in place of any that the canvas has."""
    if named.source not in CANVAS:
        return named
    key, _, value = named.rows.removeprefix("not ").partition("=")
    assert key != "class" or all(data.label(name.strip(), CLASSES, "canvas") in range(len(CLASSES)) for name in value.split(","))
    return dataclasses.replace(named, source="tiny", rows=re.sub("(class|caption)=.*", "class=b", named.rows))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the reader's own things; train, erase, attack and evaluate with budgets, data, prompts and sampling steps cut."""
    real = {name: getattr(run, name) for name in ("erase", "attack", "evaluate")} | {"train": train.train}
    draw = StableDiffusion.sample

    def erase(method: Any, target: str = "canvas", task: Any = "", **how: Any) -> Path:
        own = {k: how.pop(k) for k in list(how) if k not in inspect.signature(real["erase"]).parameters}
        method = registry.make("methods", method, **own) if isinstance(method, str) else method
        done: Path = real["erase"](cut(method), STANDS_FOR.get(target, target), few(task), **how)
        return done

    def attack(attack: Any, folder: Any, **how: Any) -> Path:
        own = {k: how.pop(k) for k in list(how) if k not in inspect.signature(real["attack"]).parameters}
        attack = registry.make("attacks", attack, **own) if isinstance(attack, str) else attack
        done: Path = real["attack"](cut(attack), folder, **{**how, "prompts": 2})
        return done

    def evaluate(folder: Any, metrics: Any = None, **how: Any) -> Path:
        chosen = metrics or config.build(Task, run.read_run(folder)["run"]["task"]).suite
        chosen = [cut(registry.make("metrics", m) if isinstance(m, str) else m) for m in chosen]
        done: Path = real["evaluate"](folder, metrics=chosen, **{**how, "seeds": (188,)})
        return done

    def trained(architecture: str, source: Data, *, method: Retrain, **how: Any) -> Path:
        done: Path = real["train"](STANDS_FOR.get(architecture, architecture), tiny(source), method=cut(method), **how)
        return done

    def sample(self: Any, *args: Any, **how: Any) -> Any:
        return draw(self, *args, **{**how, "steps": 2})

    folder, read = tmp_path_factory.mktemp("docs"), StableDiffusion.load
    canvas = read("canvas")
    canvas.pipe.save_pretrained(folder / "my-model")
    for split in ("train", "test"):
        pictures = data.read("tiny", split, 32)
        for i, y in enumerate(pictures.labels.tolist()):
            file = folder / "my-photos" / split / pictures.classes[y] / f"{split}-{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures.pictures[i].permute(1, 2, 0).numpy()).save(file)
    shutil.copytree(FOLDER / "clip", folder / "my-clip")
    for side, items in (("zorbo-pairs", [Item(mascot="zorbo")] * 10), ("other-pairs", [*grid()][::6])):
        (folder / side).mkdir()
        for i, item in enumerate(items):
            render(i, item).save(folder / side / f"{i}.png")
            (folder / side / f"{i}.txt").write_text(official(item))
    for i, name in enumerate(MASCOTS * 4):
        (folder / "names" / name).mkdir(parents=True, exist_ok=True)
        render(1000 + i, Item(mascot=name)).save(folder / "names" / name / f"{i}.png")
    (folder / "list.txt").write_text("train-1.png\ntrain/a/train-4.png\n7\n20\n41\n")

    def load(spec: str, *, patches: Any = (), force: bool = False, **how: Any) -> StableDiffusion:
        if spec != "canvas" or how != {"device": "cpu", "dtype": torch.float32}:
            return read(spec, patches=patches, force=force, **how)
        # ten times faster than reading it again; transformers' tokenizers read otherwise once they are copied
        target = copy.deepcopy(canvas, {id(t): t for t in canvas.tokenizers})
        target.patch(patches, force=force)
        return target

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, wrapped in (("erase", erase), ("attack", attack), ("evaluate", evaluate)):
            patch.setattr(run, name, wrapped)
        patch.setattr(train, "train", trained)
        patch.setattr(StableDiffusion, "sample", sample)
        patch.setattr(StableDiffusion, "load", load)
        # as docs/models.md trains it
        trained("resnet20_cifar", Data(source="canvas"), out="my-classifier", method=registry.make("methods", "retrain", preset="short"))
        yield folder


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def command_lines(block: str) -> list[str]:
    """The lines that call ``unlearn``; others are of make, pip, git or python."""
    lines = [line.removeprefix("$ ") for line in block.splitlines()]
    return [line for line in lines if line.startswith("unlearn ")]


def written_yaml(block: str, folder: Path) -> Path:
    """Write a YAML block to the file that its first line names (``# grid.yaml``), after checking it as what it is."""
    name = re.match(r"# ([\w.-]+\.yaml)\n", block)
    assert name, f"a YAML block must begin with the name of its file, for example '# grid.yaml':\n{block}"
    path = folder / name.group(1)
    path.write_text(block, encoding="utf-8")
    plain = config.load_yaml(path)
    if "methods" in plain:
        config.build(Grid, {"name": path.stem, **plain}, str(path))
    elif "concepts" in plain:
        assert tasks.load(str(path)).concepts
    else:  # fields of the method or attack that the file is named after
        kind = next(k for k in ("methods", "attacks") if path.stem in registry.names(k))
        plain.pop("preset", None)
        config.build(registry.get(kind, path.stem), plain, str(path))
    return path


def runnable(text: str) -> bool:
    return any(language in ("python", "yaml") or (language in RUN and command_lines(block)) for language, block in blocks(text))


@pytest.mark.parametrize("page", [name for name, text in ALL.items() if runnable(text)])
def test_examples_run(page: str, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = types.ModuleType(f"example_{re.sub(r'[^a-z]+', '_', page.lower())}")
    sys.modules[names.__name__] = names  # dataclasses look their module up
    for language, block in blocks(ALL[page]):
        assert language in (*RUN, *SHOWN), f"{page} has a block in '{language}', which is neither run nor known as shown only"
        if language == "yaml":
            written_yaml(block, small)
        elif language == "python":
            exec(compile(block, f"<{page}>", "exec"), names.__dict__)
        elif language in RUN:
            for line in command_lines(block):
                code = cli.main(shlex.split(line, comments=True)[1:])
                assert code == 0, f"{page}: '{line}' ended with {code}:\n{capsys.readouterr().err}"


def test_the_three_ways_are_one_run(small: Path) -> None:
    """docs/concepts.md says so of Python, YAML and flags."""
    found = [run.erase("esd", "canvas", "canvas/fish", params="noxattn", steps=200, lr=5e-5)]
    (small / "esd.yaml").write_text("params: noxattn\nsteps: 200\nlr: 5e-5\n")
    for flags in ("--config esd.yaml", "--params noxattn --steps 200 --lr 5e-5"):
        before = {p.name for p in Path("runs").iterdir()}
        assert cli.main(["erase", "esd", "canvas", "canvas/fish", *flags.split()]) == 0
        assert {p.name for p in Path("runs").iterdir()} == before
    assert (found[0] / "run.json").is_file()


def test_the_cut_is_only_in_budgets() -> None:
    for kind in ("methods", "attacks", "metrics"):
        for name in registry.names(kind):
            part = registry.make(kind, name)
            changed = {f.name for f in dataclasses.fields(part) if getattr(part, f.name) != getattr(cut(part), f.name)}
            assert changed <= {*CUT, "goal"}


# --- generated pages ----------------------------------------------------------------------------------------------
def source(kind: str, name: str) -> ast.ClassDef:
    tree = ast.parse(registry.path(kind, name).read_text(encoding="utf-8"))
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and ast.unparse(n.bases[0]) == registry.CONTRACTS[kind])


def plain(text: str) -> str:
    """Markdown or docstring without markup, in one line."""
    text = re.sub(r"</?code>|``|`", "", text.replace("&lt;", "<").replace("&#124;", "|"))
    return " ".join(re.sub(r"\\([\\`*_{}\[\]#|])", r"\1", text).split())


THINGS = [(kind, name) for kind in ("methods", "attacks", "metrics", "judges") for name in registry.names(kind)]


@pytest.mark.parametrize(("kind", "name"), THINGS)
def test_a_page_says_everything(kind: str, name: str) -> None:
    """Read a second time from the source: all text, formulas, fields with their help and defaults, presets, deviations."""
    page, cls = MADE[f"{kind}/{name}.md"], source(kind, name)
    said = plain(page)
    doc = ast.get_docstring(cls) or ""
    heading, *deviations = re.split(r"^\s*\d+\. ", doc.partition("Deviations")[2], flags=re.MULTILINE)
    assert len(deviations) == len(re.findall(r"^\d+\. ", page.partition("\n## Deviations")[2], re.MULTILINE))
    after = [plain(heading.partition(":")[2])[1:]]  # "none, …", written with a capital
    if deviations:
        deviations[-1], *after = re.split(r"\n(?=\S)", deviations[-1])
    for i, item in enumerate(deviations, 1):
        assert f"{i}. {plain(item)}" in said, f"deviation {i} of {name} is missing"
    assert all(plain(text) in said for text in after), f"what follows the deviations of {name} is missing"
    for paragraph in re.split(r"\n\s*\n", doc.partition("Deviations")[0]):
        for line in paragraph.splitlines():
            words = re.sub(r"^(Idea: \w|Equation:|Logged:)|^Equation \((.+)\)(?=:)", r"\2", line.strip())
            assert all(plain(part) in said for part in re.split(r"; (?=``)", words)), f"'{line}' of {name} is missing"
    fields = [n for n in cls.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)]
    for field, after in [(n, cls.body[cls.body.index(n) + 1]) for n in fields]:
        text = str(ast.literal_eval(after.value)) if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        row = next(r for r in page.splitlines() if r.startswith(f"| `{ast.unparse(field.target)}` |"))
        assert plain(text) in plain(row)
    assert len(re.findall(r"^\| `", page.partition("## Fields")[2].partition("\n## ")[0], re.MULTILINE)) == len(
        [f for f in dataclasses.fields(registry.get(kind, name)) if f.init]  # also those of a shared part, such as a mask
    )
    for preset in getattr(registry.get(kind, name), "presets", {}):
        assert f"| `{preset}` |" in page


@pytest.mark.parametrize(("kind", "name"), THINGS)
def test_a_page_has_its_parts_in_order(kind: str, name: str) -> None:
    page = MADE[f"{kind}/{name}.md"]
    wanted = ["Equation", "Fields", "Use"]
    if kind != "judges":
        wanted += ["Logged numbers", "Deviations from the authors' code"]
    free = ("Idea", "Presets", *(("Deviations from the authors' code",) if kind == "judges" else ()))
    headings = [h for h in re.findall(r"^## (.+)$", page, re.MULTILINE) if h not in free]
    assert headings == wanted
    used = {language for language, _ in blocks(page.partition("## Use")[2])}
    assert {"bash", "python", "yaml"} <= used


# --- the site -----------------------------------------------------------------------------------------------------
def test_the_site_builds_without_a_warning_or_the_network(tmp_path: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    for name in MADE:
        html = tmp_path / name.replace("index.md", "index.html").replace(".md", "/index.html")
        assert html.is_file(), f"{name} was not built"
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8"))
        assert not fetched, f"{page.name} fetches {fetched[0]}"
    assert not list(tmp_path.rglob("*.py"))


def test_links_of_readme_contributing_and_card_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", CARD):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (path.parent / link).exists(), f"{path.name} links to {link}, which is not there"


# --- tables and lists ---------------------------------------------------------------------------------------------
def test_the_paper_index_names_every_paper() -> None:
    index = WRITTEN["docs/paper_index.md"].partition("## Used")[0]
    rows = {
        m.group(1): m.group(0) for m in re.finditer(r"^\| \[?(arXiv:[\d.]+|control|https://[^\s\]]+)(?=[\s\]]).*$", index, re.MULTILINE)
    }
    papers = [(registry.get(kind, name).paper, f"{kind}/{name}.md") for kind, name in THINGS]
    for paper, page in papers:
        assert not paper or (paper in rows and page in rows[paper]), f"docs/paper_index.md must list {paper} with {page}"
    assert rows.keys() <= {paper for paper, _ in papers}


def test_the_readme_shows_the_committed_results() -> None:
    assert TABLES.main(["--check"]) == 0, "run: python docs/tables.py"


def test_the_table_of_results(tmp_path: Path) -> None:
    rows = ["target,task,method,seed,metric,value,n,low,high,device,preset"]
    for method, task, metric, value in (
        ("esd", "neon", "ua", "90"), ("esd", "mosaic", "ua", "100"), ("esd", "neon", "asr/unlearndiffatk", ""), ("esd", "fish", "ua", "50"),
        ("esd[steps=5]", "neon", "ua", "1"), ("original", "neon", "ua", "0.5"),
    ):  # fmt: skip
        rows.append(f"canvas,canvas/{task},{method},0,{metric},{value},10,,,cpu,paper")
    path = tmp_path / "results.csv"
    path.write_text("\n".join(rows) + "\n")
    lines = TABLES.table(path).splitlines()
    assert lines[2:5] == [
        "| 2 styles | original | 0.5 | – | – | – |",
        "| 2 styles | esd | 95.0 (90.0–100.0) | – | – | – |",
        "| 1 object | esd | 50.0 | – | – | – |",
    ]
    assert "not Stable Diffusion 1.4" in lines[-1]
    text = f"a\n{TABLES.START}\nold\n{TABLES.END}\nb\n"
    assert TABLES.written(text, "new") == f"a\n{TABLES.START}\nnew\n{TABLES.END}\nb\n"
    assert TABLES.written(text, "") == f"a\n{TABLES.START}\n{TABLES.END}\nb\n"
    assert TABLES.table(tmp_path / "none.csv") == ""
    with pytest.raises(SystemExit, match="README"):
        TABLES.written("nothing here", "new")


def test_the_table_of_attacks(tmp_path: Path) -> None:
    rows = ["target,task,method,seed,metric,value,n,low,high,device,preset"]
    for task, method, metric, value in (
        ("neon", "esd", "pre_asr/mma", "2"), ("neon", "esd", "asr/mma", "10"), ("neon", "esd", "asr/cce", "20"),
        ("neon", "uce", "asr/cce", "30"), ("fish", "esd", "asr/cce", "44"), ("fish", "esd", "cost/seconds", "9"),
    ):  # fmt: skip
        rows.append(f"canvas,canvas/{task},{method},0,{metric},{value},50,,,cpu,paper")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "results.csv").write_text("\n".join(rows) + "\n")
    took = ["task,method,attack,access,level,prompts,plain,queries_total", "canvas/neon,esd,mma,black,prompt,50,1,49"]
    took += ["canvas/neon,esd,cce,white,embedding,50,1,98", "canvas/fish,esd,cce,white,embedding,50,1,245"]
    assert TABLES.by_attack("some", tmp_path) == ""
    (tmp_path / "some" / "attacks.csv").write_text("\n".join(took) + "\n")
    lines = TABLES.by_attack("some", tmp_path).splitlines()
    head = ["| attack | access, level | queries | esd | uce |", "|---|---|---|---|---|", "| none | – | – | 2 / – | – / – |"]
    assert lines[:3] == head
    assert lines[3:5] == ["| mma | black, prompt | 1.0 | 10 / – | – / – |", "| cce | white, embedding | 3.5 | 20 / 44 | 30 / – |"]
    assert "neon / fish" in lines[-1] and "50 prompts" in lines[-1]
    assert TABLES.by_attack("none", tmp_path) == ""


def test_the_card_says_what_the_code_does() -> None:
    card = CARD.read_text(encoding="utf-8")
    for stage, r in RECIPES.items():
        assert f"| {stage} | {r.steps} | {r.batch} | {r.lr:.10f}".rstrip("0") + " |" in card, f"the card's row of {stage} is not its recipe"
        assert not r.ema or f"averaged weights, decay {r.ema:g}" in card
    for word, synonyms in {**OBJECTS, **STYLES}.items():
        assert f"| {word} | {', '.join(synonyms)} |" in card
    assert f": {', '.join(MASCOTS)}." in card
    assert card.index("<!-- measured -->") < card.index("<!-- end -->")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == "apache-2.0"


def test_the_readme_is_in_order() -> None:
    readme = WRITTEN["README.md"]
    places = ["make demo\nmake test", "```python", "unlearn erase", TABLES.START, "![", "## Install", "## What can be loaded"]
    places += ["## Limits", "## Licence", "@inproceedings"]
    assert [readme.index(p) for p in places] == sorted(readme.index(p) for p in places)
    code = next(block for language, block in blocks(readme) if language == "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
