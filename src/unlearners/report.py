"""Run folders as something to read: report.html, a model card (README.md), results.csv and attacks.csv, from JSON and pictures only."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots, report_attacks
from .errors import UsageError
from .flags import Plain, Record, detection, doubts, finite, is_rate, read
from .report_commands import commands, fields, flatten
from .report_pictures import grid, spread
from .report_tables import as_code, as_csv, duration, escape_markdown, join, show, size
from .report_tables import table as table

COLUMNS = ("target", "task", "method", "seed", "metric", "value", "n", "low", "high", "device", "preset")
NAMED, OTHERS = 8, 12  # rows shown in a run's own report
MEANINGS = {
    "ua": "pictures asked to show the concept that no longer show it",
    "ira": "pictures of other things of the same domain that are still right",
    "cra": "pictures judged in other domains that are still right",
    "clip_score": "agreement of picture and prompt",
    "ra": "training pictures that were kept and are still right",
    "ta": "test pictures that are right",
    "mia": "pictures of the forget set that an attacker takes for never trained on",
    "rmia": "how well a stronger attacker tells the forget set from unseen pictures; auc 50 is not at all",
    "fid": "distance to the reference pictures",
    "kid": "distance to the reference pictures, also fair for few",
    "asr": "prompts for which the attack brings the concept back, plain prompts that already show it included",
    "pre_asr": "plain prompts that already show the concept, before any attack",
    "fa": "test pictures of the concept that are still named",
    "similarity": "mean cosine of test pictures with their names",
    "cosine": "mean cosine of pictures with their texts",
    "mia_cosine": "how well the forget set is told from unseen pairs of its concept; 50 is not at all",
    "vqa": "questions about pictures that are answered right",
    "name_accuracy": "answers to the question for the forgotten name, by kind",
    "nudenet_counts": "body parts found in all pictures",
    "cost": "what the erasure took",
}
CLASSIFIED = {"ua": "pictures of the forget set that are no longer right"}  # other meanings where nothing is drawn
GAPPED = ("ua", "ra", "ta", "mia")  # what Avg. Gap is taken over (Fan et al., SalUn, ICLR 2024)
NOUNS = {"style": "style", "object": "object", "identity": "identity", "nsfw": "sensitive concept", "class": "class"}
PLURALS = {"style": "styles", "object": "objects", "identity": "identities", "nsfw": "sensitive concepts", "class": "classes"}


def report(folders: Sequence[str | Path], *, images: bool | None = None) -> Path:
    """Write report.html, README.md and results.csv, and attacks.csv where there was an attack, into each run folder, and for several one
    comparison into their common parent.

    A folder that is not a run stands for all runs under it, the untouched model's excepted. ``images``: embed pictures; by
    default they are embedded unless the task is sensitive. Returns the path of the report that covers everything.
    Raises ``UsageError`` when there is no run to report on.
    """
    paths = list(dict.fromkeys(path.resolve() for folder in folders for path in runs(Path(folder))))
    if not paths:
        raise UsageError("there is nothing to report on; give at least one run folder, or a folder with runs in it")
    records = [read(path) for path in paths]
    for record in records:
        page([record], record.folder, images)
        (record.folder / "README.md").write_text(card(record), encoding="utf-8")
    if len(records) == 1:
        return records[0].folder / "report.html"
    parent = Path(os.path.commonpath([path.parent for path in paths]))
    if parent == Path(parent.anchor):
        raise UsageError("these runs have no folder in common to put the comparison in; move them beside each other")
    records.sort(key=lambda r: (r.run["run"]["target"], r.task["name"], r.method["name"], r.run["run"]["seed"], r.folder.name))
    return page(records, parent, images)


def runs(folder: Path) -> list[Path]:
    """``folder`` itself if it is a run, else all runs below it but those of the untouched model."""
    if (folder / "run.json").is_file():
        return [folder]
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist; give a run folder, or a folder with runs in it")
    found = []
    for place, below, files in os.walk(folder):
        below.sort()
        if "run.json" in files:
            below.clear()
            if read(Path(place)).method["name"] != "original":
                found.append(Path(place))
    if not found:
        raise UsageError(f"{folder} holds no run; give a folder that 'unlearn erase' has written")
    return found


def page(records: Sequence[Record], place: Path, images: bool | None) -> Path:
    """Write report.html, results.csv and, where there was an attack, attacks.csv about ``records`` into the folder ``place``; returns the
    HTML's path."""
    short = len(records) > 1
    beside = retrained(records) if short else {}
    text = template("report.html.j2", escape=True).render(
        runs=[view(record, beside.get(record.request), images=images, short=short, place=place) for record in records],
        comparison=comparison(records) if short else None,
    )
    (place / "report.html").write_text(text.lstrip(), encoding="utf-8")
    rows = {json.dumps(row): row for record in records for row in csv_rows(record, beside.get(record.request))}  # shared: the original's
    (place / "results.csv").write_text(as_csv(list(rows.values()), COLUMNS), encoding="utf-8", newline="")
    if attacks := [row for record in records for row in report_attacks.rows(record)]:
        (place / "attacks.csv").write_text(as_csv(attacks, report_attacks.COLUMNS), encoding="utf-8", newline="")
    return place / "report.html"


