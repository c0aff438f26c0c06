"""Jobs that need each other, done one by one here, by several processes, or by Ray. A failing job is noted and the rest goes on."""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .base import Row
from .errors import UnlearnError, UsageError
from .files import sentence

TRIES = 2  # a job whose process dies is done again once: run folders resume
SECONDS = 0.5  # between two messages about progress
Report = Callable[["Job", str, int, int, Row], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """``do(**how, progress=…)``, a function that other processes can import. ``needs`` must have succeeded, ``after`` must be over."""

    key: str
    kind: str
    task: str = ""
    method: str = ""
    seed: int = 0
    do: Callable[..., Any]
    how: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.method}{f' on {self.task}' if self.task else ''}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job. ``blocked``: it was not begun, because of the job of this key."""

    value: Any = None
    error: str = ""
    trace: str = ""
    blocked: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not self.error and not self.blocked


def attempt(job: Job, report: Report | None = None) -> Outcome:
    """Do a job; what it raises becomes one sentence and, where it is a bug, a traceback."""
    started = time.monotonic()

    def progress(what: str, done: int, total: int, row: Row) -> None:
        if report:
            report(job, what, done, total, row)

    try:
        value = job.do(**job.how, progress=progress)
    except Exception as error:
        known = isinstance(error, UnlearnError | RuntimeError)  # RuntimeError: out of memory
        said = sentence(error) if known else f"{type(error).__name__}: {sentence(error)}"
        trace = "" if isinstance(error, UnlearnError) else traceback.format_exc()
        return Outcome(error=said, trace=trace, seconds=time.monotonic() - started)
    return Outcome(value=value, seconds=time.monotonic() - started)


def perform(jobs: Sequence[Job], crew: Crew, over: Callable[[Job, Outcome], None], began: Callable[[Job], None]) -> dict[str, Outcome]:
    """Do ``jobs``, earlier ones first as far as their needs allow; ``began`` and ``over`` are told. Returns what became of each."""
    done: dict[str, Outcome] = {}
    left = list({job.key: job for job in jobs}.values())
    known = {job.key for job in left}
    while left or crew.busy:
        for job in list(left):
            failed = [k for k in job.needs if k in done and not done[k].good]
            if failed:
                left.remove(job)
                done[job.key] = Outcome(blocked=done[failed[0]].blocked or failed[0])
                over(job, done[job.key])
            elif crew.room and all(k in done or k not in known for k in (*job.needs, *job.after)):
                left.remove(job)
                began(job)
                crew.submit(job)
        if crew.busy:
            job, outcome = crew.collect()
            done[job.key] = outcome
            over(job, outcome)
    return done


class Crew(ABC):
    """Who does jobs."""

    size: int
    busy: int

    @property
    def room(self) -> bool:
        return self.busy < self.size

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Begin a job; only where there is room."""

    @abstractmethod
    def collect(self) -> tuple[Job, Outcome]:
        """Wait for the next job that is over."""

    @abstractmethod
    def close(self) -> None:
        """End everything, also what is running."""


class Here(Crew):
    """One job at a time, in this process."""

    size = 1

    def __init__(self, report: Report | None = None) -> None:
        self.report, self.busy = report, 0

    def submit(self, job: Job) -> None:
        self.job, self.busy = job, 1

    def collect(self) -> tuple[Job, Outcome]:
        outcome, self.busy = attempt(self.job, self.report), 0
        return self.job, outcome

    def close(self) -> None:
        pass


# --- several processes --------------------------------------------------------------------------------------------
@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    line: Connection
    slot: int
    job: Job | None = None


