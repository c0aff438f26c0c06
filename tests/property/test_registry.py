"""registry: a file is a registration, an installed entry point is one too, and listing imports neither."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unlearners import registry
from unlearners.errors import UsageError

CLASSES = [k for k in registry.KINDS if k not in registry.WRITTEN]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_file_is_a_name_with_a_class_and_a_summary(kind: str) -> None:
    files = {p.stem for p in (registry.PACKAGE / kind).glob("*.py")} - {"__init__", "base"}
    listed = registry.names(kind)
    assert listed == sorted(listed)
    assert {n for n in files if not n.startswith("_")} <= set(listed)
    for name in listed:
        cls = registry.get(kind, name)
        assert cls.__module__.rpartition(".")[2] == name
        assert registry.summary(kind, name) == (cls.__doc__ or "").strip().partition("\n")[0].strip() != ""


def test_tasks_are_the_yaml_files() -> None:
    folder = registry.PACKAGE / "tasks"
    assert {p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")} <= set(registry.names("tasks"))
    for name in registry.names("tasks"):
        assert registry.path("tasks", name).is_file()
    with pytest.raises(UsageError, match="YAML file"):
        registry.get("tasks", "canvas/neon")


def test_recipes_are_the_yaml_files() -> None:
    folder = registry.PACKAGE / "recipes"
    assert {p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")} <= set(registry.names("recipes"))
    with pytest.raises(UsageError, match="unlearn train"):
        registry.get("recipes", "cifar10/resnet18")


@pytest.mark.parametrize("kind", CLASSES)
def test_unknown_names_are_refused_in_one_sentence(kind: str) -> None:
    for call in (registry.get, registry.summary, registry.path):
        with pytest.raises(UsageError, match=r"unknown .* 'no_such_thing'"):
            call(kind, "no_such_thing")
    with pytest.raises(UsageError, match="did you mean methods"):
        registry.names("method")


def test_listing_imports_no_torch_and_no_registered_module() -> None:
    code = """
import sys
from unlearners import registry, config
for kind in registry.KINDS:
    for name in registry.names(kind):
        registry.summary(kind, name)
prefixes = tuple(f"unlearners.{k}." for k in registry.KINDS)
loaded = [m for m in sys.modules if m == "torch" or m.startswith(prefixes)]
assert not loaded, loaded
"""
    env = {**os.environ, "PYTHONPATH": str(registry.PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


METHOD = '''
"""A plug-in."""
from dataclasses import dataclass

from unlearners.base import Method, Target


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A helper, not the method."""

    width: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Plugged(Method):
    """Does nothing, politely.

    Deviations: none."""

    paper, needs = "none", Target
    presets = {"release": {"lr": 0.5, "steps": 3}}
    params: str = "full"
    lr: float = 0.1
    steps: int = 1
    settings: Settings = Settings()

    def run(self, target, task):
        yield {}
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution with entry points, as pip would leave it on the path."""
    package, info = tmp_path / "plugged_pkg", tmp_path / "plugged-1.0.dist-info"
    (package / "tasks").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "plugged_file.py").write_text(METHOD)
    (package / "two.py").write_text(METHOD + METHOD.replace("Plugged", "Twin"))
    (package / "tasks" / "__init__.py").write_text("")
    (package / "tasks" / "fog.yaml").write_text("# Forget fog\nname: fog\nconcepts: [fog]\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[unlearners.methods]\n"
        "plugged = plugged_pkg.plugged_file\ntwo = plugged_pkg.two\ngone = plugged_pkg.gone\nnowhere = no_such_pkg.x\n"
        "[unlearners.tasks]\nmine = plugged_pkg.tasks\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [m for m in sys.modules if m.startswith("plugged_pkg")]:
        del sys.modules[name]


def test_entry_points_are_found_and_built(plugin: Path) -> None:
    assert "plugged" in registry.names("methods")
    assert registry.summary("methods", "plugged") == "Does nothing, politely."
    assert "plugged_pkg.plugged_file" not in sys.modules, "listing must not import"
    assert registry.get("methods", "plugged").__name__ == "Plugged"
    assert registry.make("methods", "plugged").lr == 0.1
    tuned = registry.make("methods", "plugged", preset="release", steps=7, settings={"width": "2e0"})
    assert (tuned.lr, tuned.steps, tuned.settings.width) == (0.5, 7, 2.0)
    assert registry.path("methods", "plugged") == plugin / "plugged_file.py"


def test_entry_point_tasks(plugin: Path) -> None:
    assert "mine/fog" in registry.names("tasks")
    assert registry.path("tasks", "mine/fog") == plugin / "tasks" / "fog.yaml"
    assert registry.summary("tasks", "mine/fog") == "Forget fog"


def test_bad_requests_to_a_plugin(plugin: Path) -> None:
    with pytest.raises(UsageError, match="did you mean plugged"):
        registry.get("methods", "pluged")
    with pytest.raises(UsageError, match="unknown preset of plugged 'relase'; did you mean release"):
        registry.make("methods", "plugged", preset="relase")
    with pytest.raises(UsageError, match="unknown key of plugged 'step'; did you mean steps"):
        registry.make("methods", "plugged", step=1)
    with pytest.raises(UsageError, match="one public Method but has Plugged, Twin"):
        registry.get("methods", "two")
    for name in ("gone", "nowhere"):
        with pytest.raises(UsageError, match="reinstall its package"):
            registry.get("methods", name)


def test_a_plugin_must_not_take_a_built_in_name(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PACKAGE", plugin)
    (plugin / "methods").mkdir()
    (plugin / "methods" / "plugged.py").write_text(METHOD)
    with pytest.raises(UsageError, match="built in and also comes from the plug-in"):
        registry.get("methods", "plugged")
