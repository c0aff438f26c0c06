"""A run folder is readable at every moment, and a run that was interrupted ends as if it had not been."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from unlearners import files, patch, run, session, targets
from unlearners.base import Method, Row, Target, Task
from unlearners.errors import NonFiniteError, RefusedError, UnlearnError, UsageError
from unlearners.methods.erasediff import EraseDiff
from unlearners.methods.esd import ESD
from unlearners.methods.original import Original
from unlearners.methods.scissorhands import Scissorhands
from unlearners.methods.uce import UCE
from unlearners.run import erase, read_run

TASK = Task(name="zq", kind="style", concepts=("zq",), prompts=("zq", "a zq sky"))
FRESH = ESD(steps=6, lr=1e-3, sampler_steps=3)
POOLED = ESD(steps=6, lr=1e-3, sampler_steps=3, x_from="frozen", pool=2, refresh=4, batch=2)
INNER = EraseDiff(epochs=2, steps=2, inner=1, lr=1e-3, batch=2, pictures=2, restore=False)  # two epochs of three steps
TRIMMED = Scissorhands(epochs=2, steps=3, lr=1e-3, batch=2, pictures=4, prune_num=1, project=True, memory_num=2)
METHODS = {"fresh": FRESH, "pooled": POOLED, "inner": INNER, "trimmed": TRIMMED}
KILLS = (("fresh", "checkpoint"), ("pooled", "checkpoint"), ("fresh", "half_checkpoint"), ("fresh", "half_weights"), ("fresh", "half_line"))


@dataclass(frozen=True, kw_only=True)
class Faulty(Method):
    """Moves its weights by one at each step and, at step ``at``, does what ``Faulty.fault`` does."""

    paper: ClassVar[str] = "none"
    needs: ClassVar[type] = Target
    fault: ClassVar[Callable[[dict[str, torch.Tensor]], float]]

    params: str = "xattn-kv"
    at: int = 3

    def run(self, target: Target, task: Task) -> Iterator[Row]:
        w = {n: p.requires_grad_() for n, p in target.select(self.params).items()}
        for i in target.steps(4):
            with torch.no_grad():
                for p in w.values():
                    p.add_(1)
            yield {"loss": type(self).fault(dict(w)) if i == self.at else 1.0}


def fine(_: Any) -> float:
    return 0.5


def broken(_: Any) -> float:
    raise UnlearnError("the disk was unplugged; plug it in")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def same(a: Path, b: Path) -> None:
    """Weights and log are the same, byte for byte, and nothing but the run is left."""
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (a / "weights.safetensors").read_bytes() == (b / "weights.safetensors").read_bytes()
    assert (a / "log.jsonl").read_bytes() == (b / "log.jsonl").read_bytes()
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()} == {"run.json", "weights.safetensors", "log.jsonl"}
    assert read_run(a)["hash"] == read_run(b)["hash"]
    assert read_run(a)["status"] == read_run(b)["status"] == "done"


def readable(folder: Path, status: str) -> dict[str, Any]:
    """The record of an unfinished run; its folder loads as a target with finite weights."""
    record = read_run(folder)
    assert record["status"] == status
    for line in (folder / "log.jsonl").read_text().splitlines():
        assert json.loads(line)["loss"] > 0
    target = targets.load(str(folder))
    assert all(bool(torch.isfinite(p).all()) for p in target.named().values())
    with pytest.raises(UsageError, match="finish"):
        run.evaluate(folder)
    return record


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs."""
    at = tmp_path_factory.mktemp("whole")
    return {name: erase(method, "tiny", TASK, runs=at) for name, method in METHODS.items()}


def interrupt(at: int) -> run.Progress:
    def progress(what: str, done: int, total: int, row: Row) -> None:
        if done == at:
            raise KeyboardInterrupt

    return progress


# --- interrupted --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stops", [(4,), (1, 2, 5, 6)], ids=["once", "often"])
@pytest.mark.usefixtures("always")
def test_ctrl_c_with_checkpoints(name: str, stops: tuple[int, ...], whole: dict[str, Path], tmp_path: Path) -> None:
    for at in stops:
        with pytest.raises(KeyboardInterrupt):
            erase(METHODS[name], "tiny", TASK, runs=tmp_path, progress=interrupt(at))
        (folder,) = tmp_path.iterdir()
        assert "resumes" in readable(folder, "stopped")["error"]
        assert len((folder / "log.jsonl").read_text().splitlines()) == at
    seen: list[int] = []
    erase(METHODS[name], "tiny", TASK, runs=tmp_path, progress=lambda what, done, total, row: seen.append(done))
    assert seen[0] == stops[-1]  # the checkpoint of the step before was taken up
    same(folder, whole[name])


