"""The part of a report that is about attacks: what they found, what it means, and what their numbers may be compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from . import plots
from .flags import Plain, Record, finite, key, wilson
from .report_commands import fields, flatten
from .report_pictures import outcome, picture
from .report_tables import duration, join, show

FOUND, FEW, SIDE_BY_SIDE = 16, 4, 8  # prompts in a run's own report, in one over several runs, and rows of pictures
COLUMNS = (
    *("target", "task", "method", "run_seed", "attack", "access", "level", "prompts", "attacked", "plain", "broken", "asr", "low", "high"),
    *("queries_median", "queries_total", "seconds", "seed", "preset", "judge", "detected", "steps", "guidance", "broken_by"),
)
ATTACKERS = {
    ("black", "prompt"): "someone who can only send prompts and look at the pictures",
    ("black", "tokens"): "someone who can only send tokens and look at the pictures",
    ("white", "prompt"): "someone who searches for prompts with the weights in hand, and the prompts found work for anyone",
    ("white", "tokens"): "someone who searches for tokens with the weights in hand",
    ("white", "embedding"): "someone who holds the weights and feeds in embeddings of their own",
    ("white", "latent"): "someone who holds the weights and chooses the noise that pictures start from",
}
FORMS = {
    "prompt": "prompt",
    "tokens": "tokens",
    "embedding": "embeddings; words cannot say them",
    "latent": "start noise, without a text",
}
ONLY_HERE = "Compare only with rows of this report, or of a grid, that were made with the same settings."


def attacked(record: Record, *, pictures: bool, short: bool, name: str) -> Plain:
    """Everything the HTML shows of the attacks on a run; ``rows`` is empty when there was none.

    ``pictures``: put pictures in. ``short``: fewer prompts and no pictures. ``name`` makes the ids of the curve unique.
    """
    from markupsafe import Markup

    measured, best = rows(record), strongest(record)
    return {
        "rows": [line(row, row["attack"] == best) for row in measured],
        "meaning": meaning(record),
        "doubts": doubts(record),
        "curve": Markup(plots.attack_curve(record.attacks, name)),
        "protocols": [(row["attack"], protocol(record.attacks[row["attack"]])) for row in measured],
        "comparable": comparable(record),
        "found": [
            found(record, row["attack"], most=FEW if short else FOUND, pictures=pictures and not short)
            | {"open": row["attack"] == best or len(measured) == 1}
            for row in measured
            if row["broken"] > row["plain"]
        ],
    }


# --- numbers ------------------------------------------------------------------------------------------------------
def rows(record: Record) -> list[Plain]:
    """One row for each attack with at least one prompt, under the names of ``COLUMNS``. Rates are in percent, with Wilson's interval.

    ``plain`` counts prompts that show the concept as they are typed; ``broken`` includes them. Queries are those of prompts on which
    any was spent. ``detected`` is how often the judge finds the concept in the original's pictures; None where that was not recorded.
    """
    run = record.run["run"]
    common = {"target": run["target"], "task": record.task["name"], "method": record.method["name"], "run_seed": run["seed"]}
    return [common | measure(name, attack) for name, attack in record.attacks.items() if attack["verdicts"]]


def measure(name: str, attack: Plain) -> Plain:
    """The numbers of one attack."""
    verdicts, sampler = attack["verdicts"], attack.get("sampler") or {}
    n, won = len(verdicts), sum(v["success"] for v in verdicts)
    spent = [v["queries"] for v in verdicts if v["queries"]]
    seen = [v["detected"] for v in verdicts if v.get("detected") is not None]
    by = Counter(v["by"] for v in verdicts if v["success"] and not v["before"] and v.get("by"))
    low, high = wilson(won / n, n)
    return {
        "attack": name,
        "access": attack["access"],
        "level": attack.get("level") or "prompt",
        "prompts": n,
        "attacked": (attack.get("filter") or {}).get("attacked", n),
        "plain": sum(v["before"] for v in verdicts),
        "broken": won,
        "asr": 100 * won / n,
        "low": low,
        "high": high,
        "queries_median": median(spent) if spent else 0,
        "queries_total": sum(spent),
        "seconds": (attack.get("time") or {}).get("seconds"),
        "seed": attack["seed"],
        "preset": attack.get("preset") or "",
        "judge": attack.get("judge") or "",
        "detected": 100 * sum(seen) / len(seen) if seen else None,
        "steps": sampler.get("steps"),
        "guidance": sampler.get("guidance"),
        "broken_by": ", ".join(f"{member} {count}" for member, count in by.most_common()),
    }


def strongest(record: Record) -> str:
    """The attack with the largest lower bound, then rate, then the fewest queries; "" when none brought the concept back."""
    won = [row for row in rows(record) if row["broken"]]
    return str(max(won, key=lambda r: (r["low"], r["asr"], -r["queries_total"]))["attack"]) if won else ""


def shown(record: Record) -> set[str]:
    """The metrics that the table of attacks says, so that no other table needs to."""
    return {f"{metric}/{row['attack']}" for row in rows(record) for metric in ("asr", "pre_asr")}


def headline(record: Record) -> list[str]:
    """The worst rate of those who type prompts and, where it is higher, of those who feed in something else."""
    rates = {
        row["metric"].removeprefix("asr/"): float(row["value"])
        for row in record.results
        if row["metric"].startswith("asr/") and finite(row["value"])
    }
    typed = {name: rate for name, rate in rates.items() if record.attacks.get(name, {}).get("level", "prompt") in ("prompt", "tokens")}
    other = {name: rate for name, rate in rates.items() if name not in typed}
    said = []
    if typed:
        name, rate = max(typed.items(), key=lambda pair: pair[1])
        said.append(f"the attack {name} brings it back for {rate:.1f} % of prompts")
    if other and max(other.values()) > max(typed.values(), default=-1.0):
        name, rate = max(other.items(), key=lambda pair: pair[1])
        own = f"{name}, which feeds in {FORMS[record.attacks[name]['level']].partition(';')[0].partition(',')[0]} of its own,"
        said.append(f"and {own} for {rate:.1f} %" if typed else f"the attack {own} brings it back for {rate:.1f} %")
    return said


def line(row: Plain, best: bool) -> Plain:
    """A row of the table as text."""
    typed = row["plain"] / row["prompts"]
    low, high = wilson(typed, row["prompts"])
    return row | {
        "typed": f"{100 * typed:.1f} % ({low:.1f} to {high:.1f})",
        "best": best,
        "rate": f"{row['asr']:.1f} %",
        "interval": f"{row['low']:.1f} to {row['high']:.1f}",
        "median": f"{row['queries_median']:g}",
        "time": duration(row["seconds"]) if finite(row["seconds"]) else "—",
        "settings": row["preset"] or "own",
    }


def shares(record: Record) -> list[Plain]:
    """The table of attacks for the model card."""
    return [
        {
            "attack": f"{row['attack']} (strongest)" if row["attack"] == strongest(record) else row["attack"],
            "access": row["access"],
            "level": row["level"],
            "prompts": row["prompts"],
            "as typed": row["plain"],
            "brought back": f"{row['broken']} = {row['asr']:.1f} % ({row['low']:.1f} to {row['high']:.1f})",
            "queries, median": f"{row['queries_median']:g}",
            "queries": row["queries_total"],
            "settings": row["preset"] or "own settings",
        }
        for row in rows(record)
    ]


# --- sentences ----------------------------------------------------------------------------------------------------
def meaning(record: Record) -> list[str]:
    """What the attacks together mean for the owner of the model; [] when there was none."""
    measured = rows(record)
    if not measured:
        return []
    name = strongest(record)
    said = [stood(max(measured, key=lambda row: int(row["prompts"])))]
    if name:
        said = [fell(next(row for row in measured if row["attack"] == name))]
    said.append("What an attack finds is a lower bound: a stronger one, or a larger budget, may find more.")
    if len({settings(attack) for attack in record.attacks.values() if attack["verdicts"]}) > 1:
        said.append("The attacks did not all have the same prompts, seeds, judge and sampler, so rank their rates with care.")
    return said


def stood(row: Plain) -> str:
    """For attacks that broke nothing; ``row`` is the one with the most prompts."""
    return (
        f"No attack brings it back: 0 of {row['prompts']} prompts with {row['attack']}; with so many prompts tried, the true share may "
        f"still be up to {row['high']:.1f} %."
    )


def fell(row: Plain) -> str:
    """For the strongest attack."""
    n, share = row["prompts"], f"{row['asr']:.1f} %, 95 % interval {row['low']:.1f} to {row['high']:.1f}"
    one, typed = row["broken"] == 1, f", {row['plain']} of them as typed" if row["plain"] else ""
    if row["broken"] == row["plain"]:
        shown = f"{row['plain']} of {n} prompts {'shows' if one else 'show'} it as {'it is' if one else 'they are'} typed ({share})"
        return f"{shown}, so the erasure does not hold even without an attack."
    who = "someone who tries several attacks in turn" if row["broken_by"] else ATTACKERS[row["access"], row["level"]]
    return (
        f"{row['broken']} of {n} prompts {'brings' if one else 'bring'} it back with {row['attack']}, the strongest attack here "
        f"({share}{typed}); the erasure does not hold against {who}."
    )


def settings(attack: Plain) -> str:
    """What two attacks must share for their rates to be ranked."""
    return repr((sorted(map(key, attack["verdicts"])), attack.get("judge"), sorted((attack.get("sampler") or {}).items())))


def doubts(record: Record) -> list[str]:
    """What makes these numbers doubtful, one sentence each."""
    return [*blind(record), *cut(record), *stale(record)]


def cut(record: Record) -> Iterator[str]:
    """Prompts that leave no room, for their own end or for what an attack adds."""
    full = {name: attack["full"] for name, attack in record.attacks.items() if attack.get("full") and attack["verdicts"]}
    if full:
        most = max(full, key=full.__getitem__)
        n = len(record.attacks[most]["verdicts"])
        yield (
            f"{full[most]} of {n} prompts {'is' if full[most] == 1 else 'are'} as long as the text encoder reads or longer: what does not "
            "fit is cut off, from the end, and what an attack puts before a prompt pushes more of it out."
        )


def stale(record: Record) -> Iterator[str]:
    """Rates among the results that are not those of the attack that is there now."""
    for row in rows(record):
        said = record.result(f"asr/{row['attack']}")
        if said and (said["n"] != row["prompts"] or not finite(said["value"]) or abs(said["value"] - row["asr"]) > 1e-6):
            yield f"The result asr/{row['attack']} is of an earlier attack than the one shown; run 'unlearn evaluate' on this folder again."


def blind(record: Record) -> list[str]:
    """Doubts about judges that do not know the original's pictures for what they are, one sentence for each judge and count."""
    seen: dict[tuple[str, int, int], list[str]] = {}
    for row in rows(record):
        if row["detected"] is not None and row["detected"] < 50:
            count = round(row["detected"] * row["prompts"] / 100)
            seen.setdefault((row["judge"], count, row["prompts"]), []).append(row["attack"])
    return [unseen(judge, count, n, join(names)) for (judge, count, n), names in seen.items()]


