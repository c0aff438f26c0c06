"""MkDocs hook: a page for every registered method, attack, metric and judge, made from its docstring and fields when the site is built.

Nothing is written to disk: the pages are virtual files of the build. ``pages()`` gives them as {path: Markdown}; the tests run their
examples and compare them with the registry.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import unlearners
from unlearners import registry, verbs

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = {"methods": "Methods", "attacks": "Attacks", "metrics": "Metrics", "judges": "Judges"}
ABOUT = {
    "methods": "A method edits the weights of a target. One file, one paper.",
    "attacks": "An attack looks for prompts that bring the concept back. It proposes; the framework draws, judges and counts.",
    "metrics": "A metric turns pictures, labels or verdicts into a number with its uncertainty.",
    "judges": "A judge reads pictures: one label for each picture in one domain. A task names its judge.",
}
PUBLIC = ("load", "train", "erase", "attack", "evaluate", "report", "export", "bench", "names")


@dataclass(frozen=True, kw_only=True)
class Example:
    """What the examples of a page are about."""

    target: str
    task: str
    other: str
    """another task"""
    kind: str
    """what that one is about"""
    method: str
    preset: str = ""
    out: str
    """the run folder of ``method``"""

    @property
    def erase(self) -> str:
        """The command that makes the run folder."""
        preset = f" --preset {self.preset}" if self.preset else ""
        return f"unlearn erase {self.method} {self.target} {self.task}{preset} --out {self.out}"

    @property
    def call(self) -> str:
        """The same in Python."""
        preset = f', preset="{self.preset}"' if self.preset else ""
        return f'erase("{self.method}", "{self.target}", "{self.task}"{preset})'


EXAMPLES = {
    "stable_diffusion": Example(
        target="canvas", task="canvas/neon", other="canvas/fish", kind="an object", method="uce", out="runs/neon"
    ),
    "classifier": Example(
        target="canvas-classifier", task="objects/fish", other="objects/random10", kind="a tenth of the pictures",
        method="salun", preset="short", out="runs/no-fish",
    ),
    "ddpm": Example(
        target="canvas-ddpm", task="objects/draw-fish", other="objects/draw-cup", kind="another class",
        method="salun", preset="ddpm", out="runs/draws-no-fish",
    ),
    "clip": Example(
        target="canvas-clip", task="clip/zorbo", other="clip/neon", kind="a style", method="slug", preset="canvas", out="runs/clip-no-zorbo"
    ),
    "llava": Example(
        target="canvas-llava", task="clip/zorbo", other="clip/pimlu", kind="another mascot",
        method="slug", preset="canvas", out="runs/llava-no-zorbo",
    ),
}  # fmt: skip
"""by family; a page takes the first whose targets its class serves"""


# --- MkDocs' events -----------------------------------------------------------------------------------------------
def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation, where mkdocs.yml names their folder."""
    folders = {f"{kind}/": [f"{kind}/index.md", *(f"{kind}/{n}.md" for n in registry.names(kind))] for kind in KINDS}
    config.nav = [{k: folders.get(v, v) for k, v in entry.items()} for entry in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the build."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of measured results where a page has its mark."""
    mark = "<!-- results -->"
    return markdown.replace(mark, tables().table() or "Not measured yet.") if mark in markdown else markdown


def tables() -> Any:
    """docs/tables.py, which makes the README's table."""
    spec = importlib.util.spec_from_file_location("unlearners_docs_tables", ROOT / "docs" / "tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages() -> dict[str, str]:
    """Every generated page: {path below docs/: Markdown}."""
    made = {f"{kind}/{name}.md": page(kind, name) for kind in KINDS for name in registry.names(kind)}
    made |= {f"{kind}/index.md": overview(kind) for kind in KINDS}
    card = (ROOT / "src/unlearners/zoo/canvas/README.md").read_text(encoding="utf-8")
    return made | {
        "reference.md": reference(),
        "python.md": python(),
        "canvas.md": card.split("\n---\n", 1)[1].lstrip(),  # without the hub's header
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }


# --- reading a docstring ------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Doc:
    """The parts of a docstring that follows the house form (docs/add_a_method.md)."""

    summary: str
    idea: str
    equation: str
    """with the text around it; indented lines are formulas"""
    logged: str
    heading: str
    """of the deviations, as it was written"""
    deviations: list[str]
    after: str
    """what follows the list of deviations"""


def read(text: str) -> Doc:
    """Take a docstring (dedented) apart."""
    body, heading, below = _cut(text, r"^Deviations\b.*$")
    body, _, logged = _cut(body, r"^Logged:")
    summary, _, body = body.partition("\n\n")
    blocks = [b for b in re.split(r"\n{2,}", body.strip("\n")) if b.strip()]
    first = next((i for i, b in enumerate(blocks) if re.search(r"^ {4}", b, re.MULTILINE)), len(blocks))
    idea = "\n\n".join(blocks[:first]).removeprefix("Idea: ")
    heading, _, first_line = (part.strip() for part in heading.partition(":"))  # "Deviations: none" has its text in the same line
    items, after = _numbered(below)
    return Doc(
        summary=_join(summary),
        idea=_join(idea[:1].upper() + idea[1:]),
        equation=re.sub(r"^Equation:\n", "", re.sub(r"^Equation \((.+?)\):", r"From the \1:", "\n\n".join(blocks[first:]))),
        logged=_join(logged),
        heading=heading,
        deviations=items,
        after=f"{first_line[:1].upper()}{first_line[1:]}\n\n{after}".strip(),
    )


def _cut(text: str, pattern: str) -> tuple[str, str, str]:
    """Before, the match, after; everything is before when there is none."""
    found = re.search(pattern, text, re.MULTILINE)
    return (text[: found.start()], found.group(), text[found.end() :]) if found else (text, "", "")


def _numbered(text: str) -> tuple[list[str], str]:
    """The items of a numbered list, each on one line, and the text that follows with less indentation than an item's second line."""
    items: list[str] = []
    after: list[str] = []
    for line in text.strip("\n").split("\n"):
        if number := re.match(r"( *)\d+\. (.*)", line):
            items.append(number.group(2))
            margin = len(number.group(1))
        elif items and not after and line.startswith(" " * (margin + 2)):
            items[-1] += f" {line.strip()}"
        else:
            after.append(line)
    return items, _join("\n".join(after))


def _join(text: str) -> str:
    """Wrapped lines as one, paragraphs kept."""
    return "\n\n".join(" ".join(p.split()) for p in re.split(r"\n{2,}", text.strip()) if p.strip())


# --- writing Markdown ---------------------------------------------------------------------------------------------
def prose(text: str) -> str:
    """Docstring text as Markdown: ``code`` stays code, everything else is taken as it stands."""
    parts = re.split(r"``(.+?)``", text)
    return "".join(f"`{p}`" if i % 2 else re.sub(r"([\\`*_{}\[\]#|])", r"\\\1", p).replace("<", "&lt;") for i, p in enumerate(parts))


def formulas(text: str) -> str:
    """Text whose indented lines are formulas, which become code blocks."""
    out: list[str] = []
    for block in re.split(r"((?:^ {4}.*\n?(?:\n(?= {4}))?)+)", text, flags=re.MULTILINE):
        if block.startswith("    "):
            out.append(fence("text", textwrap.dedent(block).strip("\n")))
        elif block.strip():
            out.append(prose(_join(block)))
    return "\n\n".join(out)


def fence(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def grid(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ("---",) * len(head), *rows))


def code(text: str) -> str:
    """A code span that is safe in a table."""
    return f"`{text}`" if "|" not in text else f"<code>{text.replace('|', '&#124;')}</code>"


# --- pages --------------------------------------------------------------------------------------------------------
def about(kind: str, name: str) -> dict[str, Any]:
    """What ``unlearn show NAME --json`` prints about one thing."""
    found: list[dict[str, Any]] = verbs.Show(name=name).do(None)["found"]
    return next(f for f in found if f["kind"] == kind)


def page(kind: str, name: str) -> str:
    """The page of one method, attack, metric or judge."""
    known, cls = about(kind, name), registry.get(kind, name)
    doc = read(known["about"])
    parts = [f"# {name}", prose(doc.summary), _facts(kind, name, known)]
    if doc.idea:
        parts += ["## Idea", "\n\n".join(prose(p) for p in doc.idea.split("\n\n"))]
    if doc.equation:
        parts += ["## Equation", formulas(doc.equation)]
    parts += ["## Fields", _fields(known["fields"])]
    if known.get("presets"):
        rows = [(f"`{n}`", " ".join(f"`{k}={json.dumps(v)}`" for k, v in p.items()) or "the defaults") for n, p in known["presets"].items()]
        parts += ["## Presets", grid(("preset", "settings"), rows), "`--preset NAME` starts from one; flags change it."]
    parts += ["## Use", *USES[kind](name, cls, known)]
    if doc.logged:
        parts += ["## Logged numbers", LOGGED[kind].format(name=name), _logged(doc.logged)]
    if doc.heading:
        parts += [f"## {doc.heading}", "\n".join(f"{i}. {prose(d)}" for i, d in enumerate(doc.deviations, 1)), prose(doc.after)]
    return "\n\n".join(p for p in parts if p) + "\n"


LOGGED = {
    "methods": "One line of `log.jsonl` for each update, and the curves of the report.",
    "attacks": "The `log` of `attacks/{name}.json`, and the curves of the report.",
    "metrics": "One or more rows of `results.json`: `value`, `n`, `low`, `high`, and the same of the untouched model under `before`.",
    "judges": "",
}


def _facts(kind: str, name: str, known: dict[str, Any]) -> str:
    """What the class says about itself, as a list."""
    lines = []
    if paper := known.get("paper"):
        link = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})" if paper.startswith("arXiv:") else prose(paper)
        lines.append(f"Paper: {link} ([index](../paper_index.md))")
    if "needs" in known:
        lines.append("Needs: any target" if known["needs"] == "Target" else f"Needs: a `{known['needs']}` target")
        lines.append(f"Serves: {', '.join(f'`{family}`' for family in serves(registry.get(kind, name)))}")
    if "access" in known:
        lines.append("Access: " + ("white box, it uses gradients" if known["access"] == "white" else "black box, it sees pictures only"))
    if "higher_is_better" in known:
        lines.append(f"Better: {'higher' if known['higher_is_better'] else 'lower'}. Version {known['version']}")
    return "\n".join(f"- {line}" for line in [*lines, f"File: `src/unlearners/{kind}/{name}.py`"])


