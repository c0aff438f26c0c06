"""What there is: a file in methods/, attacks/ … is a registered name, and so is an entry point of ``unlearners.<kind>``.

Listing and summarising read files without importing them, so ``unlearn list`` and ``--help`` stay fast.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import typing
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from . import config
from .errors import UsageError, unknown

KINDS = ("methods", "attacks", "metrics", "judges", "exports", "targets", "tasks", "recipes")
WRITTEN = ("tasks", "recipes")
"""kinds whose things are YAML files, not classes"""
CONTRACTS = {
    "methods": "Method", "attacks": "Attack", "metrics": "Metric", "judges": "Judge", "exports": "Export", "targets": "Target",
}  # fmt: skip
PACKAGE = Path(__file__).parent


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted. Nothing is imported.

    For tasks and recipes these are the YAML files under tasks/ and recipes/ ("cifar10/random10"); an entry point of ``unlearners.tasks``
    names a package whose YAML files are tasks "<entry point>/<file>".
    """
    if kind in WRITTEN:
        return sorted(_written(kind))
    return sorted({*_files(kind), *_plugins(kind)})


def summary(kind: str, name: str) -> str:
    """The first docstring line of the class behind a name, or for a task or recipe its first comment, read without importing it."""
    if kind in WRITTEN:
        head = path(kind, name).read_text(encoding="utf-8").partition("\n")[0]
        return head.removeprefix("#").strip() if head.startswith("#") else ""
    tree = ast.parse(path(kind, name).read_text(encoding="utf-8"))
    public = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    # A helper may stand beside the registered class, which derives from the contract or, for families of targets, from something.
    direct = [n for n in public if any(ast.unparse(b).rpartition(".")[2] == CONTRACTS[kind] for b in n.bases)]
    chosen = direct or [n for n in public if n.bases] or public
    return ((ast.get_docstring(chosen[-1]) if chosen else None) or "").partition("\n")[0].strip()


def path(kind: str, name: str) -> Path:
    """The file behind a registered name: a module, or the YAML of a task or recipe. Raises ``UsageError`` for an unknown name."""
    known = _written(kind) if kind in WRITTEN else _files(kind)
    if name in known:
        return known[name]
    if kind in WRITTEN or name not in (plugins := _plugins(kind)):
        raise unknown(kind.removesuffix("s"), name, names(kind))
    return _origin(plugins[name])


def get(kind: str, name: str) -> type[Any]:
    """The class behind a name; imports its module.

    Raises ``UsageError`` for an unknown name, a name taken twice, or a module without exactly one class of the kind.
    """
    if kind == "recipes":
        raise UsageError(f"recipe '{name}' is a YAML file, not a class; use 'unlearn train {name}'")
    if kind == "tasks":
        raise UsageError(f"task '{name}' is a YAML file, not a class; use unlearners.tasks.load('{name}')")
    files, plugins = _files(kind), _plugins(kind)
    if name in files and name in plugins:
        raise UsageError(f"'{name}' in {kind} is built in and also comes from the plug-in '{plugins[name].value}'; rename the latter")
    if name not in files and name not in plugins:
        raise unknown(kind.removesuffix("s"), name, names(kind))
    if name in plugins:
        _origin(plugins[name])  # a missing module gets a sentence; an error inside it keeps its traceback
    module = importlib.import_module(f"{__package__}.{kind}.{name}" if name in files else plugins[name].module)
    found = [c for n, c in vars(module).items() if isinstance(c, type) and not n.startswith("_") and _serves(kind, c, module.__name__)]
    if len(found) != 1:
        given = ", ".join(c.__name__ for c in found) or "none"
        raise UsageError(f"{module.__name__} must define one public {CONTRACTS[kind]} but has {given}; give each its own file")
    return found[0]


def make(kind: str, name: str, *, preset: str | None = None, **fields: Any) -> Any:
    """An instance of a registered class: its defaults, then those of ``preset``, then ``fields``, checked by ``config.build``."""
    cls = get(kind, name)
    if preset is None:
        return config.build(cls, fields, name)
    presets = cls.presets if kind in ("methods", "attacks", "judges") else {}
    if preset not in presets:
        raise unknown(f"preset of {name}", preset, presets)
    return config.build(cls, {**presets[preset], **fields}, name)


def from_spec(kind: str, spec: str) -> Any:
    """``make`` from one string: "nudenet", "style:model=path/to/vit,top=3", "nudenet:preset=four", "fid:reference=path".

    Behind the colon are fields, as name=value with commas between; a value is written as in YAML. What is no such pair is the field
    ``model``: "classifier:path/to/model". Raises ``UsageError`` for an unknown name, preset or field and for a value that does not fit.
    """
    name, _, rest = spec.partition(":")
    fields: dict[str, Any] = {}
    for part in re.split(r",(?=\w+=)", rest) if rest else ():
        pair = re.fullmatch(r"(\w+)=(.*)", part, re.DOTALL)
        key, value = pair.groups() if pair else ("model", part)
        text = key == "preset" or typing.get_type_hints(get(kind, name)).get(key) is str
        fields[key] = value if text else _value(spec, value)
    return make(kind, name, **fields)


def _value(spec: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"'{text}' in '{spec}' cannot be read; write field=value with commas between") from None


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)


def _files(kind: str) -> dict[str, Path]:
    _check(kind)
    return {p.stem: p for p in (PACKAGE / kind).glob("*.py") if not p.stem.startswith("_") and p.stem != "base"}


def _plugins(kind: str) -> dict[str, EntryPoint]:
    _check(kind)
    return _installed(kind, tuple(sys.path))


@lru_cache
def _installed(kind: str, paths: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Asked once for each ``sys.path``: it reads the metadata of every installed package."""
    return {e.name: e for e in entry_points(group=f"unlearners.{kind}")}


def _written(kind: str) -> dict[str, Path]:
    found = dict(_yaml(PACKAGE / kind, ""))
    for name, plugin in _plugins(kind).items():
        found.update(_yaml(_origin(plugin).parent, f"{name}/"))
    return found


def _yaml(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    for p in folder.rglob("*.yaml"):
        yield prefix + p.relative_to(folder).with_suffix("").as_posix(), p


def _origin(plugin: EntryPoint) -> Path:
    """The source file of a plug-in's module (of a package: its __init__.py), without importing the module itself."""
    try:
        spec = importlib.util.find_spec(plugin.module)
    except ImportError:  # a parent package of it is missing
        spec = None
    if spec is None or spec.origin is None:
        raise UsageError(f"plug-in '{plugin.name}' names the module '{plugin.module}', which is not there; reinstall its package")
    return Path(spec.origin)


def _serves(kind: str, cls: type, module: str) -> bool:
    """Whether ``cls`` is defined in ``module`` and fulfils the contract of ``kind``, found by name so that base.py need not be imported."""
    is_contract = {(b.__name__, b.__module__.startswith(f"{__package__}.")) for b in cls.__mro__[1:]}
    return cls.__module__ == module and (CONTRACTS[kind], True) in is_contract
