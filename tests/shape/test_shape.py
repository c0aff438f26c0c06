"""The shape of the source: one class a file, its paper and deviations named, short files, imports in one direction."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from unlearners.registry import CONTRACTS, PACKAGE

FOLDERS = ("methods", "attacks", "metrics", "judges", "exports")
# Each layer may use the ones before it and, unless it is in SIBLINGS, its own.
LAYERS = (
    {"errors"},
    {"registry", "config", "patch", "diffusion", "finite", "meter", "noise_process", "sandbox", "schedulers"},
    {"task"},
    {"base"},
    {
        "attention",
        "banks",
        "clip_maps",
        "closed_form",
        "data",
        "files",
        "imports",
        "inversion",
        "keep",
        "latents",
        "ldm",
        "lora",
        "lora_files",
        "nets",
        "optim",
    }
    | {"neighbours", "places", "pool", "retain", "saliency", "single_layer"},
    {"session"},
    {"targets", "tasks", "judges"},
    {"attacks", "metrics"},
    {"methods"},
    {"outputs"},
    {"run"},
    {"train", "adopt"},
    {"workers", "board", "tables"},
    {"grids"},
    {"bench", "report", "report_attacks", "report_commands", "report_pictures", "report_tables"}
    | {"exports", "app", "patches", "demo", "flags", "plots", "testing"},
    {"listing"},
    {"verbs"},
    {"cli"},
    {"__main__"},
)
SIBLINGS = {"targets", "tasks", "judges", "attacks", "metrics", "methods", "exports"}
# Checks what the zoo ships by loading it as users do, so it stands above everything, though it lies beside the recipes.
VERIFY = ("zoo", "canvas", "verify")
ZOO_USERS = {"data", "targets", "tasks", "judges", "metrics", "verbs", "bench", "zoo"}


def registered(*kinds: str) -> list[Path]:
    return sorted(p for k in kinds for p in (PACKAGE / k).glob("*.py") if not p.stem.startswith("_") and p.stem != "base")


def names(paths: list[Path]) -> list[str]:
    return [p.relative_to(PACKAGE).as_posix() for p in paths]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def public_classes(path: Path) -> list[ast.ClassDef]:
    return [n for n in tree(path).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]


def each(*kinds: str) -> pytest.MarkDecorator:
    paths = registered(*kinds)
    return pytest.mark.parametrize("path", paths, ids=names(paths))


@each(*FOLDERS)
def test_one_public_class_that_fulfils_the_contract(path: Path) -> None:
    classes = public_classes(path)
    assert len(classes) == 1, f"{path.name} must define one public class and has {[c.name for c in classes]}; start a helper's name with _"
    bases = {ast.unparse(b).rpartition(".")[2] for b in classes[0].bases}
    assert CONTRACTS[path.parent.name] in bases, f"{classes[0].name} must derive from {CONTRACTS[path.parent.name]} itself, not {bases}"


@each("methods", "attacks", "metrics", "judges")
def test_the_class_is_a_frozen_keyword_only_dataclass(path: Path) -> None:
    (cls,) = public_classes(path)
    written = [ast.unparse(d) for d in cls.decorator_list]
    assert [d for d in written if "dataclass(" in d and "frozen=True" in d and "kw_only=True" in d], f"{cls.name} has {written}"


@each("methods", "attacks")
def test_the_paper_is_named(path: Path) -> None:
    (cls,) = public_classes(path)
    assigned = dict(_assignments(cls))
    assert "paper" in assigned, f"{cls.name} must assign paper"
    value = assigned["paper"]
    assert isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.strip(), f"{cls.name}.paper must be text"


def _assignments(cls: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    yield from ((t.id, v) for t, v in zip(target.elts, node.value.elts, strict=True) if isinstance(t, ast.Name))


@each(*FOLDERS)
def test_the_class_explains_itself(path: Path) -> None:
    (cls,) = public_classes(path)
    doc = ast.get_docstring(cls)
    assert doc and doc.partition("\n")[0].strip(), f"{cls.name} needs a docstring"
    assert len(doc.partition("\n")[0]) <= 140
    if path.parent.name == "methods":
        assert "Deviations" in doc, f"{cls.name} must say how it deviates from the authors' code; write 'Deviations: none' if so"


@each("methods", "attacks", "metrics", "judges")
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 200


def test_base_is_short() -> None:
    """Lines that hold code; blank lines, comments and docstrings are free."""
    path = PACKAGE / "base.py"
    used: set[int] = set()
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in skip:
            used |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            used -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    assert len(used) <= 350


# --- import direction ---------------------------------------------------------------------------------------------
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, module path inside the package) of every import of our own, at the top or inside a function."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            own = [tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "unlearners"]
            yield from ((node.lineno, parts) for parts in own)
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                root = here[: len(here) - node.level + 1] + module
            elif module[0] == "unlearners":
                root = module[1:]
            else:
                continue
            for alias in node.names:
                full = (*root, alias.name)
                is_module = (PACKAGE.joinpath(*full)).is_dir() or PACKAGE.joinpath(*full).with_suffix(".py").is_file()
                yield node.lineno, full if is_module or not root else root


def layer(part: str) -> int:
    for i, members in enumerate(LAYERS):
        if part in members:
            return i
    raise AssertionError(f"'{part}' has no layer; add it to LAYERS in {Path(__file__).name}")


def forbidden(path: Path, target: tuple[str, ...]) -> str:
    """Why ``path`` must not import ``target``; "" when it may."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    source, stem = parts[0], parts[-1]
    part = target[0] if target else ""
    if source == "__init__":
        return ""  # the public names
    if part == "__version__":
        return ""
    if not part or not ((PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()):
        return "a module must import from the one that defines the name, not from the package"
    if parts == VERIFY:
        return ""
    if target[:3] == VERIFY:
        return "" if source in ("verbs", "bench") else "only verbs and bench may use the zoo's verification"
    if part == "zoo":
        return "" if source in ZOO_USERS else f"only {', '.join(sorted(ZOO_USERS))} may use the zoo"
    if source == "zoo":
        return "" if part in ("errors", "patch") else "the zoo stands alone: it may use errors and patch only"
    if part == source and source in SIBLINGS:
        own = target[1] if len(target) > 1 else "__init__"
        shared = own == "base" or own.startswith("_")
        return "" if shared or stem == "__init__" else f"siblings in {source} never import each other; share through base.py"
    if layer(part) > layer(source):
        return f"{source} comes before {part}"
    if layer(part) == layer(source) and source in SIBLINGS and part in SIBLINGS:
        return f"{source} and {part} are siblings"
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_imports_point_one_way(path: Path) -> None:
    wrong = [f"line {line}: imports {'.'.join(t)}: {why}" for line, t in imported(path) if (why := forbidden(path, t))]
    assert not wrong, f"{path.relative_to(PACKAGE)} " + "; ".join(wrong)


@pytest.mark.parametrize(
    ("path", "target", "allowed"),
    [
        ("methods/a.py", "attacks.x", True),
        ("methods/a.py", "base", True),
        ("methods/a.py", "targets.base", True),
        ("methods/a.py", "methods.b", False),
        ("methods/a.py", "run", False),
        ("methods/a.py", "zoo.canvas", False),
        ("attacks/a.py", "methods.b", False),
        ("attacks/a.py", "metrics.b", False),
        ("targets/a.py", "targets.base", True),
        ("targets/a.py", "judges.b", False),
        ("targets/a.py", "zoo.canvas.verify", False),
        ("targets/__init__.py", "targets.a", True),
        ("base.py", "config", True),
        ("base.py", "targets.a", False),
        ("config.py", "base", False),
        ("errors.py", "config", False),
        ("run.py", "methods.a", True),
        ("run.py", "report", False),
        ("exports/a.py", "run", True),
        ("judges/a.py", "zoo.canvas", True),
        ("zoo/canvas/a.py", "base", False),
        ("zoo/canvas/a.py", "zoo.canvas.b", True),
        ("cli.py", "report", True),
    ],
)
def test_the_rule_itself(path: str, target: str, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in {p for members in LAYERS for p in members} | {"zoo"}:
        (tmp_path / f"{part}.py").touch()
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert (forbidden(tmp_path / path, tuple(target.split("."))) == "") is allowed
