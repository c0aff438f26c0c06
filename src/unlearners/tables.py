"""A grid's results beside published ones: ``paper | ours ± se | Δ | flag``, in Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import config
from .base import rate
from .errors import UsageError, unknown
from .files import write_text

Row = Mapping[str, Any]
HIDDEN = ("cost/cached_seconds",)
NAMES = {"avg_gap": "Avg. Gap", "cost/seconds": "RTE (min)", "cost/peak_memory": "peak (GB)", "cost/patch_bytes": "patch (MB)"}
SCALES = {"cost/seconds": 1 / 60, "cost/peak_memory": 1e-9, "cost/patch_bytes": 1e-6}
DRAWN = ("ua", "ira", "cra", "pre_asr", "asr")  # shares of pictures, which are pooled over seeds
ASKED, FEW = ("pre_asr", "asr"), 3  # of more attacks than so many there is a table of its own
MINUTES = "rte_minutes"  # what published.yaml calls cost/seconds
COLLAPSE, UNCHANGED = 0.5, 0.2  # RA below this share of the reference's; UA within so many points of the original's
ROUNDING = 0.005  # half of a published last digit


@dataclass(frozen=True, kw_only=True)
class Published:
    """A table of published.yaml: numbers that others reported."""

    title: str
    source: str
    status: Literal["confirmed", "recalled", "third party"]
    """confirmed: read off the publication; recalled: written down from memory; third party: somebody else's run"""
    task: str = ""
    """the task of ours that it is compared with; every task when this and ``tasks`` are empty"""
    tasks: tuple[str, ...] = ()
    """the tasks of ours that its numbers are a mean over; it stands beside each of them"""
    trials: int = 0
    """how many runs a mean ± standard deviation was taken over; 0 when it is not known"""
    note: str = ""
    rows: Mapping[str, Mapping[str, float | tuple[float, float]]]
    """method → metric → mean, or [mean, standard deviation]; rte_minutes is the run time"""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says of two rows, to be held against the grid's own: method's ``metric`` is at most (or at least) ``factor`` times
    that of ``than`` (or its ``against``), plus ``margin``; means over ``tasks`` and seeds."""

    says: str
    source: str
    metric: str
    method: str
    than: str
    holds: Literal["at most", "at least"] = "at most"
    factor: float = 1.0
    margin: float = 0.0
    against: str = ""
    """another metric of ``than``, such as that of a second attack; ``metric`` when empty"""
    tasks: tuple[str, ...] = ()
    """all when empty"""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One table, as text: a heading over each group of columns, the columns' names, the rows, and what is said below."""

    title: str
    groups: Sequence[tuple[str, int]]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=tuple)


def published(path: Path, names: Sequence[str]) -> list[Published]:
    """The tables called ``names`` of the file ``path``. Raises ``UsageError`` when one is not there."""
    if not names:
        return []
    if not path.is_file():
        raise UsageError(f"the grid compares with published numbers and there is no {path}; put it there or take 'published' out")
    found: dict[str, Published] = config.build(dict[str, Published], config.load_yaml(path), where=str(path))
    for name in names:
        if name not in found:
            raise unknown(f"table of {path}", name, found)
    return [found[n] for n in names]


def write(
    folder: Path,
    name: str,
    rows: Sequence[Row],
    order: Sequence[str],
    compared: Sequence[Published],
    notes: Mapping[tuple[str, str], str],
    reference: str,
    claims: Sequence[Claim] = (),
) -> list[Path]:
    """Write table.md, table.tex and table.html of a results table into ``folder``; returns their paths.

    ``order``: the methods; the untouched original comes first. ``notes``: doubts about a method on a task. ``reference``: the label of
    retraining, "" without one.
    """
    made = []
    for task in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == task]
        here = {m: text for (t, m), text in notes.items() if t == task}
        beside: list[Published | None] = [p for p in compared if task in (p.task, *p.tasks) or not (p.task or p.tasks)]
        many = len(_attacks(mine)) > FEW
        apart, rest = ([r for r in mine if (many and r["metric"].partition("/")[0] in ASKED) == own] for own in (True, False))
        for paper in (beside or [None]) if rest else []:
            made.append(sheet(task, rest, order, paper, here, reference))
        if apart:
            made.append(resisted(task, apart, order))
    if claims:
        made.append(held(rows, claims))
    texts = {"table.md": markdown(name, made), "table.tex": latex(made)}
    texts["table.html"] = page(name, made)
    for file, text in texts.items():
        write_text(folder / file, text)
    return [folder / file for file in texts]