def serves(cls: Any) -> list[str]:
    """The families of targets that a method, attack or metric can be given."""
    return [family for family in registry.names("targets") if issubclass(registry.get("targets", family), cls.needs)]


def example(cls: Any) -> Example:
    """What the examples of a method, attack or metric are about."""
    return next(e for family, e in EXAMPLES.items() if family in serves(cls))


def _fields(fields: list[dict[str, Any]]) -> str:
    if not fields:
        return "None."
    said = [prose(" ".join(f["help"].split())) for f in fields]  # a row of a table is one line
    rows = [
        (f"`{f['name']}`", code(f["type"]), code(json.dumps(f["default"], ensure_ascii=False)), text)
        for f, text in zip(fields, said, strict=True)
    ]
    return grid(("field", "type", "default", "meaning"), rows)


def _logged(text: str) -> str:
    """A list when several numbers are explained one after another, else a paragraph."""
    items = re.split(r"; (?=``)", text)
    return "\n".join(f"- {prose(i)}" for i in items) if len(items) > 1 else prose(text)


TAKES = {"spm_gate": "spm"}
"""methods that act on what another one trained"""


def _method(name: str, cls: Any, known: dict[str, Any]) -> list[str]:
    e = example(cls)
    if name in TAKES:
        return _taking(name, cls, known, replace(e, method=TAKES[name], preset="canvas", out="runs/adapters"))
    quick = next((p for p in ("fast", "short") if p in known["presets"]), "")
    lines = [f"unlearn erase {name} {e.target} {e.task}{f' --preset {quick}' if quick else ''}"]
    if "ddpm" in known["presets"]:
        lines.append(f"unlearn erase {name} {EXAMPLES['ddpm'].target} {EXAMPLES['ddpm'].task} --preset ddpm")
    fields = {f["name"]: f["default"] for f in known["fields"]}
    return [
        "Command line:",
        fence("bash", "\n".join([*lines, f"unlearn erase {name} --help"])),
        "Python:",
        fence(
            "python",
            f"from unlearners import erase\nfrom unlearners.methods.{name} import {cls.__name__}\n\n"
            f'folder = erase("{name}", "{e.target}", "{e.task}"{f", preset={json.dumps(quick)}" if quick else ""})\n'
            f'folder = erase({cls.__name__}(), "{e.target}", "{e.other}")  # the same with {e.kind}; here with the defaults',
        ),
        "YAML, here with every default written out; leave out what you do not change:",
        fence("yaml", f"# {name}.yaml\n{_yaml(fields)}"),
        fence("bash", f"unlearn erase {name} {e.target} {e.task} --config {name}.yaml"),
    ]


