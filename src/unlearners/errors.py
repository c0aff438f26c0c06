"""What goes wrong and how it is said: one sentence that holds the mend, and an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UnlearnError(Exception):
    """A failure the user can act on. The message is one sentence; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(UnlearnError):
    """The request itself is wrong: an unknown name, key or value, or parts that do not fit."""

    exit_code = 2


class RefusedError(UnlearnError):
    """A file or patch that must not be used as it is: corrupt, unsafe, or made for another base."""


class NonFiniteError(UnlearnError):
    """Training produced a value that is not finite; the last good state has been kept."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """A ``UsageError`` for an unknown name, with the nearest known ones."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}" if near else f"known: {', '.join(known) or 'none'}"
    return UsageError(f"unknown {kind} '{name}'; {hint}")