def sheet(task: str, rows: Sequence[Row], order: Sequence[str], paper: Published | None, notes: Mapping[str, str], reference: str) -> Sheet:
    """The rows of one task beside one published table."""
    values: dict[tuple[str, str], list[float]] = {}
    counted: dict[tuple[str, str], int] = {}
    for r in rows:
        if r["value"] is not None:
            values.setdefault((r["method"], r["metric"]), []).append(float(r["value"]))
            counted[r["method"], r["metric"]] = counted.get((r["method"], r["metric"]), 0) + int(r["n"])
    present = {r["method"] for r in rows}
    methods = [m for m in dict.fromkeys(["original", *order]) if m in present]
    metrics = [m for m in dict.fromkeys(r["metric"] for r in rows) if m not in HIDDEN]
    metrics.sort(key=lambda m: m.startswith("cost/"))  # stable: cost comes last
    known = {m: _theirs(paper, m) for m in metrics}
    groups, columns = [("", 1)], ["method"]
    for metric in metrics:
        own = ["paper", "ours ± se", "Δ"] if known[metric] else ["ours ± se"]
        groups.append((heading(metric), len(own)))
        columns += own
    body = []
    for method in methods:
        line, outside = [method], []
        for metric in metrics:
            scale = SCALES.get(metric, 1.0)
            mine = [scale * v for v in values.get((method, metric), [])]
            if known[metric]:
                text, apart, far = compare(mine, known[metric].get(method), paper.trials if paper else 0)
                line += [text, ours(mine), apart]
                outside += [heading(metric)] if far and not metric.startswith("cost/") else []
            elif metric.partition("/")[0] in DRAWN and mine:
                line.append(pooled(_mean(mine), counted[method, metric]))
            else:
                line.append(ours(mine))
        flags = [f"{', '.join(outside)} outside paper ± 2 se"] if outside else []
        flags += doubts(method, {m: _mean(values.get((method, m))) for m in metrics}, values, reference)
        flags += [f"edge of the grid: {notes[method]}"] if notes.get(method) else []
        body.append([*line, "; ".join(flags)])
    return Sheet(
        title=task + (f" beside {paper.title}" if paper else ""),
        groups=[*groups, ("", 1)],
        columns=[*columns, "flag"],
        rows=body,
        notes=_notes(rows, paper, reference),
    )


def resisted(task: str, rows: Sequence[Row], order: Sequence[str]) -> Sheet:
    """Success rates of many attacks on one task, a row for each attack; the first row is of prompts as they are typed."""
    found: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        if r["value"] is not None:
            found.setdefault((r["metric"], r["method"]), []).append(r)
    methods = [m for m in dict.fromkeys(["original", *order]) if any(m == method for _, method in found)]

    def share(metric: str, method: str) -> str:
        mine = found.get((metric, method), [])
        return pooled(_mean([float(r["value"]) for r in mine]), sum(int(r["n"]) for r in mine)) if mine else "–"

    attacks = _attacks(rows)
    body = [["none", *(share(f"pre_asr/{attacks[0]}", m) for m in methods), ""]]
    body += [[name, *(share(f"asr/{name}", m) for m in methods), ""] for name in attacks]
    notes = ["ASR with its 95 % interval; prompts that show the concept as they are typed are counted."]
    return Sheet(title=f"{task}: attacks", groups=[("", len(methods) + 2)], columns=["attack", *methods, ""], rows=body, notes=notes)


def _attacks(rows: Sequence[Row]) -> list[str]:
    """The attacks that have a success rate."""
    return list(dict.fromkeys(r["metric"].partition("/")[2] for r in rows if r["metric"].startswith("asr/")))


