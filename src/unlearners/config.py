"""Typed loading of plain values: ``build`` makes dataclasses of what YAML, JSON and flags hold, ``to_dict`` goes back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, overload

from .errors import UsageError, unknown

T = TypeVar("T")


@overload
def build(kind: type[T], plain: Any, where: str = "") -> T: ...
@overload
def build(kind: Any, plain: Any, where: str = "") -> Any: ...
def build(kind: Any, plain: Any, where: str = "") -> Any:
    """``plain`` as a ``kind``: a dataclass, union, literal, tuple, list, mapping, str, int, float, bool or None of those.

    Strict: nothing is dropped or guessed. Two conversions are made because they lose nothing: an int becomes a float where
    a float is wanted, and so does the text '1e-5', which is how YAML reads it. ``where`` names the place in errors.
    Raises ``UsageError`` for an unknown or missing key and for a value of the wrong type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return plain
    if kind is None or kind is types.NoneType:
        return _expect(plain is None, plain, where, "empty (null)")
    if origin is Literal:
        if not any(plain == a and plain.__class__ is a.__class__ for a in args):
            raise _choice(plain, where, args)
        return plain
    if origin in (Union, types.UnionType):
        return _union(args, plain, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, plain, where)
    container = origin or kind
    if container in (tuple, list, Sequence):
        return _sequence(container, args, plain, where)
    if container in (dict, Mapping):
        return _mapping(args, plain, where)
    if kind is bool:
        return _expect(isinstance(plain, bool), plain, where, "true or false")
    if kind is int:
        return _expect(isinstance(plain, int) and not isinstance(plain, bool), plain, where, "a whole number")
    if kind is float:
        return _float(plain, where)
    if kind is str:
        return _expect(isinstance(plain, str), plain, where, "text; put it in quotes")
    if isinstance(kind, type) and isinstance(plain, kind):
        return plain
    raise TypeError(f"{where or kind}: config.build cannot make a {kind}")


LATER = "later"


def later(default: Any) -> Any:
    """A dataclass field that was added to one which records already hold: at its default it is left out, so that hashes stay."""
    return dataclasses.field(default=default, metadata={LATER: True})


def to_dict(obj: Any) -> Any:
    """``obj`` as JSON-able values: dataclasses and mappings as dict, tuples and lists as list. ``build`` undoes it."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        shown = [f for f in dataclasses.fields(obj) if f.init and not (LATER in f.metadata and getattr(obj, f.name) == f.default)]
        return {f.name: to_dict(getattr(obj, f.name)) for f in shown}
    if isinstance(obj, Mapping):
        return {str(k): to_dict(v) for k, v in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_dict(v) for v in obj]
    if isinstance(obj, Path):
        return str(obj)
    if obj is None or isinstance(obj, str | int | float):
        return obj
    raise TypeError(f"a {type(obj).__name__} has no place in a configuration")


def content_hash(plain: Any) -> str:
    """SHA-256 (hex) of ``plain`` as canonical JSON: key order does not count, nor whether a whole number is written 1 or 1.0."""
    try:
        text = json.dumps(_canonical(plain), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except ValueError:
        raise UsageError("a setting is infinite or not a number, which no record can hold; give a finite value") from None
    return hashlib.sha256(text.encode()).hexdigest()


def load_yaml(path: str | Path) -> Any:
    """The plain content of a YAML file. Raises ``UsageError`` if it is missing, empty or malformed (with the line), or repeats a key."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        plain = yaml.safe_load(text)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a text file ({error}); check the path") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line} is not valid YAML ({error.problem}); mend it there") from None
    except yaml.YAMLError:  # what is left are control characters
        raise UsageError(f"{path} holds a character that YAML does not allow; save it as plain text") from None
    if plain is None:
        raise UsageError(f"{path} is empty; write 'key: value' lines into it")
    _no_twins(node, path)
    return plain


def _no_twins(node: Any, path: str | Path) -> None:
    """Refuse a mapping with the same key twice: YAML would silently keep the last."""
    if not isinstance(node.value, list):
        return
    seen: set[str] = set()
    for child in node.value:
        pair = child if isinstance(child, tuple) else (child,)
        if len(pair) == 2 and isinstance(pair[0].value, str):
            if pair[0].value in seen:
                raise UsageError(f"{path} line {pair[0].start_mark.line + 1} repeats the key '{pair[0].value}'; keep one of them")
            seen.add(pair[0].value)
        for part in pair:
            _no_twins(part, path)


def _expect(ok: bool, plain: Any, where: str, what: str) -> Any:
    if not ok:
        raise UsageError(f"{where or 'the value'} is {_say(plain)} but must be {what}")
    return plain


def _say(plain: Any) -> str:
    text = json.dumps(plain) if isinstance(plain, bool | str) or plain is None else str(plain)
    return text if len(text) <= 60 else text[:57] + "…"


