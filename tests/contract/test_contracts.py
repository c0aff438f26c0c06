"""The contract matrix: everything in the registry, against every family it serves."""

from collections.abc import Callable

import pytest

from unlearners import registry, testing
from unlearners.base import Method, Task
from unlearners.run import erase


@pytest.mark.parametrize("name", registry.names("targets"))
def test_target(name: str) -> None:
    testing.check_target(registry.get("targets", name))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Method]:
    """``made(name, preset=…)``: a method; one that acts on the adapters of another run gets such a run."""
    task = Task(name="t", kind="style", concepts=("zq",))

    def make(name: str, **how: str) -> Method:
        if name == "spm_gate":
            quick = testing.quick(registry.make("methods", "spm", lr=0.1))
            how["patch"] = str(erase(quick, "tiny", task, runs=tmp_path_factory.mktemp("adapters")))
        found: Method = registry.make("methods", name, **how)
        return found

    return make


@pytest.mark.parametrize("name", registry.names("methods"))
def test_method(name: str, made: Callable[..., Method]) -> None:
    testing.check_method(made(name))


@pytest.mark.parametrize(("name", "preset"), [(n, p) for n in registry.names("methods") for p in registry.get("methods", n).presets])
def test_preset(name: str, preset: str, made: Callable[..., Method]) -> None:
    testing.check_method(made(name, preset=preset))


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_attack(name: str) -> None:
    testing.check_attack(registry.get("attacks", name)())


@pytest.mark.parametrize("name", registry.names("metrics"))
def test_metric(name: str) -> None:
    testing.check_metric(registry.get("metrics", name)())