class Processes(Crew):
    """``size`` processes of this machine, each with its share of the cores and one of the visible GPUs. One that dies is replaced.

    They end with this process, however it ends. What they print goes to the file ``log``.
    """

    def __init__(self, size: int, log: Path, report: Report | None = None, *, gpus: bool = False) -> None:
        self.size, self.log, self.report, self.gpus = size, log, report, visible_gpus() if gpus else []
        self.workers: list[_Worker] = []
        self.tries: dict[str, int] = {}
        log.parent.mkdir(parents=True, exist_ok=True)

    @property
    def busy(self) -> int:  # type: ignore[override]
        return sum(w.job is not None for w in self.workers)

    def submit(self, job: Job) -> None:
        self.tries[job.key] = self.tries.get(job.key, 0) + 1
        for worker in [w for w in self.workers if w.job is None]:
            try:
                worker.line.send(job)
            except OSError:  # it died while it had nothing to do
                self._bury(worker)
            else:
                worker.job = job
                return
        worker = self._start()
        worker.line.send(job)
        worker.job = job

    def collect(self) -> tuple[Job, Outcome]:
        while True:
            running: dict[Any, _Worker] = {w.line: w for w in self.workers if w.job}
            for line in wait(list(running)):
                worker = running[line]
                job = worker.job
                assert job
                try:
                    message = worker.line.recv()
                except (EOFError, OSError):
                    end = self._bury(worker)
                    if self.tries[job.key] < TRIES:
                        self.submit(job)
                        continue
                    return job, Outcome(error=f"its process {end} each time it was tried; {self.log} says more")
                if isinstance(message, Outcome):
                    worker.job = None
                    return job, message
                if self.report:
                    self.report(job, *message)

    def _start(self) -> _Worker:
        slot = min(set(range(self.size)) - {w.slot for w in self.workers})
        share = threads(self.size)
        path = os.pathsep.join(p for p in sys.path if p)  # what this process can import, a worker can
        env = {**os.environ, "OMP_NUM_THREADS": str(share), "PYTHONPATH": path}
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        mine, its = Pipe()
        code = f"from {__name__} import serve; serve({its.fileno()})"
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[its.fileno()], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        its.close()
        self.workers.append(_Worker(process, mine, slot))
        return self.workers[-1]

    def _bury(self, worker: _Worker) -> str:
        worker.line.close()
        self.workers.remove(worker)
        code = worker.process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"

    def close(self) -> None:
        for worker in self.workers:
            worker.line.close()
            worker.process.kill()
            worker.process.wait()
        self.workers = []


def serve(handle: int) -> None:
    """The life of a worker process: jobs come in and outcomes go out through the pipe ``handle``, until its other end closes."""
    faulthandler.enable()
    line, inbox = Connection(handle), queue.SimpleQueue[Job]()

    def listen() -> None:
        try:
            while True:
                inbox.put(line.recv())
        except EOFError:
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    told: dict[tuple[str, str], float] = {}

    def report(job: Job, what: str, done: int, total: int, row: Row) -> None:
        now = time.monotonic()
        if now - told.get((job.key, what), -SECONDS) >= SECONDS:
            told[job.key, what] = now
            line.send((what, done, total, row))

    try:
        while True:
            line.send(attempt(inbox.get(), report))
    except (KeyboardInterrupt, OSError):
        os._exit(130)


def cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def threads(size: int) -> int:
    """A worker's share of the cores; never more than ``OMP_NUM_THREADS`` asks for."""
    share = max(1, cores() // size)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdecimal() and int(asked) else share


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


# --- Ray ----------------------------------------------------------------------------------------------------------
class Ray(Crew):
    """Tasks of Ray: on the cluster of ``RAY_ADDRESS``, or on this machine, where Ray is then started. All must see the same folders.

    ``size`` 0 is as many as there are cores; ``gpus`` is what one job takes, 0.5 for two on a GPU.
    """

    def __init__(self, size: int, *, gpus: float = 0.0) -> None:
        try:
            self.ray = importlib.import_module("ray")
        except ImportError:
            raise UsageError("--executor ray needs Ray, which is not installed: pip install 'unlearners[ray]'") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a job that takes no GPU from Ray keeps what it sees
        self.own = not self.ray.is_initialized()
        how = {} if os.environ.get("RAY_ADDRESS") else {"address": "local", "num_cpus": size or cores(), "include_dashboard": False}
        try:
            self.ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR", **how)
        except Exception as error:  # its own kinds, ConnectionError, and bare Exception when this machine is too busy to start it in time
            self.close()
            raise UnlearnError(f"Ray did not start ({sentence(error)}); give the same command again, or use --executor local") from error
        self.size = size or max(1, int(self.ray.cluster_resources().get("CPU", 1)))
        self.task = self.ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES - 1)(_there)
        self.jobs: dict[Any, Job] = {}

    @property
    def busy(self) -> int:  # type: ignore[override]
        return len(self.jobs)

    def submit(self, job: Job) -> None:
        self.jobs[self.task.remote(pickle.dumps(job), sys.path, str(Path.cwd()), threads(self.size))] = job

    def collect(self) -> tuple[Job, Outcome]:
        (ready, *_), _ = self.ray.wait(list(self.jobs), num_returns=1)
        job = self.jobs.pop(ready)
        try:
            return job, self.ray.get(ready)
        except self.ray.exceptions.WorkerCrashedError:
            return job, Outcome(error="Ray lost its worker each time it was tried; Ray's log files say more")
        except self.ray.exceptions.RayError as error:
            return job, Outcome(error=f"Ray could not do it ({str(error).strip().splitlines()[-1]})", trace=str(error))

    def close(self) -> None:
        if self.own:
            self.ray.shutdown()


def _there(job: bytes, path: list[str], cwd: str, share: int) -> Outcome:
    """``attempt`` in a worker of Ray, with the folder and the modules of the process that asked."""
    os.chdir(cwd)
    sys.path += [p for p in path if p not in sys.path]
    import torch

    torch.set_num_threads(share)
    return attempt(pickle.loads(job))
