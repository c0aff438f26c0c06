"""The command lines that make a run folder again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from . import config
from .flags import Plain, Record


def commands(record: Record) -> list[str]:
    """The commands that make this folder again: erase, attack, evaluate, report."""
    from . import tasks  # which needs torch, as reading this module should not

    run, task = record.run["run"], record.task
    words = ["unlearn", "erase", record.method["name"], run["target"]]
    data = task.get("forget") or {}
    if task["name"] in tasks.names():
        words.append(task["name"])
        words += seeded(data, run["seed"], config.to_dict(tasks.load(task["name"]))["forget"]["seed"])
    elif data.get("source") and (task.get("retain") or {}).get("source") != data["source"]:
        words += option("concept", list(task["concepts"])) + option("kind", task["kind"])
        held = (task.get("holdout") or {}).get("source", "")
        for flag, value in (("forget", data["source"]), ("retain", task["retain"]["source"]), ("test", held)):
            words += option(flag, value) if value else []
    elif data.get("source"):
        words += option("data", data["source"]) + option("forget", data["rows"])
        words += option("validation", data["validation"]) if data.get("validation") else []
        words += seeded(data, run["seed"], 0)
    else:
        words += option("concept", list(task["concepts"])) + option("kind", task["kind"])
        for flag, field in (("anchor", "anchors"), ("preserve", "preserve")):
            words += option(flag, list(task[field])) if task.get(field) and field not in task.get("usual", ()) else []
    words += options(record.method)
    words += option("seed", run["seed"])
    if run.get("dtype", "float32") != "float32":
        words += option("dtype", run["dtype"])
    if run.get("patches"):
        words += option("patches", list(run["patches"]))
    where = f"{record.folder.parent.name}/{record.folder.name}"
    if not re.search(rf"-{re.escape(record.method['name'])}-[0-9a-f]{{8}}$", record.folder.name):
        words += option("out", where)
    elif record.folder.parent.name != "runs":
        words += option("runs", record.folder.parent.name)
    lines = [words]
    for name, attack in record.attacks.items():
        lines.append(["unlearn", "attack", name, where, *options(attack["attack"]), *option("seed", attack["seed"])])
        asked = attack.get("asked") or {}
        lines[-1] += option("prompts", asked.get("prompts", len(attack["verdicts"])))
        lines[-1] += [word for k in ("steps", "guidance", "scheduler") if asked.get(k) is not None for word in option(k, asked[k])]
    if record.evaluation:
        lines.append(["unlearn", "evaluate", where, *measured(record)])
    lines.append(["unlearn", "report", where])
    return [shlex.join(line) for line in lines]


def seeded(data: Mapping[str, Any], seed: int, usual: int | str) -> list[str]:
    """The option of erase for the seed of the pictures, where it is not ``usual``."""
    if data.get("draw") is not None and data["draw"] == seed:
        return option("split_seed", "run")
    return option("split_seed", data["seed"]) if data.get("source") and data.get("seed", 0) != usual else []


def measured(record: Record) -> list[str]:
    """The options of evaluate: sampler, reference runs beside this one, and metrics and number of seeds where they were not the task's."""
    words = [word for name, value in (record.evaluation.get("sampler") or {}).items() for word in option(name, value)]
    metrics = list(dict.fromkeys(row["metric"].partition("/")[0] for row in record.results))
    suite = set(record.task.get("suite") or metrics)
    if metrics and not suite - {"asr", "pre_asr"} <= set(metrics) <= suite:  # these two have no value without an attack
        words += option("metrics", metrics)
    asked = (record.evaluation.get("asked") or {}).get("references") or []
    others = [found for code in asked for found in sorted(record.folder.parent.glob(f"*-{code[:8]}")) if found != record.folder]
    words += option("references", [f"{found.parent.name}/{found.name}" for found in others]) if others else []
    seeds, own = record.evaluation.get("seeds") or [], list(record.task.get("seeds") or [])
    return words + (option("seeds", len(seeds)) if 0 < len(seeds) < len(own) and seeds == own[: len(seeds)] else [])


def options(part: Mapping[str, Any]) -> list[str]:
    """All fields of a method or attack as command line words."""
    return [word for name, value in flatten(fields(part)) for word in option(name, value)]


def option(name: str, value: Any) -> list[str]:
    """One field as command line words, the way tyro reads it: --lr 1e-05, --no-norm, --layers 0 1."""
    flag = name.replace("_", "-")
    if value is None:  # cannot be written there, and is the default of the fields that may be it
        return []
    if isinstance(value, bool):
        outer, dot, last = flag.rpartition(".")
        return [f"--{outer}{dot}{'' if value else 'no-'}{last}"]
    if isinstance(value, (list, tuple)):
        return [f"--{flag}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{flag}", *(str(word) for pair in value.items() for word in pair)]
    if isinstance(value, str) and value.startswith("-"):
        return [f"--{flag}={value}"]
    return [f"--{flag}", str(value)]


def fields(part: Mapping[str, Any]) -> Plain:
    """A method's or attack's fields, without its name."""
    return {k: v for k, v in part.items() if k != "name"}


def flatten(plain: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of nested fields."""
    rows: list[tuple[str, Any]] = []
    for name, value in plain.items():
        rows += flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [(prefix + name, value)]
    return rows