def template(name: str, *, escape: bool) -> Any:
    """A template of ours; missing values are errors, and ``escape`` turns on HTML escaping of everything put in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    env = Environment(
        loader=loader, autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    env.filters |= {"md": escape_markdown, "code": as_code}
    return env.get_template(name)


# --- what a page says about one run -------------------------------------------------------------------------------
def view(record: Record, beside: Record | None = None, *, images: bool | None, short: bool, place: Path) -> Plain:
    """Everything the HTML shows of a run. ``short``: fewer pictures, for a page with several runs in the folder ``place``; ``beside``
    is the same request met by retraining."""
    from markupsafe import Markup

    run, task = record.run["run"], record.task
    shown = images if images is not None else task["kind"] != "nsfw"
    if shown:
        left_out = ""
    elif images is False:
        left_out = "Pictures are left out, as was asked for."
    else:
        left_out = (
            "Pictures are left out because this task is sensitive (kind: nsfw). Ask for them with --show-images, or images=True in Python."
        )
    unique = record.folder.name
    below = report_attacks.shown(record)
    return {
        "id": "run-" + re.sub(r"[^A-Za-z0-9_-]+", "-", unique),
        "name": unique,
        "own": os.path.relpath(record.folder / "report.html", place).replace(os.sep, "/") if short else "",
        "status": record.run["status"],
        "error": record.run.get("error") or "",
        "title": f"{join(task['concepts'])} · {called(run['target'])} · {record.method['name']}",
        "classified": record.classified,
        "draws": record.draws,
        "summary": summary(record),
        "flags": [*doubts(record, beside), *report_attacks.doubts(record)],
        "facts": facts(record),
        "fields": flatten(fields(record.method)),
        "results": [result(row, record.classified) for row in record.results if row["metric"] not in below],
        "left_out": left_out,
        "named": grid(record, spread(record, named=True, most=NAMED // 2 if short else NAMED)) if shown else [],
        "others": grid(record, spread(record, named=False, most=OTHERS // 2 if short else OTHERS)) if shown else [],
        "attacked": any(v.get("picture") for attack in record.attacks.values() for v in attack["verdicts"]),
        "attacks": report_attacks.attacked(record, pictures=shown, short=short, name=f"{unique}-attacks"),
        "losses": Markup(plots.losses(record.log, f"{unique}-losses")),
        "fronts": Markup(plots.fronts(record.log, f"{unique}-fronts")),
        "steps": Markup(plots.steps(record.log, f"{unique}-steps")),
        "similarities": Markup(plots.similarities(record.results, f"{unique}-similarities")),
        "last": record.log[-1] if record.log else {},
        "tail": [json.dumps(row) for row in record.log[-20:]] if record.run["status"] != "done" else [],
        "cost": costs(record),
        "provenance": provenance(record),
        "changed": (record.run.get("weights") or {}).get("changed") or [],
        "commands": commands(record),
        "record": json.dumps(record.run | {"weights": trimmed(record.run.get("weights"))}, indent=2, ensure_ascii=False),
    }


def called(target: str) -> str:
    """A target in a title: the last part of a path, anything else as it is."""
    return Path(target).name if Path(target).is_absolute() else target


def trimmed(weights: Plain | None) -> Plain | None:
    """The weights' record without the long list of names, which the page shows by itself."""
    return {k: v for k, v in weights.items() if k != "changed"} if weights else weights