def test_ctrl_c_before_the_first_checkpoint(whole: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        erase(FRESH, "tiny", TASK, runs=tmp_path, progress=interrupt(4))
    (folder,) = tmp_path.iterdir()
    readable(folder, "stopped")
    erase(FRESH, "tiny", TASK, runs=tmp_path)
    same(folder, whole["fresh"])


DRIVER = """
import os, signal, sys
from pathlib import Path
import safetensors.torch, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from unlearners import files, patch, run, session, targets
from test_resume import KILLS, METHODS, TASK

targets.load("tiny")  # imports everything once, before the forks

session.CHECKPOINT_SECONDS = 0.0
KILL = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

def after_a_checkpoint(what, done, total, row):
    if done == 4:
        KILL()

def half_a_checkpoint(state, path):
    if state["step"] == 3:
        Path(path).write_bytes(b"half")
        KILL()
    save(state, path)

def half_the_weights(tensors, path, metadata):
    Path(path).write_bytes(b"half")
    KILL()

def half_a_line(self, row):
    if self.lines == 3:
        with self.log.open("a") as f:
            f.write('{"step": 4, "lo')
        KILL()
    write(self, row)

save, write = torch.save, session.FolderSession.write
for name, moment in KILLS:
    if os.fork() == 0:
        progress = None
        if moment == "checkpoint":
            progress = after_a_checkpoint
        elif moment == "half_checkpoint":
            torch.save = half_a_checkpoint
        elif moment == "half_weights":
            patch.save_file = half_the_weights
        else:
            session.FolderSession.write = half_a_line
        try:
            run.erase(METHODS[name], "tiny", TASK, runs=Path(sys.argv[2]) / name / moment, progress=progress)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL, (name, moment)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that another process began and was killed in, as by ``kill -9``."""
    at = tmp_path_factory.mktemp("killed")
    (at / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-W", "ignore", str(at / "driver.py"), str(Path(__file__).parent), str(at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return at


@pytest.mark.parametrize(("name", "moment"), KILLS)
def test_kill_9(name: str, moment: str, whole: dict[str, Path], killed: Path) -> None:
    (folder,) = (killed / name / moment).iterdir()
    assert (folder / "checkpoint.pt").is_file()
    if moment == "half_line":
        assert read_run(folder)["status"] == "running"
    else:
        readable(folder, "running")
    seen: list[int] = []
    again = erase(METHODS[name], "tiny", TASK, runs=folder.parent, progress=lambda what, done, total, row: seen.append(done))
    assert again == folder
    assert seen[0] == {"checkpoint": 4, "half_checkpoint": 3, "half_weights": 6, "half_line": 4}[moment]
    same(folder, whole[name])


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        erase(FRESH, "tiny", TASK, runs=tmp_path, progress=interrupt(2))
    (folder,) = tmp_path.iterdir()
    (folder / "checkpoint.pt").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(RefusedError, match="delete it"):
        erase(FRESH, "tiny", TASK, runs=tmp_path)
    assert read_run(folder)["status"] == "failed"


# --- not finite ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_loss_that_is_not_finite(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", seconds)
    with pytest.raises(NonFiniteError, match="lower lr"):
        erase(ESD(steps=6, lr=1e30, sampler_steps=3), "tiny", TASK, runs=tmp_path)
    (folder,) = tmp_path.iterdir()
    record = readable(folder, "failed")
    assert "loss" in record["error"]
    if seconds:  # no checkpoint yet: the last good state is the start
        assert record["weights"]["tensors"] == 0
        assert targets.load(str(folder)).base["sha256"] == patch.base_hash(targets.load("tiny").modules)


@pytest.mark.usefixtures("always")
def test_the_last_good_state_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faulty, "fault", staticmethod(lambda w: float("nan")), raising=False)
    with pytest.raises(NonFiniteError):
        erase(Faulty(), "tiny", TASK, runs=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert readable(folder, "failed")["weights"]["tensors"] > 0
    start, kept = targets.load("tiny").select("xattn-kv"), targets.load(str(folder)).select("xattn-kv")
    assert all(torch.allclose(kept[n], start[n] + 3, atol=1e-5) for n in start)  # three good steps, and not the fourth


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.usefixtures("always")
def test_weights_that_are_not_finite_are_never_kept(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is computed before the update that spoils the weights; at the last step no other loss would tell."""

    def spoil(w: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            next(iter(w.values()))[0, 0] = float("inf")
        return 0.5

    monkeypatch.setattr(Faulty, "fault", staticmethod(spoil), raising=False)
    with pytest.raises(NonFiniteError, match="no longer finite"):
        erase(Faulty(at=at), "tiny", TASK, runs=tmp_path)
    (folder,) = tmp_path.iterdir()
    readable(folder, "failed")
    start, kept = targets.load("tiny").select("xattn-kv"), targets.load(str(folder)).select("xattn-kv")
    assert all(torch.allclose(kept[n], start[n] + at, atol=1e-5) for n in start)


# --- finished, failed, another ------------------------------------------------------------------------------------
def test_a_finished_run_is_returned_at_once(whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole["fresh"].iterdir()}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it must not be loaded again")

    monkeypatch.setattr(run, "load", refuse)
    assert erase(FRESH, "tiny", TASK, runs=whole["fresh"].parent) == whole["fresh"]
    assert {p: p.stat().st_mtime_ns for p in whole["fresh"].iterdir()} == before


def test_another_request_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    assert erase(UCE(), "tiny", TASK, out=out) == out
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for other in ({"seed": 1}, {"dtype": "bfloat16"}):
        with pytest.raises(UsageError, match="another --out"):
            erase(UCE(), "tiny", TASK, out=out, **other)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="uce on zq"):
        erase(UCE(lamb=1.0), "tiny", TASK, out=out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_failed_run_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faulty, "fault", staticmethod(broken), raising=False)
    with pytest.raises(UnlearnError, match="unplugged"):
        erase(Faulty(), "tiny", TASK, runs=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert readable(folder, "failed")["error"] == "the disk was unplugged; plug it in"
    monkeypatch.setattr(Faulty, "fault", staticmethod(fine))
    erase(Faulty(), "tiny", TASK, runs=tmp_path)
    assert read_run(folder)["status"] == "done"
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("target", ["no/such-model", "/no/such/folder"])
def test_a_target_that_is_not_there_is_a_record_too(target: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        erase(UCE(), target, TASK, runs=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert read_run(folder)["status"] == "failed"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"status": "done"}'])
def test_a_damaged_record_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    for use in (lambda: read_run(tmp_path), lambda: targets.load(str(tmp_path)), lambda: erase(UCE(), "tiny", TASK, out=tmp_path)):
        with pytest.raises(RefusedError, match="damaged"):
            use()


# --- nothing changed ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [Original(), UCE(strength=0.0)])
def test_a_run_that_changed_nothing_loads(method: Method, tmp_path: Path) -> None:
    folder = erase(method, "tiny", TASK, runs=tmp_path)
    record = read_run(folder)
    assert record["status"] == "done"
    assert record["weights"] == {"file": "weights.safetensors", "sha256": "", "bytes": 0, "tensors": 0, "changed": [], "outside": 0}
    assert patch.base_hash(targets.load(str(folder)).modules) == patch.base_hash(targets.load("tiny").modules)


# --- full disk ----------------------------------------------------------------------------------------------------
def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_json(tmp_path / "a.json", {"old": 1})
    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        with pytest.raises(UnlearnError, match="free some space"):
            files.write_json(tmp_path / "a.json", {"new": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_while_saving_weights(whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        erase(FRESH, "tiny", TASK, runs=tmp_path, progress=interrupt(4))
    (folder,) = tmp_path.iterdir()
    before = (folder / "weights.safetensors").read_bytes()
    with monkeypatch.context() as m:
        m.setattr(patch, "save_file", full)
        with pytest.raises(UnlearnError, match="free some space"):
            erase(FRESH, "tiny", TASK, runs=tmp_path)
    assert (folder / "weights.safetensors").read_bytes() == before
    readable(folder, "failed")
    erase(FRESH, "tiny", TASK, runs=tmp_path)
    same(folder, whole["fresh"])


def torch_full(state: Any, path: Path) -> None:
    """What torch.save does on a full disk."""
    Path(path).write_bytes(b"half")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


@pytest.mark.usefixtures("always")
def test_a_full_disk_while_checkpointing(whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        erase(FRESH, "tiny", TASK, runs=tmp_path, progress=interrupt(4))
    (folder,) = tmp_path.iterdir()
    before = (folder / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as m:
        m.setattr(torch, "save", torch_full)
        with pytest.raises(UnlearnError, match=r"checkpoint\.pt could not be written"):
            erase(FRESH, "tiny", TASK, runs=tmp_path)
    assert (folder / "checkpoint.pt").read_bytes() == before
    readable(folder, "failed")
    erase(FRESH, "tiny", TASK, runs=tmp_path)
    same(folder, whole["fresh"])


def test_a_full_disk_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the failure can be recorded: the record still says that the run was begun, and nothing half-written is there."""
    out = tmp_path / "mine"
    with pytest.raises(KeyboardInterrupt):
        erase(FRESH, "tiny", TASK, out=out, progress=interrupt(2))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        with pytest.raises(UnlearnError, match="free some space"):
            erase(FRESH, "tiny", TASK, out=out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_files_are_readable_by_the_group_as_the_umask_has_it(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        folder = erase(UCE(), "tiny", TASK, runs=tmp_path)
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o640}
