"""The contract matrix: everything in the registry, against every family it serves."""

import pytest

from unlearners import registry, testing


@pytest.mark.parametrize("name", registry.names("targets"))
def test_target(name: str) -> None:
    testing.check_target(registry.get("targets", name))


@pytest.mark.parametrize("name", registry.names("methods"))
def test_method(name: str) -> None:
    testing.check_method(registry.get("methods", name)())


@pytest.mark.parametrize(("name", "preset"), [(n, p) for n in registry.names("methods") for p in registry.get("methods", n).presets])
def test_preset(name: str, preset: str) -> None:
    testing.check_method(registry.make("methods", name, preset=preset))


@pytest.mark.parametrize("name", registry.names("attacks"))
def test_attack(name: str) -> None:
    testing.check_attack(registry.get("attacks", name)())


@pytest.mark.parametrize("name", registry.names("metrics"))
def test_metric(name: str) -> None:
    testing.check_metric(registry.get("metrics", name)())