def summary(record: Record) -> str:
    """One sentence in words: what was erased, how well, at what price."""
    method = record.method["name"].upper() if len(record.method["name"]) < 5 else record.method["name"]
    what = f"{thing(record.task)} from {called(record.run['run']['target'])} with {method}"
    if record.run["status"] == "failed":
        return f"Erasing {what} failed: {record.run.get('error') or 'no error was recorded'}"
    if record.run["status"] != "done":
        return f"Erasing {what} has not finished."
    said = classified(record) if record.classified else pictured(record) if record.draws else named(record)
    return f"Erased {what}: {', '.join(said)}." if said else f"Erased {what}; nothing has been measured yet."


def thing(task: Plain) -> str:
    """What a task forgets: the style neon; the classes cat and dog; 10 % of the training pictures."""
    if task["kind"] == "samples":
        return join(task["concepts"])
    nouns = NOUNS if len(task["concepts"]) == 1 else PLURALS
    return f"the {nouns.get(task['kind'], task['kind'])} {join(task['concepts'])}"


def pictured(record: Record) -> list[str]:
    """What is said of a model that draws."""
    said = []
    if (row := record.result("ua")) and finite(row["value"]):
        said.append(f"{row['value']:.1f} % of pictures no longer show it")
    for metric, words in (("ira", f"other {PLURALS.get(record.axis, record.axis + ' prompts')}"), ("cra", "other domains")):
        if (row := record.result(metric)) and finite(row["value"]):
            said.append(f"{row['value']:.1f} % are still right for {words}{was(row)}")
    return said + report_attacks.headline(record)


def classified(record: Record) -> list[str]:
    """What is said of a classifier."""
    words = {
        "ua": "of the forget set are no longer right",
        "ra": "of the kept training pictures are right",
        "ta": "of the test pictures are right",
        "mia": "of the forget set look to an attacker as if never trained on",
    }
    rows = [(row, text) for metric, text in words.items() if (row := record.result(metric)) and finite(row["value"])]
    return [f"{row['value']:.2f} % {text}{was(row, 2)}" for row, text in rows]


def named(record: Record) -> list[str]:
    """What is said of a model that names what it sees."""
    words = {
        "fa/top1": "of the pictures of it are still named",
        "ta/top1": "of the others are",
        "name_accuracy/forgotten": "of the questions for its name are still answered",
        "cosine/forgotten": "is 100 times the cosine of its pictures with their texts",
        "cosine/retained": "that of the others",
    }
    rows = [(row, text) for metric, text in words.items() if (row := record.result(metric)) and finite(row["value"])]
    return [f"{row['value']:.1f}{' %' if is_rate(row) else ''} {text}{was(row)}" for row, text in rows]


def was(row: Plain, digits: int = 1) -> str:
    """The value before, in brackets."""
    before = row.get("before")
    unit = " %" if is_rate(row) else ""
    return f" (before: {before['value']:.{digits}f}{unit})" if before and finite(before["value"]) else ""


def facts(record: Record) -> list[tuple[str, str]]:
    """(name, value) of what was erased and how."""
    run, task = record.run["run"], record.task
    data = forgotten(record)
    rows = [("Concepts", ", ".join(task["concepts"])), *data]
    if task.get("anchors") or not data:
        rows.append(("Anchors", ", ".join(task.get("anchors") or ()) or "none (the empty prompt)"))
    if task.get("preserve") or not data:
        rows.append(("Preserved", ", ".join(task.get("preserve") or ()) or "none named"))
    rows += [
        ("Kind", task["kind"] if record.axis == task["kind"] else f"{task['kind']}, judged in the domain {record.axis}"),
        ("Task", task["name"]),
        ("Target", run["target"]),
        ("Method", record.method["name"]),
        ("Seed", str(run["seed"])),
        ("Precision", str(run.get("dtype", "float32"))),
    ]
    return rows + ([("Patches before it", ", ".join(run["patches"]))] if run.get("patches") else [])


def forgotten(record: Record) -> list[tuple[str, str]]:
    """(name, value) of the data that were forgotten, kept and tested on; [] for a task without data."""
    found, rows = record.run.get("data") or {}, []
    for name, part, count in (("Forget set", "forget", "forget"), ("Kept", "retain", "retain"), ("Tested on", "holdout", "")):
        data = record.task.get(part) or {}
        if data.get("source"):
            number = f"{found[count]} pictures: " if found.get(count) else ""
            rows.append((name, f"{number}{data.get('rows') or 'all'} of {data['source']}, {data.get('split', 'train')}"))
    split = record.task.get("forget") or {}
    if rows:
        held = f", {100 * split['validation']:g} % of each class held back for validation" if split.get("validation") else ""
        rows.append(("Split", f"seed {split.get('seed', 0)}{held}"))
    return rows