def _taking(name: str, cls: Any, known: dict[str, Any], e: Example) -> list[str]:
    """The examples of a method whose ``patch`` names a run of another."""
    fields = {f["name"]: f["default"] for f in known["fields"]} | {"patch": e.out}
    return [
        "Command line:",
        fence("bash", f"{e.erase}\nunlearn erase {name} {e.target} {e.task} --patch {e.out}\nunlearn erase {name} --help"),
        "Python:",
        fence(
            "python",
            f"from unlearners import erase\nfrom unlearners.methods.{name} import {cls.__name__}\n\n"
            f'trained = {e.call}\nfolder = erase("{name}", "{e.target}", "{e.task}", patch=str(trained))\n'
            f'folder = erase({cls.__name__}(patch=str(trained)), "{e.target}", "{e.task}")  # the same',
        ),
        "YAML, here with every default written out; leave out what you do not change:",
        fence("yaml", f"# {name}.yaml\n{_yaml(fields)}"),
        fence("bash", f"unlearn erase {name} {e.target} {e.task} --config {name}.yaml"),
    ]


def _attack(name: str, cls: Any, known: dict[str, Any]) -> list[str]:
    e = example(cls)
    quick = " --preset fast" if "fast" in known["presets"] else ""
    fields = {f["name"]: f["default"] for f in known["fields"]}
    return [
        "Command line, on a run folder:",
        fence("bash", f"{e.erase}\nunlearn attack {name} {e.out}{quick}\nunlearn attack {name} --help"),
        "Python:",
        fence(
            "python",
            f"from unlearners import attack, erase\nfrom unlearners.attacks.{name} import {cls.__name__}\n\n"
            f"folder = {e.call}\n"
            f"attack({cls.__name__}(), folder)\n"
            f'attack("{name}", folder{", preset=" + json.dumps("fast") if quick else ""})  # or by name',
        ),
        "YAML, here with every default written out; leave out what you do not change:",
        fence("yaml", f"# {name}.yaml\n{_yaml(fields)}"),
        fence("bash", f"unlearn attack {name} {e.out} --config {name}.yaml"),
    ]


