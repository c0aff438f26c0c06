"""What there is to choose from, by name: the words of ``unlearn list``, ``show`` and ``--help``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from . import config, registry

FACTS: dict[str, tuple[str, ...]] = {
    "methods": ("paper", "presets"),
    "attacks": ("paper", "access", "presets"),
    "metrics": ("paper", "higher_is_better", "version"),
    "judges": ("paper", "presets"),
    "exports": ("reads",),
    "targets": ("groups",),
}


def canonical(kind: str, name: str) -> str:
    """Names may be written with hyphens; files have underscores."""
    return name if kind in registry.WRITTEN else name.replace("-", "_")


def known(kind: str) -> dict[str, str]:
    """Every name of a kind with its one line. Tasks that are made by code need torch; nothing else does."""
    files = {n: registry.summary(kind, n) for n in registry.names(kind)}
    if kind != "tasks":
        return files
    from . import tasks

    made = {n: tasks.load(n) for n in tasks.names()}
    about = {n: f"forget the {t.kind} {', '.join(t.concepts)}" for n, t in made.items()}
    return {**about, **{n: s for n, s in files.items() if s}, **tasks.protocols()}


def names(kind: str) -> list[str]:
    """Every name of a kind, as ``known`` has them, without reading what each is about."""
    if kind != "tasks":
        return registry.names(kind)
    from . import tasks

    return [*tasks.names(), *tasks.protocols()]


def lines(kind: str, names: Mapping[str, str]) -> str:
    width = max(map(len, names), default=0) + 2
    return "\n".join([f"{kind}:", *(f"  {n:{width}}{about}".rstrip() for n, about in names.items())])


def about(kind: str, name: str) -> dict[str, Any]:
    """Everything that is known of a name, for --json and for people."""
    about: dict[str, Any] = {"kind": kind, "name": name, "summary": known(kind)[name] if kind == "tasks" else registry.summary(kind, name)}
    if kind == "tasks":
        from . import tasks

        if name in tasks.protocols():  # a task once a source is named
            return about | {"about": about["summary"], "fields": []}
        return about | {"task": config.to_dict(tasks.load(name))}
    if kind == "recipes":
        return about | {"recipe": config.load_yaml(registry.path(kind, name))}
    cls = registry.get(kind, name)
    facts = {fact: getattr(cls, fact) for fact in FACTS[kind]}
    needs = {"needs": cls.needs.__name__} if kind in ("methods", "attacks", "metrics") else {}
    return about | config.to_dict(facts) | needs | {"about": inspect.getdoc(cls) or "", "fields": _fields(cls)}  # type: ignore[no-any-return]


def _fields(cls: type[Any]) -> list[dict[str, Any]]:
    """Name, type, default and help of each field; help is the text under the field in the source."""
    if not dataclasses.is_dataclass(cls):
        return []
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
            for line, after in itertools.pairwise(body):
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
                    helps[line.target.id] = str(ast.literal_eval(after.value))
    made = config.build(cls, {}, cls.__name__)
    rows = [f for f in dataclasses.fields(cls) if f.init]
    usual = {f.name: config.to_dict(getattr(made, f.name)) for f in rows}
    types = {f.name: str(f.type).replace("Auto", "auto") for f in rows}
    return [{"name": n, "type": kind, "default": usual[n], "help": helps.get(n, "")} for n, kind in types.items()]


def sheet(about: Mapping[str, Any]) -> str:
    lines = [f"{about['name']} ({about['kind'].removesuffix('s')})", ""]
    if "task" in about:
        task = {**about["task"], "probes": f"{len(about['task']['probes'])} prompts (--json prints them)"}
        return "\n".join([*lines, json.dumps(task, indent=2, ensure_ascii=False)])
    if "recipe" in about:
        return "\n".join([about["name"] + " (recipe)", "", about["summary"], "", json.dumps(about["recipe"], indent=2, ensure_ascii=False)])
    lines += [about["about"], ""]
    lines += [f"{key}: {about[key]}" for key in ("paper", "access", "needs", "higher_is_better", "version", "reads") if about.get(key)]
    lines += [f"group {name}: {pattern}" for name, pattern in about.get("groups", {}).items()]
    lines += [f"preset {name}: {settings({'name': '', **fields}) or 'the defaults'}" for name, fields in about.get("presets", {}).items()]
    width = max((len(f["name"]) for f in about["fields"]), default=0) + 2
    lines.append("")
    for f in about["fields"]:
        lines.append(f"--{f['name'].replace('_', '-'):{width}}{f['type']} = {json.dumps(f['default'])}")
        if f["help"]:
            lines.append(f"{'':{width + 2}}{f['help']}")
    return "\n".join(lines).strip()


def short(value: Any) -> str:
    """A value of a field for a person; a long list as its first entries and their number."""
    if isinstance(value, list | tuple) and len(value) > 6:
        return f"{', '.join(map(str, value[:6]))}, … ({len(value)} in all)"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def settings(part: Mapping[str, Any]) -> str:
    return " ".join([part["name"], *(f"{k}={v}" for k, v in part.items() if k != "name")]).strip()