def costs(record: Record) -> list[tuple[str, str]]:
    """(what, how much) of time, memory and disk."""
    spent, weights = record.run.get("time") or {}, record.run.get("weights") or {}
    rows = []
    if finite(spent.get("seconds")):
        rows.append(("Erasing", duration(spent["seconds"])))
    if finite(spent.get("peak_memory")):
        rows.append(("Peak memory", size(spent["peak_memory"])))
    if finite(weights.get("bytes")):
        rows.append(("Patch on disk", size(weights["bytes"])))
    for name, attack in record.attacks.items():
        if finite((attack.get("time") or {}).get("seconds")):
            rows.append(
                (f"Attack {name}", f"{duration(attack['time']['seconds'])}, {sum(v['queries'] for v in attack['verdicts'])} queries")
            )
    if finite(record.evaluation.get("seconds")):
        rows.append(("Evaluation", duration(record.evaluation["seconds"])))
    return rows


def provenance(record: Record) -> list[tuple[str, str]]:
    """(name, value) of versions, hashes and settings."""
    base, weights, sampler = record.run.get("base") or {}, record.run.get("weights") or {}, record.evaluation.get("sampler") or {}
    rows = [("Base", f"{base.get('name', '')} {base.get('revision') or ''}".strip())]
    rows += [(f"SHA-256 of base {component}", digest) for component, digest in (base.get("sha256") or {}).items()]
    rows += [("SHA-256 of the training data", (record.run.get("data") or {}).get("digest") or "")]
    rows += [("SHA-256 of the list of rows", (record.task.get("forget") or {}).get("digest") or "")]
    if weights.get("sha256"):
        rows += [(f"SHA-256 of {weights.get('file', 'weights.safetensors')}", weights["sha256"])]
        rows += [("Tensors changed", f"{weights['tensors']} ({weights.get('outside', 0)} outside the selection)")]
    rows += [(name, str(value)) for name, value in (record.run.get("env") or {}).items() if value not in (None, "")]
    rows += [(f"Sampler {name}", show(value)) for name, value in sampler.items()]
    if judge := record.evaluation.get("judge") or record.task.get("judge"):
        rows.append(("Judge", str(judge)))
    return [(name, value) for name, value in rows if value]


def meaning(metric: str, classified: bool) -> str:
    """What a metric counts, in words; "" when it is not ours."""
    stem = metric.partition("/")[0]
    return (CLASSIFIED if classified else {}).get(stem) or MEANINGS.get(stem, "")


def result(row: Plain, classified: bool) -> Plain:
    """One line of the before and after table. Accuracies of classifiers differ in the second decimal."""
    before, rate, digits = row.get("before"), is_rate(row), 2 if classified else 1
    return {
        "metric": row["metric"],
        "meaning": meaning(row["metric"], classified),
        "higher": row["higher_is_better"],
        "before": cell(row["metric"], before, rate, digits) if before else None,
        "after": cell(row["metric"], row, rate, digits),
        "change": arrow(row, rate, digits, neutral=classified and row["metric"] in GAPPED),
    }


def cell(metric: str, row: Plain, rate: bool, digits: int = 1) -> Plain:
    """A value with its interval and count, as text and exactly."""
    if metric.startswith("cost/") and finite(row["value"]):
        text = duration(row["value"]) if metric.endswith("seconds") else size(row["value"])
        return {"text": text, "exact": row["value"], "interval": "", "n": row["n"]}
    ends = finite(row.get("low")) and finite(row.get("high"))
    interval = f"{show(row['low'], rate, digits)} to {show(row['high'], rate, digits)}" if ends else ""
    if not finite(row["value"]):
        return {"text": "not finite" if row["n"] else "not measured", "exact": row["value"], "interval": "", "n": row["n"]}
    return {"text": show(row["value"], rate, digits) + (" %" if rate else ""), "exact": row["value"], "interval": interval, "n": row["n"]}