def _metric(name: str, cls: Any, known: dict[str, Any]) -> list[str]:
    e, reads = example(cls), inspect.getsource(cls)
    before, flags, options, imports = [e.erase], "", "", ["erase", "evaluate"]
    calls = [f"folder = {e.call}"]
    methods = [{"name": e.method} | ({"preset": e.preset} if e.preset else {})]
    spec = ({"target": e.target} if e.target != "canvas" else {}) | {"tasks": [e.task], "methods": methods, "metrics": [name]}
    if ".verdicts" in reads:  # what attacks found
        before.append(f"unlearn attack random_tokens {e.out} --preset fast")
        calls.append('attack("random_tokens", folder, preset="fast")')
        imports.insert(0, "attack")
        spec["attacks"] = [{"name": "random_tokens", "preset": "fast"}]
    if ".references" in reads:  # models that never saw the forget set
        retrained = replace(e, method="retrain", out=f"{e.out}-retrained")
        before.append(retrained.erase)
        calls.append(f"retrained = {retrained.call}")
        flags, options = f" --references {retrained.out}", ", references=[retrained]"
        methods.insert(0, {"name": "retrain", "preset": e.preset})
    commands = [*before, f"unlearn evaluate {e.out} --metrics {name}{flags}"]
    calls.append(f"evaluate(folder, metrics=[{cls.__name__}()]{options})")
    return [
        "Command line:",
        fence("bash", "\n".join(commands)),
        "Python; a metric's fields are set on the object:",
        fence(
            "python",
            f"from unlearners import {', '.join(imports)}\nfrom unlearners.metrics.{name} import {cls.__name__}\n\n" + "\n".join(calls),
        ),
        "YAML: the `metrics` of a grid, or the `suite` of a task:",
        fence("yaml", f"# grid-{name}.yaml\n{yaml.safe_dump(spec, sort_keys=False, default_flow_style=None)}".rstrip()),
        fence("bash", f"unlearn bench grid-{name}.yaml"),
    ]


