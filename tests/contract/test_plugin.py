"""A method in a package of its own, found by its entry point, is like one of ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unlearners import registry, run, targets, tasks, testing
from unlearners.errors import UsageError

METHOD = '''"""A third party's method."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from unlearners.base import Method, Row, Task
from unlearners.targets.base import TextToImage


@dataclass(frozen=True, kw_only=True)
class Shrink(Method):
    """Shrink the weights that read the text.

    Deviations from the authors' code: none."""

    paper: ClassVar[str] = "arXiv:0000.00000"
    needs: ClassVar[type] = TextToImage
    presets: ClassVar = {"strong": {"factor": 0.1}}

    params: str = "xattn-kv"
    """weights to shrink"""
    factor: float = 0.9
    """what they are multiplied with"""
    steps: int = 5
    """how often"""

    def run(self, target: TextToImage, task: Task) -> Iterator[Row]:
        chosen = target.select(self.params)
        for _ in target.steps(self.steps):
            with torch.no_grad():
                for p in chosen.values():
                    p.mul_(self.factor)
            yield {"norm": sum(p.norm().item() for p in chosen.values())}
'''
GREEDY = METHOD.replace("Shrink", "Greedy").replace("target.select(self.params)", "target.named()")
TASK = "# Forget purple haze\nkind: style\nconcepts: [purple haze]\nanchors: [art]\njudge: clip_zero_shot\n"
ENTRY = """[unlearners.methods]
shrink = acme_unlearning.shrink
greedy = acme_unlearning.greedy

[unlearners.tasks]
acme = acme_unlearning.tasks
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package in it, as pip leaves one."""
    site = tmp_path_factory.mktemp("site")
    files = {
        "acme_unlearning/__init__.py": "raise_if_imported = True\n",
        "acme_unlearning/shrink.py": METHOD,
        "acme_unlearning/greedy.py": GREEDY,
        "acme_unlearning/tasks/__init__.py": "",
        "acme_unlearning/tasks/haze.yaml": TASK,
        "acme_unlearning-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme-unlearning\nVersion: 1.0\n",
        "acme_unlearning-1.0.dist-info/entry_points.txt": ENTRY,
    }
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    return site


@pytest.fixture
def package(site: Path) -> Iterator[None]:
    """The package is on the path."""
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(site))
    importlib.invalidate_caches()
    for name in [n for n in sys.modules if n.partition(".")[0] == "acme_unlearning"]:
        del sys.modules[name]


@pytest.mark.usefixtures("package")
def test_it_is_listed_without_being_imported() -> None:
    assert {"shrink", "greedy", "esd", "uce"} <= set(registry.names("methods"))
    assert registry.summary("methods", "shrink") == "Shrink the weights that read the text."
    assert "acme_unlearning.shrink" not in sys.modules


@pytest.mark.usefixtures("package")
def test_it_is_made_by_name_with_presets_and_fields() -> None:
    assert registry.make("methods", "shrink").factor == 0.9
    assert registry.make("methods", "shrink", preset="strong", steps=2).factor == 0.1
    with pytest.raises(UsageError, match="factor"):
        registry.make("methods", "shrink", facto=0.5)
    with pytest.raises(UsageError, match="did you mean shrink"):
        registry.make("methods", "shrnk")


@pytest.mark.usefixtures("package")
def test_it_passes_the_contract() -> None:
    testing.check_method(registry.make("methods", "shrink"))


@pytest.mark.usefixtures("package")
def test_the_contract_tells_a_bad_one() -> None:
    with pytest.raises(AssertionError, match="outside its selection"):
        testing.check_method(registry.make("methods", "greedy"))


@pytest.mark.usefixtures("package")
def test_it_erases_and_its_task_is_found(tmp_path: Path) -> None:
    assert "acme/haze" in tasks.names()
    assert registry.summary("tasks", "acme/haze") == "Forget purple haze"
    task = tasks.load("acme/haze")
    assert (task.name, task.concepts) == ("acme/haze", ("purple haze",))
    folder = run.erase("shrink", "tiny", "acme/haze", runs=tmp_path, steps=1, factor=0.5)
    assert folder.name.startswith("acme-haze-shrink-")
    plain, shrunk = targets.load("tiny").select("xattn-kv"), targets.load(str(folder)).select("xattn-kv")
    assert all(((plain[n] * 0.5) == shrunk[n]).all() for n in plain)


def test_without_the_package_it_is_unknown() -> None:
    with pytest.raises(UsageError, match="unknown method 'shrink'"):
        registry.get("methods", "shrink")
    with pytest.raises(UsageError, match="unknown task 'acme/haze'"):
        tasks.load("acme/haze")
