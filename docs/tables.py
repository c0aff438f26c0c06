"""Write the tables of measured results into README.md from the committed CSV files.

    python docs/tables.py            rewrite the blocks between "<!-- results -->" or "<!-- results: GRID -->" and "<!-- end -->"
    python docs/tables.py --check    change nothing; exit 1 when a block is not what its CSV says

Nothing is measured here. Without a CSV its block is empty.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from unlearners.zoo.canvas.world import MASCOTS, OBJECTS, STYLES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "canvas_first" / "results.csv"
FURTHER = ("cifar10_random10", "cifar10_class", "canvas_ddpm", "canvas_clip")
ATTACKS = "canvas_attacks"
README = ROOT / "README.md"
START, END = "<!-- results -->", "<!-- end -->"
METRICS = {"ua": "UA ↑", "ira": "IRA ↑", "cra": "CRA ↑", "asr/unlearndiffatk": "ASR ↓"}
NUMBERS = {
    "ua": "UA",
    "ra": "RA",
    "ta": "TA",
    "ira": "IRA ↑",
    "mia": "MIA",
    "rmia/auc": "RMIA",
    "fid/canvas_judge": "FID ↓",
    "avg_gap": "Avg. Gap ↓",
    "fa/top1": "FA@1 ↓",
    "ta/top1": "TA ↑",
    "mia_cosine": "MIA",
    "cost/seconds": "seconds",
}
NAMING = {"fa/top1": "FA@1 ↓", "ta/top1": "TA ↑"}
ANSWERS = {"name_accuracy/forgotten": "forgotten names ↓", "vqa/others": "other names ↑"}
# what stands behind "results: " in README.md → the grid and the numbers in a cell
BY_TASK = {
    "canvas_t2i": ("canvas_t2i", METRICS),
    "canvas_text_alone": ("canvas_text_alone", {name: METRICS[name] for name in ("ua", "ira", "cra")}),
    "canvas_clip_several": ("canvas_clip_several", NAMING),
    "canvas_slug": ("canvas_slug", METRICS),
    "canvas_slug, answers": ("canvas_slug", ANSWERS),
}
GROUPS = {"styles": tuple(STYLES), "objects": tuple(OBJECTS), "mascots": MASCOTS}

Row = Mapping[str, str]


def table(path: Path = RESULTS) -> str:
    """The table in Markdown, or "" when there is no CSV.

    One row for each kind of concept and method: the mean over tasks and seeds, with the lowest and highest. Methods whose label holds a
    setting in brackets are points of a frontier (``sweep`` in the grid) and are left out.
    """
    if not (rows := measured(path)):
        return ""
    lines = [f"| forgotten | method | {' | '.join(METRICS.values())} |", f"|---|---|{'---|' * len(METRICS)}"]
    for group, concepts in GROUPS.items():
        mine = [r for r in rows if r["task"].partition("/")[2] in concepts]
        tasks = len({r["task"] for r in mine})
        methods = sorted(dict.fromkeys(r["method"] for r in mine), key=lambda m: m != "original")
        for method in methods:
            cells = " | ".join(cell([r for r in mine if r["method"] == method and r["metric"] == m]) for m in METRICS)
            lines.append(f"| {tasks} {group if tasks != 1 else group[:-1]} | {method} | {cells} |")
    where = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    note = (
        "Canvas, not Stable Diffusion 1.4. Percent; means over tasks, in brackets the lowest and the highest. UA: the concept is gone. "
        "IRA and CRA: other things of the same and of the other domain are still right. ASR: UnlearnDiffAtk brings the concept back, "
        f"prompts that show it without an attack included. Each task, its interval and the points of the frontiers: `{where}`."
    )
    return "\n".join([*lines, "", note])


def measured(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV but for the points of a frontier; none without the file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [r for r in csv.DictReader(file) if "[" not in r["method"]]


def plain(grid: str, folder: Path = RESULTS.parent.parent) -> str:
    """The table of a grid, method by method: the mean over tasks and seeds of each number that was measured. "" without its CSV."""
    if not (rows := measured(folder / grid / "results.csv")):
        return ""
    shown = {m: title for m, title in NUMBERS.items() if any(r["metric"] == m for r in rows)}
    lines = [f"| method | {' | '.join(shown.values())} |", f"|---|{'---|' * len(shown)}"]
    for method in sorted(dict.fromkeys(r["method"] for r in rows), key=lambda m: (m != "original", m != "retrain")):
        mine = [r for r in rows if r["method"] == method]
        lines.append(f"| {method} | {' | '.join(cell([r for r in mine if r['metric'] == m]) for m in shown)} |")
    seeds, tasks = (len({r[k] for r in rows}) for k in ("seed", "task"))
    made = ", ".join(dict.fromkeys(f"{r['target']} on {r['device']}" for r in rows))
    where = f"bench/results/{grid}"
    over = (f"{tasks} tasks, " if tasks > 1 else "") + f"{seeds} seed{'s' if seeds > 1 else ''}"
    return "\n".join([*lines, "", f"{made}; {over}. Intervals, n and presets: `{where}/results.csv`."])


def by_task(grid: str, metrics: Mapping[str, str] = METRICS, folder: Path = RESULTS.parent.parent) -> str:
    """The table of a grid with several tasks: a column for each with all ``metrics``, means over seeds. "" without its CSV.

    Methods of which none of them was measured are left out, and so are the originals of other targets than the grid's.
    """
    if not (rows := measured(folder / grid / "results.csv")):
        return ""
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    found: dict[tuple[str, str, str], list[float]] = {}
    for r in rows:
        if r["value"]:
            found.setdefault((r["method"], r["task"], r["metric"]), []).append(float(r["value"]))

    def mean(method: str, task: str, metric: str, digits: int = 0) -> str:
        values = found.get((method, task, metric))
        return f"{sum(values) / len(values):.{digits}f}" if values else "–"

    lines = [f"| method | {' | '.join(t.partition('/')[2] for t in tasks)} | seconds |", f"|---|{'---|' * len(tasks)}---|"]
    for method in sorted(
        dict.fromkeys(r["method"] for r in rows if r["metric"] in metrics and not r["method"].startswith("original ")),
        key=lambda m: m != "original",
    ):
        cells = [" / ".join(mean(method, t, m) for m in metrics) for t in tasks]
        shown = [c if c.strip("–/ ") else "–" for c in cells]
        spent = [v for t in tasks for v in found.get((method, t, "cost/seconds"), [])]
        lines.append(f"| {method} | {' | '.join(shown)} | {f'{sum(spent) / len(spent):.0f}' if spent else '–'} |")
    made = ", ".join(dict.fromkeys(r["device"] for r in rows))
    n = len({r["seed"] for r in rows})
    note = f"Cells: {' / '.join(metrics.values())}; {f'means over {n} seeds' if n > 1 else 'one seed'} on {made}. "
    return "\n".join([*lines, "", note + f"Intervals, n, all other numbers and the claims: `bench/results/{grid}`."])


def by_attack(grid: str, folder: Path = RESULTS.parent.parent) -> str:
    """The table of a grid of attacks: a row for each, a column for each method, success rates task by task. "" without its CSV.

    Beside each attack what it takes, from attacks.csv: its access and level, and its queries for each prompt that it was let loose on.
    """
    rows, took = (measured(folder / grid / f"{name}.csv") for name in ("results", "attacks"))
    if not (rows and took):
        return ""
    tasks, methods = (list(dict.fromkeys(r[k] for r in rows)) for k in ("task", "method"))
    attacks = {r["attack"]: (r["access"], r["level"]) for r in took}

    def rate(metric: str, method: str) -> str:
        return " / ".join(cell([r for r in rows if (r["metric"], r["method"], r["task"]) == (metric, method, t)], 0) for t in tasks)

    def queries(name: str) -> str:
        own = [r for r in took if r["attack"] == name]
        return f"{sum(int(r['queries_total']) for r in own) / max(1, sum(int(r['prompts']) - int(r['plain']) for r in own)):.1f}"

    lines = [f"| attack | access, level | queries | {' | '.join(methods)} |", f"|---|---|---|{'---|' * len(methods)}"]
    lines.append(f"| none | – | – | {' | '.join(rate(f'pre_asr/{next(iter(attacks))}', m) for m in methods)} |")
    for name, what in attacks.items():
        lines.append(f"| {name} | {', '.join(what)} | {queries(name)} | {' | '.join(rate(f'asr/{name}', m) for m in methods)} |")
    said, n = " / ".join(t.partition("/")[2] for t in tasks), min(int(r["prompts"]) for r in took)
    note = f"Cells: ASR ↓ of {said}, in percent of {n} prompts, those included that show the concept without an attack. "
    note += "Queries: the mean for each prompt attacked. "
    return "\n".join([*lines, "", note + f"Intervals, seconds and the claims: `bench/results/{grid}`."])


def cell(rows: Sequence[Row], digits: int = 1) -> str:
    """Mean, lowest and highest of the rows' values; a dash when nothing was measured."""
    values = [float(r["value"]) for r in rows if r["value"]]
    if not values:
        return "–"
    low, high, mean = min(values), max(values), sum(values) / len(values)
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f}–{high:.{digits}f})" if high > low else "")


def written(text: str, content: str, start: str = START) -> str:
    """``text`` with ``content`` between the two marks. Raises ``SystemExit`` when they are missing."""
    if start not in text or END not in text.partition(start)[2]:
        raise SystemExit(f"README.md must hold the line {start} and below it {END}; put them back")
    head, _, rest = text.partition(start)
    tail = rest.partition(END)[2]
    return f"{head}{start}\n" + (f"{content}\n" if content else "") + END + tail


def main(words: Sequence[str]) -> int:
    """Rewrite the blocks, or with --check say whether they are up to date. Returns the exit code."""
    old = README.read_text(encoding="utf-8")
    new = written(old, table())
    for grid in FURTHER:
        new = written(new, plain(grid), f"<!-- results: {grid} -->")
    for mark, (grid, metrics) in BY_TASK.items():
        new = written(new, by_task(grid, metrics), f"<!-- results: {mark} -->")
    new = written(new, by_attack(ATTACKS), f"<!-- results: {ATTACKS} -->")
    if "--check" in words:
        if old != new:
            print("README.md does not say what the CSV files say; run: python docs/tables.py", file=sys.stderr)
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