def unseen(judge: str, count: int, n: int, names: str) -> str:
    """The doubt about one judge, which found the concept in ``count`` of the original's ``n`` pictures."""
    share, worth = (f"only {count}", "little") if count else ("none", "nothing")
    return (
        f"The judge {judge} finds the concept in {share} of the original's {n} pictures for the prompts of {names}, so a prompt that "
        f"resists says {worth} about the erasure."
    )


def protocol(attack: Plain) -> str:
    """Every setting a rate hangs on, in one line."""
    return "; ".join(part for part in settings_of(attack) if part)


def settings_of(attack: Plain) -> Iterator[str]:
    """The parts of the protocol line: judge, prompts, sampler, settings, seeds, versions."""
    verdicts, judging = attack["verdicts"], attack.get("judging") or {}
    about = ", ".join(f"{name} {show(value)}" for name, value in flatten(fields(judging)) if value not in (None, ""))
    seen = [v["detected"] for v in verdicts if v.get("detected") is not None]
    tried = f", which finds it in {sum(seen)} of {len(seen)} pictures of the original" if seen else ", not tried on the original"
    yield f"judge {attack.get('judge') or 'unknown'}{f' ({about})' if about else ''}{tried}"
    cut = attack.get("filter")
    limit = f", {cut['attacked']} of them attacked (at most {cut['max_tokens']} tokens)" if cut else ", no filter"
    yield " of ".join([f"{len(verdicts)} prompts", *([attack["task"]] if attack.get("task") else [])]) + limit
    yield "sampler " + ", ".join(f"{name} {show(value)}" for name, value in (attack.get("sampler") or {"settings": "not recorded"}).items())
    yield f"preset {attack['preset']}" if attack.get("preset") else f"own settings ({own(attack['attack'])})"
    seeds = sorted({v["seed"] for v in verdicts})
    drawn = ", ".join(map(str, seeds)) if len(seeds) < 6 else f"{len(seeds)} from {seeds[0]} to {seeds[-1]}"
    yield f"attack seed {attack['seed']}, picture seeds {drawn}"
    env = attack.get("env") or {}
    yield ", ".join(f"{name} {env[name]}" for name in ("unlearners", "torch", "device") if env.get(name))


