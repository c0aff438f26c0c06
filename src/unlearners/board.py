"""How a grid is getting on: a live table with the time left on a terminal, a line for each finished job elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from typing_extensions import Self

from .base import Row
from .workers import Job, Outcome

SHORT = 1.0  # seconds; what takes less was there already, and says nothing about the time left


@dataclass
class Line:
    """A row of the table: one job."""

    job: Job
    state: str = "waiting"
    what: str = ""
    started: float = 0.0
    seconds: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)


class Board:
    """Jobs and what became of them, shown on ``console`` (a rich Console) if there is one."""

    def __init__(self, console: Any = None) -> None:
        self.console, self.size = console, 1
        self.live: Any = None
        self.lines: dict[str, Line] = {}
        self.began_at = time.monotonic()

    def __enter__(self) -> Self:
        if self.console and self.console.is_terminal:
            from rich.live import Live

            self.live = Live(console=self.console, get_renderable=self.table, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def add(self, jobs: Iterable[Job]) -> None:
        """Jobs that will be done; one that was done already is shown again as waiting."""
        self.lines |= {job.key: Line(job) for job in jobs}

    def began(self, job: Job) -> None:
        """``job`` is being done."""
        line = self.lines[job.key]
        line.state, line.started = "running", time.monotonic()

    def progress(self, job: Job, what: str, done: int, total: int, row: Row) -> None:
        """How far ``job`` is."""
        self.lines[job.key].what = f"{what} {done}/{total}" if total else f"{what} {done}" if done else what

    def over(self, job: Job, outcome: Outcome) -> None:
        """``job`` is done, has failed, or cannot be done."""
        line = self.lines[job.key]
        line.state = "done" if outcome.good else "failed" if outcome.error else "left out"
        line.what, line.seconds = outcome.error, outcome.seconds
        if isinstance(outcome.value, list):
            mine = [r for r in outcome.value if r["method"] == job.method and r["value"] is not None]
            line.numbers = {r["metric"]: r["value"] for r in mine}
        if self.console and not self.live:
            finished = sum(w.state not in ("waiting", "running") for w in self.lines.values())
            said = f": {outcome.error}" if outcome.error else f" in {outcome.seconds:.0f} s" if outcome.good else ""
            self.console.print(
                f"[{finished}/{len(self.lines)}] {job.kind} {job.title} {line.state}{said}{self._left()}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip

    def _left(self) -> str:
        left = self.left()
        return "" if left is None or not left else f" ({clock(left)} left)"

    def left(self) -> float | None:
        """Seconds until the end, from what like jobs took; None while nothing is known."""
        lines = list(self.lines.values())
        took = [w for w in lines if w.state == "done" and w.seconds > SHORT]
        total = 0.0
        for line in lines:
            if line.state not in ("waiting", "running"):
                continue
            same = [w.seconds for w in took if (w.job.kind, w.job.method) == (line.job.kind, line.job.method)]
            like = same or [w.seconds for w in took if w.job.kind == line.job.kind]
            if not like:
                return None
            passed = time.monotonic() - line.started if line.state == "running" else 0.0
            total += max(0.0, sum(like) / len(like) - passed)
        return total / max(1, self.size)

    def table(self) -> Any:
        """What the terminal shows: the last that are over, all that are running, and how many wait."""
        from rich.markup import escape
        from rich.table import Table

        lines = list(self.lines.values())
        metrics = list(dict.fromkeys(m for w in lines for m in w.numbers if not m.startswith("cost/")))[:6]
        over = [w for w in lines if w.state in ("done", "failed", "left out")]
        running = [w for w in lines if w.state == "running"]
        room = max(3, self.console.height - len(running) - 5)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("", "method", "task", "seed", "state", "time", *metrics):
            table.add_column(name, no_wrap=True, justify="right" if name in ("seed", "time", *metrics) else "left")
        for w in [*over[-room:], *running]:
            spent = w.seconds if w.state != "running" else time.monotonic() - w.started
            state = f"{w.state}: {w.what}" if w.what else w.state
            numbers = (f"{w.numbers[m]:.2f}" if m in w.numbers else "" for m in metrics)
            cells = (w.job.kind, w.job.method, w.job.task, str(w.job.seed), state[:60], clock(spent), *numbers)
            table.add_row(*map(escape, cells), style={"running": "bold", "failed": "red", "done": ""}.get(w.state, "dim"))
        failed, left = sum(w.state == "failed" for w in over), self.left()
        table.caption = (
            f"{len(over)} of {len(lines)} done{f', {failed} failed' if failed else ''}, {clock(time.monotonic() - self.began_at)} gone, "
            f"{'time left not known yet' if left is None else f'about {clock(left)} left'}"
        )
        return table


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