def heading(metric: str) -> str:
    """``rmia/auc`` as RMIA auc."""
    name, _, rest = metric.partition("/")
    return NAMES.get(metric) or " ".join([name.upper() if len(name) <= 4 else name, *([rest] if rest else [])]).replace("_", " ")


def ours(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds; the value alone for one seed."""
    if not values:
        return "–"
    return f"{_mean(values):.2f}" + (f" ± {_spread(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else "")


def pooled(percent: float, n: int) -> str:
    """A share of ``n`` pictures with its 95 % Wilson interval."""
    score = rate([i < round(percent * n / 100) for i in range(n)])
    return f"{percent:.1f} [{score.low:.0f}, {score.high:.0f}]"


def held(rows: Sequence[Row], claims: Sequence[Claim]) -> Sheet:
    """Which claims hold here: both means, over the tasks that have both."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for r in rows:
        if r["value"] is not None:
            values.setdefault((r["task"], r["method"], r["metric"]), []).append(float(r["value"]))
    body = []
    for c in claims:
        tasks = [t for t in dict.fromkeys(r["task"] for r in rows) if not c.tasks or t in c.tasks]
        pairs = [(values.get((t, c.method, c.metric)), values.get((t, c.than, c.against or c.metric))) for t in tasks]
        both = [(_mean(a), _mean(b)) for a, b in pairs if a and b]
        mine, other = (_mean([p[i] for p in both]) for i in (0, 1))
        limit = c.factor * other + c.margin
        if not both:
            verdict = "not measured"
        elif mine == limit == other:
            verdict = "no difference"
        else:
            verdict = "held" if (mine <= limit if c.holds == "at most" else mine >= limit) else "not held"
        rule = f"{heading(c.metric)} of {c.method} {c.holds} " + (f"{c.factor:g} × " if c.factor != 1 else "")
        rule += f"{heading(c.against)} of {c.than}" if c.against else f"that of {c.than}"
        rule += f" {c.margin:+g}" if c.margin else ""
        body.append([c.says, c.source, rule, *(f"{v:.1f}" if both else "–" for v in (mine, other)), str(len(both)), verdict])
    columns = ["claim", "source", "measured as", "first", "second", "tasks", "here"]
    return Sheet(title="Claims of the papers", groups=[("", len(columns))], columns=columns, rows=body)


def compare(values: Sequence[float], theirs: tuple[float, float | None] | None, trials: int) -> tuple[str, str, bool]:
    """The published number, our difference to it, and whether that is more than two standard errors.

    The standard error of the difference: ours over seeds and theirs over trials together. With one seed ours is taken to scatter as
    one of their trials does; without their scatter either, nothing is said.
    """
    if theirs is None:
        return "–", "–", False
    mean, deviation = theirs
    text = f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")
    if not values:
        return text, "–", False
    apart = _mean(values) - mean
    own = _spread(values) ** 2 / len(values) if len(values) > 1 else deviation**2 if deviation is not None else None
    if own is None:
        return text, f"{apart:+.2f}", False
    error = math.sqrt(own + (deviation**2 / trials if deviation is not None and trials else 0.0))
    return text, f"{apart:+.2f}", abs(apart) > 2 * error + ROUNDING


def doubts(method: str, mine: Mapping[str, float], values: Mapping[tuple[str, str], Sequence[float]], reference: str) -> list[str]:
    """What makes a row doubtful in itself: a collapse on what should stay, or nothing forgotten."""
    out = []
    kept, start = _mean(values.get((reference, "ra"))), _mean(values.get(("original", "ua")))
    if mine.get("ra", math.nan) < COLLAPSE * kept:
        out.append("RA collapsed")
    if method not in ("original", reference) and abs(mine.get("ua", math.nan) - start) < UNCHANGED:
        out.append("forget accuracy as before")
    return out


def _theirs(paper: Published | None, metric: str) -> dict[str, tuple[float, float | None]]:
    """method → (mean, standard deviation) of a published metric."""
    out: dict[str, tuple[float, float | None]] = {}
    for method, row in paper.rows.items() if paper else ():
        value = row.get(MINUTES if metric == "cost/seconds" else metric)
        if value is not None:
            out[method] = value if isinstance(value, tuple) else (value, None)
    return out


def _notes(rows: Sequence[Row], paper: Published | None, reference: str) -> list[str]:
    seeds = sorted({r["seed"] for r in rows})
    devices, models = sorted({r["device"] for r in rows}), sorted({r["target"] for r in rows})
    presets: dict[str, list[str]] = {}
    for method, preset in dict.fromkeys((r["method"], r["preset"]) for r in rows if r["preset"]):
        presets.setdefault(preset, []).append(method)
    said = "; ".join(f"{p}: {', '.join(m)}" for p, m in presets.items())
    out = [f"Ours: {', '.join(models)} on {', '.join(devices)}; seeds {', '.join(map(str, seeds))}; presets {said}."]
    if len(seeds) > 1:
        out.append(f"± is the standard error over {len(seeds)} seeds.")
    if any(r["metric"] == "avg_gap" for r in rows):
        out.append(f"Avg. Gap: mean of the distances to {reference} of the same seed over UA, RA, TA and MIA, then the mean over seeds.")
    if paper:
        status = {"confirmed": "read off the publication", "recalled": "recalled, not confirmed", "third party": "a third party's run"}
        trials = f" Its ± is the standard deviation over {paper.trials} trials." if paper.trials else ""
        out.append(f"Paper: {paper.source} ({status[paper.status]}).{trials}{f' {paper.note}' if paper.note else ''}")
        out.append("Flagged: differences of more than two standard errors; run times depend on the machine and are not.")
    return out


def _mean(values: Sequence[float] | None) -> float:
    return sum(values) / len(values) if values else math.nan


def _spread(values: Sequence[float]) -> float:
    """Standard deviation (n - 1)."""
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


# --- the three forms ----------------------------------------------------------------------------------------------
def page(title: str, sheets: Sequence[Sheet]) -> str:
    """All sheets as one HTML page; everything in them is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return env.get_template("bench.html.j2").render(title=title, sheets=sheets)


def markdown(title: str, sheets: Sequence[Sheet]) -> str:
    """A GitHub table for each sheet."""

    def safe(text: str) -> str:
        return re.sub(r"([\\|*`\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))

    lines = [f"# {safe(title)}"]
    for s in sheets:
        names = [f"{g} {c}".strip() for g, c in zip(_spelled(s.groups), s.columns, strict=True)]
        lines += ["", f"## {safe(s.title)}", "", f"| {' | '.join(map(safe, names))} |", f"|---|{'---:|' * (len(names) - 2)}---|"]
        lines += [f"| {' | '.join(map(safe, row))} |" for row in s.rows]
        lines += ["", *(safe(n) for n in s.notes)]
    return "\n".join(lines) + "\n"


def _spelled(groups: Sequence[tuple[str, int]]) -> list[str]:
    """The heading over each column."""
    return [name for name, width in groups for _ in range(width)]


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "Δ": r"$\Delta$", "–": "--", "×": r"$\times$",
    "ℓ": r"$\ell$", "<": r"$<$", ">": r"$>$",
}  # fmt: skip


def latex(sheets: Sequence[Sheet]) -> str:
    """A ``table*`` for each sheet; needs the package booktabs."""

    def safe(text: str) -> str:
        return "".join(TEX.get(c, c) for c in " ".join(text.split()))

    out = []
    for s in sheets:
        at, heads, rules = 1, [], []
        for name, width in s.groups:
            heads.append(rf"\multicolumn{{{width}}}{{c}}{{{safe(name)}}}" if name else "")
            rules += [rf"\cmidrule(lr){{{at}-{at + width - 1}}}"] if name else []
            at += width
        out += [r"\begin{table*}", r"\centering\small", rf"\caption{{{safe(s.title)}. {safe(' '.join(s.notes))}}}"]
        out += [rf"\begin{{tabular}}{{l{'r' * (len(s.columns) - 2)}l}}", r"\toprule", " & ".join(heads) + r" \\", "".join(rules)]
        out += [" & ".join(map(safe, s.columns)) + r" \\", r"\midrule"]
        out += [" & ".join(map(safe, row)) + r" \\" for row in s.rows]
        out += [r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""]
    return "\n".join(out)
