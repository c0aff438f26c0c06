"""config: what is written comes back the same, and what is wrong is refused with a hint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from unlearners import config
from unlearners.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 30
    lr: float = 1e-2
    where: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Other:
    radius: float


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    mode: Literal["x", "noxattn", 3] = "x"
    lr: float = 1e-5
    steps: int = 1000
    on: bool = False
    limit: int | None = None
    either: int | str | bool = 0
    seeds: tuple[int, ...] = (1, 2)
    pair: tuple[float, str] = (0.0, "")
    words: list[str] = field(default_factory=list)
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    choice: Inner | Other | None = None
    table: dict[str, tuple[float, ...]] = field(default_factory=dict)


finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(max_size=8)
integers = st.integers(-(2**60), 2**60)
inner = st.builds(Inner, steps=integers, lr=finite, where=st.dictionaries(text, text, max_size=3))
outer = st.builds(
    Outer,
    name=text,
    mode=st.sampled_from(["x", "noxattn", 3]),
    lr=finite,
    steps=integers,
    on=st.booleans(),
    limit=st.none() | integers,
    either=integers | text | st.booleans(),
    seeds=st.lists(integers, max_size=3).map(tuple),
    pair=st.tuples(finite, text),
    words=st.lists(text, max_size=3),
    inner=inner,
    inners=st.lists(inner, max_size=2).map(tuple),
    choice=st.none() | inner | st.builds(Other, radius=finite),
    table=st.dictionaries(text, st.lists(finite, max_size=2).map(tuple), max_size=2),
)


@given(outer)
def test_round_trip_through_json(x: Outer) -> None:
    plain = config.to_dict(x)
    assert config.build(Outer, plain) == x
    assert config.build(Outer, json.loads(json.dumps(plain))) == x
    assert config.to_dict(config.build(Outer, plain)) == plain


@given(outer)
def test_round_trip_through_yaml(x: Outer) -> None:
    assert config.build(Outer, yaml.safe_load(yaml.safe_dump(config.to_dict(x)))) == x


@given(outer, st.randoms(use_true_random=False))
def test_hash_does_not_depend_on_key_order(x: Outer, random: Any) -> None:
    def shuffled(plain: Any) -> Any:
        if isinstance(plain, dict):
            items = [(k, shuffled(v)) for k, v in plain.items()]
            random.shuffle(items)
            return dict(items)
        return [shuffled(v) for v in plain] if isinstance(plain, list) else plain

    plain = config.to_dict(x)
    assert config.content_hash(shuffled(plain)) == config.content_hash(plain)


@given(outer, outer, st.sampled_from([f.name for f in fields(Outer)]))
def test_hash_tells_apart_what_differs(x: Outer, y: Outer, name: str) -> None:
    changed = replace(x, **{name: getattr(y, name)})
    same = json.dumps(config.to_dict(changed)) == json.dumps(config.to_dict(x))
    if same:
        assert config.content_hash(config.to_dict(changed)) == config.content_hash(config.to_dict(x))
    elif changed != x:  # 0.0 and -0.0 are written differently and are equal
        assert config.content_hash(config.to_dict(changed)) != config.content_hash(config.to_dict(x))


CHANGES: dict[str, Any] = {
    "name": "b", "mode": "noxattn", "lr": 2e-5, "steps": 1001, "on": True, "limit": 0, "either": False, "seeds": (2, 1), "pair": (0.0, "x"),
    "words": [""], "inner": Inner(lr=1e-3), "inners": (Inner(),), "choice": Inner(), "table": {"a": ()},
}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in fields(Outer)])
def test_every_field_changes_the_hash(name: str) -> None:
    x = Outer(name="a")
    assert config.content_hash(config.to_dict(replace(x, **{name: CHANGES[name]}))) != config.content_hash(config.to_dict(x))


def test_yaml_exponent_text_becomes_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nlr: 1e-5\n")
    plain = config.load_yaml(tmp_path / "a.yaml")
    assert plain["lr"] == "1e-5"  # the trap: YAML 1.1 wants 1.0e-5
    built = config.build(Outer, plain)
    assert built.lr == 1e-5
    assert isinstance(built.lr, float)


def test_int_for_float_is_the_same_run() -> None:
    assert isinstance(config.build(Outer, {"name": "a", "lr": 1}).lr, float)
    assert config.content_hash(config.to_dict(Outer(name="a", lr=1))) == config.content_hash(config.to_dict(Outer(name="a", lr=1.0)))


@pytest.mark.parametrize(
    ("plain", "says"),
    [
        ({"steps": True}, "steps is true"),
        ({"lr": False}, "lr is false"),
        ({"steps": 10.0}, "steps is 10.0"),
        ({"steps": "10"}, "whole number"),
        ({"on": 1}, "on is 1"),
        ({"limit": True}, "limit is true"),
        ({"seeds": [1, True]}, r"seeds\[1\] is true"),
        ({"seeds": 5}, "seeds is 5 but must be a list"),
        ({"seeds": "12"}, "must be a list"),
        ({"pair": [1.0]}, "a list of 2"),
        ({"lr": "fast"}, "finite number"),
        ({"lr": "nan"}, "finite number"),
        ({"lr": math.nan}, "finite number"),
        ({"lr": math.inf}, "finite number"),
        ({"lr": 10**400}, "too large"),
        ({"lr": None}, "lr is null"),
        ({"name": 1984}, "put it in quotes"),
        ({"mode": "noxatn"}, "did you mean noxattn"),
        ({"mode": 3.0}, "must be one of x, noxattn, 3"),
        ({"stepz": 1}, "unknown key of Outer 'stepz'; did you mean steps"),
        ({"inner": {"step": 1}}, "unknown key of inner 'step'; did you mean steps"),
        ({"inners": [{"lr": 1}, {"lr": "x"}]}, r"inners\[1\].lr"),
        ({"inner": 3}, "inner is 3"),
        ({"inner": {"where": {"a": 1}}}, "inner.where.a is 1"),
        ({"choice": {"radius": "x"}}, "choice"),
        ({7: 1}, "unknown key of Outer '7'"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(plain: dict[Any, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        config.build(Outer, {"name": "a", **plain})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_and_misplaced() -> None:
    with pytest.raises(UsageError, match="Outer lacks 'name'"):
        config.build(Outer, {})
    with pytest.raises(UsageError, match="Outer is"):
        config.build(Outer, ["name"])
    with pytest.raises(UsageError, match="finite"):
        config.content_hash({"lr": math.nan})


def test_the_project_s_own_types_round_trip() -> None:
    from unlearners.base import Data, Probe, Task

    task = Task(name="t", concepts=("a",), probes=(Probe(prompt="an a", truth={"object": "a"}),), forget=Data(source="s", rows="class=a"))
    assert config.build(Task, json.loads(json.dumps(config.to_dict(task)))) == task
    with pytest.raises(UsageError, match="did you mean concepts"):
        config.build(Task, {"name": "t", "concept": ["a"]})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "line 3"),
        ("a: 1\nb: 2\na: 3\n", "line 3 repeats the key 'a'"),
        ("a:\n  - {x: 1, x: 2}\n", "line 2 repeats the key 'x'"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("a: \x07\n", "does not allow"),
        ("# nothing\n", "is empty"),
    ],
)
def test_malformed_yaml(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UsageError, match=says) as caught:
        config.load_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_yaml_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        config.load_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match="text file"):
        config.load_yaml(tmp_path / "b.yaml")
    with pytest.raises(UsageError, match="text file"):
        config.load_yaml(tmp_path)