def _choice(plain: Any, where: str, args: tuple[Any, ...]) -> UsageError:
    if isinstance(plain, str):
        return unknown(where or "value", plain, [str(a) for a in args])
    return UsageError(f"{where or 'the value'} is {_say(plain)} but must be one of {', '.join(str(a) for a in args)}")


def _float(plain: Any, where: str) -> float:
    number = plain
    if isinstance(plain, str) and not plain.strip().strip("+-").isalpha():  # '1e-5' is meant as a number, 'nan' and 'inf' are not
        try:
            number = float(plain)
        except ValueError:
            number = None
    ok = isinstance(number, int | float) and not isinstance(number, bool)
    try:
        return float(_expect(ok and math.isfinite(number), plain, where, "a finite number"))
    except OverflowError:
        raise UsageError(f"{where or 'the value'} is {_say(plain)}, too large for a float; give a smaller number") from None


def _union(args: tuple[Any, ...], plain: Any, where: str) -> Any:
    """The first member that holds ``plain`` unchanged, else the only one that accepts it."""
    fits, errors = [], []
    for member in args:
        try:
            fits.append(build(member, plain, where))
        except UsageError as error:
            errors.append(error)
    same = [f for f in fits if plain.__class__ is f.__class__ and plain == f]
    same = same or [f for f in fits if _canonical(to_dict(f)) == _canonical(plain)]
    if same or len(fits) == 1:
        return (same or fits)[0]
    if fits:
        names = " or ".join(type(f).__name__ for f in fits)
        raise UsageError(f"{where or 'the value'} may be a {names}; give the fields that tell them apart")
    # Optional[X] should complain as X does, and a mapping as the dataclass it was meant for.
    raise errors[0] if len([a for a in args if a is not types.NoneType]) == 1 else _nothing_fits(args, plain, where, errors)


def _nothing_fits(args: tuple[Any, ...], plain: Any, where: str, errors: list[UsageError]) -> UsageError:
    meant = [e for a, e in zip(args, errors, strict=True) if dataclasses.is_dataclass(a) and isinstance(plain, Mapping)]
    names = " or ".join(map(_described, args))
    return meant[0] if len(meant) == 1 else UsageError(f"{where or 'the value'} is {_say(plain)} but must be {names}")


def _described(kind: Any) -> str:
    """A type in words."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    container = typing.get_origin(kind) or kind
    words = {types.NoneType: "null", int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if container in (tuple, list, Sequence):
        return "a list"
    return words.get(container, getattr(container, "__name__", str(container)))


def _dataclass(kind: Any, plain: Any, where: str) -> Any:
    if isinstance(plain, kind):
        return plain
    name = where or kind.__name__
    if not isinstance(plain, Mapping):
        raise UsageError(f"{name} is {_say(plain)} but must be 'key: value' pairs of a {kind.__name__}")
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key in plain:
        if key not in fields:
            raise unknown(f"key of {name}", str(key), fields)
    for f in fields.values():
        if f.name not in plain and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UsageError(f"{name} lacks '{f.name}'; add it")
    prefix = f"{where}." if where else ""
    return kind(**{key: build(hints[key], value, prefix + key) for key, value in plain.items()})


def _sequence(container: Any, args: tuple[Any, ...], plain: Any, where: str) -> Any:
    _expect(isinstance(plain, list | tuple), plain, where, "a list")
    kind = list if container is list else tuple
    if not args:
        return kind(plain)
    if container is tuple and Ellipsis not in args:
        members = () if args == ((),) else args  # Python 3.10 writes tuple[()] this way
        _expect(len(plain) == len(members), plain, where, f"a list of {len(members)}")
    else:
        members = (args[0],) * len(plain)
    return kind(build(m, v, f"{where}[{i}]") for i, (m, v) in enumerate(zip(members, plain, strict=True)))


def _mapping(args: tuple[Any, ...], plain: Any, where: str) -> dict[Any, Any]:
    if not isinstance(plain, Mapping):
        raise UsageError(f"{where or 'the value'} is {_say(plain)} but must be 'key: value' pairs")
    key_type, value_type = args or (Any, Any)
    prefix = f"{where}." if where else ""
    # JSON writes every key as text, so a whole-number key comes back as its digits.
    digits = key_type is int
    keys = {k: int(k) if digits and isinstance(k, str) and k.lstrip("-").isdecimal() else k for k in plain}
    return {build(key_type, keys[k], f"the key {k} of {where}"): build(value_type, v, f"{prefix}{k}") for k, v in plain.items()}


def _canonical(plain: Any) -> Any:
    if isinstance(plain, Mapping):
        return {str(k): _canonical(v) for k, v in plain.items()}
    if isinstance(plain, list | tuple):
        return [_canonical(v) for v in plain]
    return int(plain) if isinstance(plain, float) and plain.is_integer() else plain
