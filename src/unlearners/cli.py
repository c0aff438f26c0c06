"""The command line: its words are read by tyro, the verbs do the work."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any

import tyro
from tyro.conf import DisallowNone, FlagCreatePairsOff, PositionalMetavarFromFieldName

from . import __version__, config, listing, registry, verbs
from .errors import UnlearnError, UsageError, unknown

YIELDING = {"retain", "test"}
"""flags of erase that make way for a method's own of the same name"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 for a failure, 2 for a wrong request, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json, resumes = "--json" in words, False
    try:
        if not words or words[0] in ("-h", "--help"):
            print(_help())
            return 0
        if words[0] in ("-V", "--version"):
            print(f"unlearn {__version__}")
            return 0
        if words[0] not in verbs.VERBS:
            raise unknown("verb", words[0], verbs.VERBS)
        resumes = verbs.VERBS[words[0]].resumes
        # Libraries print what they like: with --json everything but the one object goes to stderr.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            verb, part = _parse(words[0], words[1:], quiet=as_json)
            result = verb.do(part)
        print(json.dumps(result, default=str)) if as_json else verb.say(result)
        return 1 if result.get("failed") or result.get("short") else 0
    except UnlearnError as error:
        return _fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt:
        return _fail("stopped; the same command resumes" if resumes else "stopped", 130, as_json)
    except OSError as error:
        return _fail(" ".join(str(error).split()), 1, as_json)
    except Exception as error:
        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}; this is a bug, please report it", 1, as_json)
    except SystemExit as stop:  # tyro has printed help or an error
        return int(stop.code or 0)


def _fail(message: str, code: int, as_json: bool) -> int:
    print(f"unlearn: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    return code


def _yielding(cls: type[Any], names: set[str]) -> Any:
    """``cls`` with other flags for fields that a method has of its own: --retain-pairs for --retain."""
    flags = {n: tyro.conf.arg(name=f"{n}-pairs", help=f"captioned pictures; the method has its own --{n}") for n in names}
    rows: list[Any] = [(n, Annotated[str, flag], field(default="")) for n, flag in flags.items()]
    return dataclasses.make_dataclass(cls.__name__, rows, bases=(cls,), frozen=True, kw_only=True)


def _parse(word: str, words: list[str], *, quiet: bool) -> tuple[Any, Any]:
    """The verb and, where it has one, its method or attack with presets, YAML file and flags applied in this order."""
    cls, name = verbs.VERBS[word], _first(word, words) if verbs.VERBS[word].kind else ""
    about, prog = [inspect.cleandoc(cls.__doc__ or ""), *(listing.lines(k, listing.known(k)) for k in cls.lists)], f"unlearn {word}"
    command: Any = Annotated[cls, FlagCreatePairsOff, DisallowNone, PositionalMetavarFromFieldName]
    if name:
        own = {f.name for f in dataclasses.fields(cls)}
        file = _value(words, "config") if "config" in own else ""
        start = verbs.base.start(cls.kind, name, _value(words, "preset") if "preset" in own else "", config.load_yaml(file) if file else {})
        clash = own & {f.name for f in dataclasses.fields(start)}
        if clash and clash <= YIELDING:
            command, clash = Annotated[_yielding(cls, clash), FlagCreatePairsOff, DisallowNone, PositionalMetavarFromFieldName], set()
        if clash:
            raise UnlearnError(f"{name} has a field '{clash.pop()}', which 'unlearn {word}' uses itself; rename the field")
        unnamed = tyro.conf.arg(name="")
        both: list[Any] = [("verb", Annotated[command, unnamed]), ("part", Annotated[type(start), unnamed], field(default=start))]
        command = dataclasses.make_dataclass("Command", both)
        about, prog = [f"{name}: {registry.summary(cls.kind, name)}", about[0].partition("\n")[0]], f"{prog} {name}"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said) if quiet else contextlib.nullcontext():
            parsed: Any = tyro.cli(command, prog=prog, args=words, description="\n\n".join(about))
    except SystemExit as stop:
        if quiet and stop.code:
            raise UsageError(" ".join(re.sub("[╭╮╰╯│─]|-{3,}", " ", said.getvalue()).split())) from None
        raise
    return (parsed.verb, parsed.part) if name else (parsed, None)


def _first(word: str, words: list[str]) -> str:
    """The method or attack, which is written straight after the verb; "" when only help is asked for. Makes its spelling canonical."""
    at = next((i for i, w in enumerate(words) if w not in ("--json", "--dry-run", "--force")), len(words))
    if at == len(words) or words[at] in ("-h", "--help"):
        return ""
    if words[at].startswith("-"):
        raise UsageError(f"write the {verbs.VERBS[word].kind.removesuffix('s')} straight after 'unlearn {word}', and {words[at]} behind it")
    kind = verbs.VERBS[word].kind
    words[at] = listing.canonical(kind, words[at])
    registry.path(kind, words[at])  # an unknown name is said before anything is imported
    return words[at]


def _value(words: list[str], flag: str) -> str:
    """The value of --flag, before the parser for the method's own flags exists."""
    for i, word in enumerate(words):
        if word == f"--{flag}" and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(f"--{flag}="):
            return word.partition("=")[2]
    return ""


def _help() -> str:
    about = {w: inspect.cleandoc(v.__doc__ or "").partition("\n")[0] for w, v in verbs.VERBS.items()}
    return "\n".join(
        [
            "usage: unlearn VERB …        unlearn VERB --help says more",
            "",
            "Make an image generator or a classifier forget, attack the result, measure it and look at it.",
            "",
            *(f"  {word:10}{line}" for word, line in about.items()),
            "",
            "  unlearn demo",
            "  unlearn erase esd canvas canvas/neon",
            '  unlearn erase uce path/to/model --concept "Van Gogh" --kind style',
            "  unlearn erase salun path/to/classifier --data path/to/pictures --forget list.txt --evaluate",
            "  unlearn attack unlearndiffatk runs/…     then: unlearn evaluate runs/…     then: unlearn report runs/…",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