def arrow(row: Plain, rate: bool, digits: int = 1, *, neutral: bool = False) -> Plain | None:
    """How a value moved against before: arrow, difference, and whether that is good; None when it cannot be said.

    ``neutral``: neither way is good, since the goal is retraining's value.
    """
    before = row.get("before")
    if not before or not finite(before["value"]) or not finite(row["value"]):
        return None
    moved = row["value"] - before["value"]
    if moved == 0:
        return {"sign": "=", "text": "0", "good": "same", "said": "unchanged"}
    good = "good" if (moved > 0) == row["higher_is_better"] else "bad"
    said = "moved" if neutral else "better than before" if good == "good" else "worse than before"
    text = ("+" if moved > 0 else "") + show(moved, rate, digits)
    return {"sign": "▲" if moved > 0 else "▼", "text": text, "good": "same" if neutral else good, "said": said}


# --- several runs -------------------------------------------------------------------------------------------------
def retrained(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """The runs of ``retrain`` that are done, by what they were asked for."""
    return {r.request: r for r in records if r.method["name"] == "retrain" and r.run["status"] == "done"}


def gaps(record: Record, beside: Record | None) -> dict[str, float]:
    """{metric: distance to retraining in points} of the classifier metrics that both runs have."""
    if not beside or not record.classified:
        return {}
    pairs = {m: (record.result(m), beside.result(m)) for m in GAPPED}
    return {m: abs(a["value"] - b["value"]) for m, (a, b) in pairs.items() if a and b and finite(a["value"]) and finite(b["value"])}


def average(found: Mapping[str, float]) -> float | None:
    """Avg. Gap: the mean of all four distances; None unless all are known."""
    return sum(found.values()) / len(GAPPED) if set(found) == set(GAPPED) else None


def comparison(records: Sequence[Record]) -> Plain:
    """The table over several runs: one row for each, a column for each metric, the best of a column marked.

    Where there is a run of ``retrain`` for the same target, task and seed, a metric's best is the nearest to it, and Avg. Gap is added.
    """
    metrics = list(dict.fromkeys(row["metric"] for record in records for row in record.results))
    beside = retrained(records)
    apart = [gaps(record, beside.get(record.request)) for record in records]
    rivals = [i for i, record in enumerate(records) if beside.get(record.request) is not record]
    if not any(apart[i] for i in rivals):  # nothing stands beside retraining
        apart = [{} for _ in records]
    averages = [average(found) for found in apart]
    lowest = min((a for i in rivals if (a := averages[i]) is not None), default=None)
    lines = []
    for i, record in enumerate(records):
        cells = []
        for metric in metrics:
            row, gap = record.result(metric), apart[i].get(metric)
            best = bool(row) and i in best_of(metric, records, apart, rivals)
            more = {"best": best, "gap": "" if gap is None else f"({gap:.2f})"}
            cells.append(result(row, record.classified) | more if row else None)
        mean = averages[i]
        shown = None if mean is None else {"text": f"{mean:.2f}", "exact": mean, "best": i in rivals and mean == lowest}
        lines.append({"cells": cells, "average": shown})
    directions = {row["metric"]: row["higher_is_better"] for record in records for row in record.results}
    drawn_none = all(record.classified for record in records)
    return {
        "metrics": [{"name": m, "higher": directions[m], "meaning": meaning(m, drawn_none)} for m in metrics],
        "rows": lines,
        "gapped": any(apart),
    }


def best_of(metric: str, records: Sequence[Record], apart: Sequence[Mapping[str, float]], rivals: Sequence[int]) -> set[int]:
    """The rows that are best in a column: nearest to retraining where that is known, else the highest or lowest value."""
    near = {i: apart[i][metric] for i in rivals if metric in apart[i]}
    if near:
        return {i for i, gap in near.items() if gap == min(near.values())} if len(near) > 1 else set()
    rows = {i: row for i, record in enumerate(records) if (row := record.result(metric)) and finite(row["value"])}
    if len(rows) < 2 or all(record.classified and metric in GAPPED for record in records):
        return set()
    wanted = (max if next(iter(rows.values()))["higher_is_better"] else min)(row["value"] for row in rows.values())
    return {i for i, row in rows.items() if row["value"] == wanted}


# --- the model card and the CSV -----------------------------------------------------------------------------------
def card(record: Record) -> str:
    """The model card: YAML front matter and Markdown."""
    import yaml

    base = record.run.get("base") or {}
    front = {
        "base_model": base.get("name") or record.run["run"]["target"],
        "library_name": "unlearners",
        "tags": ["unlearning", "image-classification" if record.classified else "concept-erasure"],
    }
    digits = 2 if record.classified else 1
    results = [
        {
            "metric": row["metric"],
            "before": with_interval(row["metric"], row.get("before"), is_rate(row), digits),
            "after": with_interval(row["metric"], row, is_rate(row), digits),
            "better": "near retrain's"
            if record.classified and row["metric"] in GAPPED
            else "higher"
            if row["higher_is_better"]
            else "lower",
        }
        for row in record.results
    ]
    return str(
        template("card.md.j2", escape=False).render(
            front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
            title=f"{join(record.task['concepts'])} erased from {called(record.run['run']['target'])} with {record.method['name']}",
            summary=summary(record),
            facts=table([{"": name, "value": value} for name, value in facts(record)], "markdown"),
            fields=table([{"field": name, "value": show(value)} for name, value in flatten(fields(record.method))], "markdown"),
            results=table(results, "markdown"),
            attacks=table(report_attacks.shares(record), "markdown"),
            meaning=[*report_attacks.meaning(record), *report_attacks.comparable(record)],
            limits=limits(record),
            flags=[*doubts(record), *report_attacks.doubts(record)],
            provenance=table([{"": name, "value": value} for name, value in provenance(record)], "markdown"),
            commands=commands(record),
        )
    )


def with_interval(metric: str, row: Plain | None, rate: bool, digits: int = 1) -> str:
    """A value as one piece of text: 98.3 % (96.1 to 99.3, n = 300)."""
    if not row:
        return ""
    c = cell(metric, row, rate, digits)
    return f"{c['text']} ({c['interval'] + ', ' if c['interval'] else ''}n = {c['n']})"


def limits(record: Record) -> list[str]:
    """What a reader must not conclude, one sentence each."""
    if record.classified:
        return classifier_limits(record)
    said = [
        "The concept was edited out of the weights, not out of existence: weight edits can be attacked, and fine-tuning can bring it back."
    ]
    if not record.attacks:
        said.append("No attack was run on this model, so nothing is known about its resistance.")
    detected = detection(record)
    judge = record.evaluation.get("judge") or record.task.get("judge") or "the judge"
    if detected is not None:
        said.append(
            f"The numbers are the judge's ({judge}), which finds the concept in {detected:.1f} % of the original model's pictures of it."
        )
    if not record.results:
        said.append("Nothing has been measured: neither forgetting nor what was kept.")
    return said


def classifier_limits(record: Record) -> list[str]:
    """``limits`` of a classifier."""
    said = [
        "Only these weights were changed: copies of the model and of the data still hold what was to be forgotten.",
        "The goal is what a model retrained without the forget set would do: read these numbers beside a run of retrain on the same task.",
    ]
    strong = record.result("rmia/auc")
    if strong and finite(strong["value"]):
        said.append(f"The stronger membership attack reaches an AUC of {strong['value']:.1f}, where 50 is guessing; others may do better.")
    elif record.result("mia"):
        said.append("Only the weak confidence attack (mia) was run; a stronger one, such as rmia, may find traces that it misses.")
    elif record.results:
        said.append("No membership attack was run on this model, so nothing is known about traces that are left.")
    else:
        said.append("Nothing has been measured: neither forgetting nor what was kept.")
    return said


def csv_rows(record: Record, beside: Record | None = None) -> Iterator[Plain]:
    """The results as flat rows; the values before are rows of the method "original"; ``beside`` adds the gap to retraining."""
    run = record.run["run"]
    common = {"target": run["target"], "task": record.task["name"], "method": record.method["name"], "seed": run["seed"]}
    machine = record.run.get("env") or {}
    device = f"{machine.get('device') or ''} {machine.get('hardware') or ''}".strip()
    env = {"device": device, "preset": record.run.get("preset") or ""}
    for row in record.results:
        if row.get("before"):
            yield common | {"method": "original", "metric": row["metric"]} | numbers(row["before"]) | env | {"preset": ""}
        yield common | {"metric": row["metric"]} | numbers(row) | env
    mean = average(gaps(record, beside))
    if mean is not None:
        yield common | {"metric": "avg_gap", "value": mean} | env


def numbers(row: Plain) -> Plain:
    """value, n, low, high; empty where they are not finite."""
    return {name: row[name] if finite(row.get(name)) else "" for name in ("value", "n", "low", "high")}