def _judge(name: str, cls: Any, known: dict[str, Any]) -> list[str]:
    probes = [
        {"prompt": "A fish image in photo style.", "truth": {"style": "photo", "object": "fish"}},
        {"prompt": "A cup image in photo style.", "truth": {"style": "photo", "object": "cup"}},
    ]
    spec = {"kind": "object", "concepts": ["fish"], "anchors": ["bird"], "preserve": ["cup"], "judge": name, "probes": probes}
    return [
        "YAML: a task names its judge.",
        fence("yaml", f"# judged-by-{name}.yaml\n{yaml.safe_dump(spec, sort_keys=False)}".rstrip()),
        fence("bash", f"unlearn erase uce canvas judged-by-{name}.yaml"),
        "Python: a judge is an object like the others.",
        fence(
            "python",
            "from dataclasses import replace\n\nfrom unlearners import erase, tasks\n"
            f"from unlearners.judges.{name} import {cls.__name__}\n\n"
            f"judge = {cls.__name__}()\n"
            f'task = replace(tasks.load("canvas/fish"), judge="{name}")\nfolder = erase("uce", "canvas", task)',
        ),
    ]


USES = {"methods": _method, "attacks": _attack, "metrics": _metric, "judges": _judge}


def _yaml(fields: dict[str, Any]) -> str:
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=120)).rstrip()


def overview(kind: str) -> str:
    """The page that lists a kind."""
    rows = [(f"[`{n}`]({n}.md)", prose(registry.summary(kind, n))) for n in registry.names(kind)]
    return "\n\n".join([f"# {KINDS[kind]}", ABOUT[kind], grid(("name", "what it is"), rows)]) + "\n"


def reference() -> str:
    """Targets, tasks and exports."""
    parts = ["# Targets, tasks, exports"]
    for name in registry.names("targets"):
        known = about("targets", name)
        groups = [(f"`{g}`", code(pattern)) for g, pattern in known["groups"].items()]
        parts += [f"## Target `{name}`", prose(_join(known["about"])), grid(("group of weights", "regular expression"), groups)]
    parts.append(
        "Add `:layers=0-3` to `text_encoder` for some of its layers. A regular expression over `component.parameter` is a group too."
    )
    parts += ["## Tasks", "`unlearn list tasks` prints this list, `unlearn show canvas/neon` one task."]
    rows = verbs.List(what="tasks").do(None)["tasks"]
    parts.append(grid(("task", "what it asks"), [(f"`{r['name']}`", prose(r["summary"])) for r in rows]))
    parts.append("## Exports")
    for name in registry.names("exports"):
        known = about("exports", name)
        parts += [f"### {name}", f"{prose(_join(known['about']))} Read by {known['reads']}.", _fields(known["fields"])]
    return "\n\n".join(parts) + "\n"


def python() -> str:
    """The functions of the package."""
    parts = ["# Python functions", "The command line calls these; verbs and functions have the same names and arguments."]
    for name in PUBLIC:
        function = getattr(unlearners, name)
        parts += [
            f"## {name}",
            fence("text", signature(name, function)),
            *(prose(p) for p in _join(inspect.getdoc(function) or "").split("\n\n")),
        ]
    return "\n\n".join(parts) + "\n"


def signature(name: str, function: Any) -> str:
    """How a function is called, one parameter a line when there are many."""
    said, starred = [], False
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            said, starred = [*said, "*"], True
        default = "" if p.default is p.empty else f" = {json.dumps(p.default) if isinstance(p.default, str) else p.default}"
        said.append(f"{'**' if p.kind is p.VAR_KEYWORD else ''}{p.name}: {p.annotation}{default}")
    back = inspect.signature(function).return_annotation
    line = f"{name}({', '.join(said)}) -> {back}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(said) + f",\n) -> {back}"


if __name__ == "__main__":  # look at one: python docs/_build/pages.py methods/esd.md
    print(pages()[sys.argv[1]])
