"""What goes wrong and how it is said: one sentence that holds the mend, and an exit code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

MANY = 30
"""known names that are listed where none is near"""


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
    shown = ", ".join(known[:MANY]) + (f" and {len(known) - MANY} more" if len(known) > MANY else "")
    hint = f"did you mean {' or '.join(near)}" if near else f"known: {shown or 'none'}"
    return UsageError(f"unknown {kind} '{name}'; {hint}")


def misfit(name: str, needs: type, found: type) -> UsageError:
    """A ``UsageError`` for a model of the wrong family, in the words with which the docstring of ``needs`` begins ("A model that …")."""
    wanted = re.split("[:.]", needs.__doc__ or f"a {needs.__name__}")[0]
    return UsageError(f"{name} needs {wanted[:1].lower() + wanted[1:]}, and this is a {found.__name__}; see 'unlearn show {name}'")
