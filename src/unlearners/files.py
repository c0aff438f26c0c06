"""Files: those of a run folder, replaced whole or not at all and written by one process at a time; and quiet while models are read."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UnlearnError, UsageError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; ``UsageError`` while another one holds it. The system lets go when a process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{folder} cannot be a folder, since it or what it lies in is a file; give another --out") from None
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing {folder}; wait until it is done, or give another --out") from None
        yield
    finally:
        os.close(held)


@contextmanager
def turn(path: Path, waiting: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
    """Wait for one's turn at the lock file ``path`` and keep it inside the block; ``waiting`` is told who has it, once.

    The system ends the turn of a process that dies. Raises ``UnlearnError`` where the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting(os.pread(handle, 20, 0).decode().strip())
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise UnlearnError(f"{path} cannot be locked ({error.strerror}); put the runs on a disk that has file locks") from error
        os.pwrite(handle, f"{os.getpid():<20}".encode(), 0)  # one write of a fixed length, so that no reader meets half of it
        yield
    finally:
        os.close(handle)  # the file stays: were it deleted, two processes could lock two files of one name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write, which then replaces ``path``: a reader sees the old file or the new one, also after a full disk or a kill."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise UnlearnError(f"{path} could not be written ({sentence(error)}) and is as before; free some space and try again") from error


def cache(part: str) -> Path:
    """Where what can be made again is kept: ``part`` of the user's cache folder, or of ``UNLEARNERS_CACHE``."""
    return Path(os.environ.get("UNLEARNERS_CACHE") or Path.home() / ".cache" / "unlearners") / part


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=True))


def sentence(error: BaseException) -> str:
    """The first line of an error, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' bars for reading files, which are over in a second; downloads keep theirs."""
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    shown = [log.is_progress_bar_enabled() for log in logs]
    for log in logs:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, was in zip(logs, shown, strict=True):
            if was:
                log.enable_progress_bar()