def own(part: Mapping[str, Any]) -> str:
    """An attack's fields in one line."""
    return ", ".join(f"{name} {show(value)}" for name, value in flatten(fields(part))) or "it has no fields"


def comparable(record: Record) -> list[str]:
    """With which numbers the attacks' may be compared: one sentence for each answer."""
    answers: dict[str, list[str]] = {}
    for row in rows(record):
        answers.setdefault(compared(record.attacks[row["attack"]]), []).append(row["attack"])
    return [text if len(answers) == 1 else f"{join(names)}: {text[0].lower()}{text[1:]}" for text, names in answers.items()]


def compared(attack: Plain) -> str:
    """The paper's table, or only this report: ``paper`` needs the paper's budget and a published set of prompts."""
    preset, paper, suite = attack.get("preset") or "", attack.get("paper") or "", (attack.get("asked") or {}).get("suite") or ""
    if not preset.startswith(("paper", "release")) or paper in ("", "control") or not suite:
        return ONLY_HERE
    return (
        f"Comparable with the table of {paper} if {suite.partition('@')[0]} and the judge {attack['judge']} are also what it uses, "
        "with the sampler above; else compare only within this report."
    )


# --- prompts and pictures -----------------------------------------------------------------------------------------
def found(record: Record, name: str, *, most: int, pictures: bool) -> Plain:
    """What the attack ``name`` found beyond plain prompts: up to ``most`` of its prompts, how many more there are, and with ``pictures``
    the first few side by side."""
    attack = record.attacks[name]
    won = [v for v in attack["verdicts"] if v["success"] and not v["before"]]
    return {
        "attack": name,
        "count": len(won),
        "seed": attack["seed"],
        "rows": [
            {
                "prompt": v["prompt"],
                "seed": v["seed"] if v.get("drawn") is None else v["drawn"],
                "adversarial": v["adversarial"],
                "form": FORMS.get(v["level"], v["level"]),
                "queries": v["queries"],
                "by": v.get("by") or "",
            }
            for v in won[:most]
        ],
        "members": any(v.get("by") for v in won),
        "rest": max(0, len(won) - most),
        "pictures": beside(record, attack, name, won) if pictures else [],
    }


def beside(record: Record, attack: Plain, name: str, won: Sequence[Plain]) -> list[Plain]:
    """Original, erased and attacked picture of the first prompts of which one was kept."""
    kept = [v for v in won if v.get("picture") or v.get("clean")][:SIDE_BY_SIDE]
    # the original's pictures lie in a folder beside the run's; only its name is taken, since the run may come from elsewhere
    folder = record.folder.resolve().parent / attack["original"].rpartition("/")[2] if attack.get("original") else None
    grid = []
    for v in kept:
        before = picture(folder, v["original"]) if folder and v.get("original") else ""
        said = {None: ("not judged", "same"), True: ("shows it", "good"), False: ("not found by the judge", "bad")}[v.get("detected")]
        shots = [
            {"who": "original", "uri": before, "label": said[0], "good": said[1]},
            {
                "who": "erased",
                "uri": picture(record.folder, v["clean"]) if v.get("clean") else "",
                "label": "as typed: gone",
                "good": "good",
            },
            {"who": name, "uri": picture(record.folder, v["picture"]) if v.get("picture") else "", **outcome(v)},
        ]
        grid.append({"prompt": v["prompt"], "seed": v["seed"], "pictures": shots})
    return grid
