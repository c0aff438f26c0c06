"""Automatic doubts about a result, read from a run folder's JSON and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UnlearnError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

Plain = dict[str, Any]

SCHEMA = 1
RATES = {"ua", "ra", "ta", "mia", "rmia", "ira", "cra", "asr", "pre_asr"}
UNCHANGED = 0.1  # points of forget accuracy
CHECKED = 200  # pictures opened to look for flat ones; a protocol FID has 10,000


# --- reading a run folder -----------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything a run folder says, as JSON. What has not been written yet is empty."""

    folder: Path
    run: Plain
    """run.json"""
    results: list[Plain]
    attacks: dict[str, Plain]
    """{name: attacks/<name>.json}"""
    evaluation: Plain
    """evaluate.json"""
    samples: list[Plain]
    """samples/manifest.jsonl; ``truth`` and ``labels`` are {} and ``named`` is None for prompts that are not the task's probes"""
    original: Path | None
    """folder of the untouched model's samples, where it was named and is there"""
    originals: dict[tuple[str, int], Plain]
    """its manifest by (prompt, seed)"""
    log: list[Plain]

    @property
    def task(self) -> Plain:
        task: Plain = self.run["run"]["task"]
        return task

    @property
    def method(self) -> Plain:
        method: Plain = self.run["run"]["method"]
        return method

    @property
    def axis(self) -> str:
        """The domain that is judged for forgetting."""
        return str(self.task.get("domain") or self.task["kind"])

    @property
    def classified(self) -> bool:
        """Whether the run is about a classifier, which draws nothing."""
        return bool(self.run.get("family") == "classifier")

    @property
    def draws(self) -> bool:
        """Whether the run is about a model that draws pictures."""
        return self.run.get("family") not in ("classifier", "clip", "llava")

    @property
    def request(self) -> tuple[str, str]:
        """What was asked for apart from the method: runs with the same one can be compared with one another."""
        run = self.run["run"]
        parts = {name: run.get(name) for name in ("target", "seed", "patches")} | {"task": self.task["name"]}
        return json.dumps(parts, sort_keys=True), json.dumps(self.task.get("forget"), sort_keys=True)

    def result(self, metric: str) -> Plain | None:
        """The row of a metric, if it was measured."""
        return next((row for row in self.results if row["metric"] == metric), None)


def read(folder: str | Path) -> Record:
    """Read a run folder. Raises ``UsageError`` when there is no run in it, ``UnlearnError`` when a file is damaged."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise UsageError(f"{folder} holds no run.json; give a folder that 'unlearn erase' has written")
    run = read_json(folder / "run.json")
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        found = run.get("schema") if isinstance(run, dict) else None
        raise UnlearnError(f"{folder / 'run.json'} has schema {found} and this version reads {SCHEMA}; use the version that wrote it")
    evaluation: Plain = read_json(folder / "evaluate.json") if (folder / "evaluate.json").is_file() else {}
    original = (folder / evaluation["original"]).resolve() if evaluation.get("original") else None
    if original and not (original / "samples" / "manifest.jsonl").is_file():
        original = None
    return Record(
        folder=folder,
        run=run,
        results=[row for name in ("results.json", "cost.json") if (folder / name).is_file() for row in read_json(folder / name)],
        attacks={path.stem: read_json(path) for path in sorted((folder / "attacks").glob("*.json"))},
        evaluation=evaluation,
        samples=read_samples(folder),
        original=original,
        originals={key(row): row for row in read_samples(original)} if original else {},
        log=read_lines(folder / "log.jsonl"),
    )


def read_json(path: Path) -> Any:
    """A JSON file, or one sentence about what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnlearnError(f"{path} is not valid JSON ({error}); delete it and run the step that writes it again") from None


def read_lines(path: Path) -> list[Plain]:
    """A JSON-lines file; none when it is not there. A killed run can leave half a last line, which is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    half = lines.pop()  # "" when the file ends with a newline, as every complete one does
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError:
            raise UnlearnError(f"{path} is damaged at line {number}; delete it and run the step that writes it again") from None
    if half.strip().endswith("}"):
        try:
            rows.append(json.loads(half))
        except ValueError:
            return rows
    return rows


def read_samples(folder: Path) -> list[Plain]:
    """The manifest of a folder's samples; only the task's own probes are annotated there, the rest (a FID's captions) is not."""
    return [{"truth": {}, "labels": {}, "named": None} | row for row in read_lines(folder / "samples" / "manifest.jsonl")]


def key(row: Plain) -> tuple[str, int]:
    """What joins samples, originals and verdicts: the prompt and the image seed."""
    return str(row["prompt"]), int(row["seed"])


def inside(root: Path, name: str) -> Path | None:
    """The file ``name`` of the folder ``root``; None when it is missing or points outside (the folder may come from elsewhere)."""
    path = (root / name).resolve()
    return path if path.is_relative_to(root.resolve()) and path.is_file() else None


def finite(value: Any) -> bool:
    """Whether ``value`` is a number that is neither NaN nor infinite; JSON has null for those too."""
    return bool(isinstance(value, (int, float)) and math.isfinite(value))


def is_rate(row: Plain) -> bool:
    """Whether a result is a percentage: a known one, or one whose interval is Wilson's for its n."""
    if row["metric"].partition("/")[0] in RATES:
        return True
    value, n, low, high = row["value"], row["n"], row["low"], row["high"]
    if not all(map(finite, (value, low, high))) or not n or not 0 <= value <= 100:
        return False
    expected = wilson(value / 100, n)
    return bool(abs(expected[0] - low) < 0.05 and abs(expected[1] - high) < 0.05)


def wilson(p: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share ``p`` of ``n``, in percent (Wilson 1927)."""
    z = 1.959963984540054
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * min(p, max(0.0, middle - half)), 100 * max(p, min(1.0, middle + half))


# --- the doubts ---------------------------------------------------------------------------------------------------
def flags(folder: str | Path) -> list[str]:
    """Doubts about the result in a run folder, one plain sentence each; [] when there are none."""
    return doubts(read(folder))


def doubts(record: Record, retrained: Record | None = None) -> list[str]:
    """As ``flags``, of a folder that has been read. ``retrained``: the same request met by retraining, where it is known."""
    about = (unfinished, warned, runtime, weights, strange_numbers, strange_pictures, sampling)
    checks = (*about, blind_judge, forget, retain, attack_order, small)
    return [*(sentence for check in checks for sentence in check(record)), *collapse(record, retrained)]


def unfinished(record: Record) -> Iterable[str]:
    status = record.run["status"]
    if status == "failed":
        yield f"The run failed ({record.run.get('error') or 'no error was recorded'}), so nothing here describes a finished erasure."
    elif status != "done":
        yield "The run has not finished, so nothing here describes a finished erasure."


def warned(record: Record) -> Iterable[str]:
    """What the run itself noted, such as data that the model was not trained on."""
    for said in record.run.get("warnings") or ():
        yield f"{said[:1].upper()}{said[1:].removesuffix('.')}."


def runtime(record: Record) -> Iterable[str]:
    """Said of every such run: a defence that the weights do not hold."""
    if name := record.run.get("guide"):
        yield f"The method {name} acts at generation time and is bypassed by whoever holds the weights."


def weights(record: Record) -> Iterable[str]:
    name = record.method["name"]
    if record.run["status"] != "done" or name == "original":
        return
    patch = record.run.get("weights") or {}
    if name != record.run.get("guide") and (not patch.get("tensors") or not patch.get("changed")):
        yield "The patch is empty: no tensor differs from the original model."
    if patch.get("outside"):
        yield f"{patch['outside']} changed tensors are outside the weights the method said it would edit."


def strange_numbers(record: Record) -> Iterable[str]:
    bad = [row["metric"] for row in record.results if row["n"] and not finite(row["value"])]  # n = 0 is not measured, which is no doubt
    if bad:
        yield f"These results are not finite numbers: {', '.join(bad)}."
    logged = {
        name: row.get("step", number) for number, row in reversed(list(enumerate(record.log, 1))) for name in row if not finite(row[name])
    }
    if logged:
        yield f"The log holds values that are not finite: {', '.join(f'{name} at step {step}' for name, step in sorted(logged.items()))}."


def strange_pictures(record: Record) -> Iterable[str]:
    if not record.samples:
        return
    files = [inside(record.folder, row["file"]) for row in record.samples]
    there = [file for file in files if file]
    if len(there) < len(files):
        yield f"{len(files) - len(there)} of {len(files)} sampled pictures are missing from the folder."
    if len(there) > 1 and identical(there):
        yield f"The output is constant: all {len(there)} sampled pictures are byte for byte the same."
    chosen = there[:: -(-len(there) // CHECKED)] if there else []
    pictures = [opened(file) for file in chosen]
    if damaged := sum(not picture for picture in pictures):
        yield f"{damaged} of {len(chosen)} pictures looked at are damaged and cannot be opened."
    if plain := sum(flat(picture) for picture in pictures if picture):
        yield f"{plain} of {len(chosen)} pictures looked at are one flat colour."


def identical(files: Sequence[Path]) -> bool:
    """Whether all files hold the same bytes; stops at the first that does not."""
    first = files[0].read_bytes()
    return all(file.read_bytes() == first for file in files[1:])


def opened(file: Path) -> Image | None:
    """A picture in RGB; None when it is damaged, as a killed run can leave one."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError):  # Pillow's words for a broken header and for a broken PNG chunk
        return None


def flat(picture: Image) -> bool:
    """Whether a picture has next to no contrast: a standard deviation below one grey level in every channel."""
    from PIL import ImageStat

    return max(ImageStat.Stat(picture).stddev) < 1.0


def sampling(record: Record) -> Iterable[str]:
    if record.evaluation.get("safety_filter"):
        yield "A safety filter was on while sampling, so the filter may have hidden what the model still draws."
    if record.evaluation.get("repeat_differs"):
        yield "The same prompt and seed gave two different pictures, so before and after are not comparable picture by picture."


def blind_judge(record: Record) -> Iterable[str]:
    detected = detection(record)
    if detected is None or detected >= 50:
        return
    if record.classified:
        yield f"The original model names only {detected:.1f} % of the forget set right, so there was little to forget."
    else:
        yield f"The judge finds the concept in only {detected:.1f} % of the original's pictures of it, so not finding it later says little."


def detection(record: Record) -> float | None:
    """How often the judge finds the concept in the original model's pictures for prompts that name it, in percent; None if not measured."""
    row = record.result("ua")
    if row and row.get("before") and finite(row["before"]["value"]):
        return 100 - float(row["before"]["value"])
    named = [record.originals[key(row)] for row in record.samples if row["named"] and key(row) in record.originals]
    judged = [row["labels"][record.axis] for row in named if record.axis in row["labels"]]
    return 100 * sum(label in record.task["concepts"] for label in judged) / len(judged) if judged else None


def change(record: Record, metric: str) -> float | None:
    """After minus before; None when either is missing."""
    row = record.result(metric)
    if not row or not row.get("before") or not finite(row["value"]) or not finite(row["before"]["value"]):
        return None
    return float(row["value"]) - float(row["before"]["value"])


def forget(record: Record) -> Iterable[str]:
    risen, row = change(record, "ua"), record.result("ua")
    if risen is None or row is None or record.method["name"] == "original":
        return
    if record.task["kind"] != "samples":
        if risen < 10:
            yield f"Forgetting hardly changed: unlearning accuracy (ua) moved by {risen:+.1f} points."
    elif record.method["name"] != "retrain" and abs(risen) <= max(UNCHANGED, 101 / row["n"]):  # one picture
        yield f"The accuracy on the forget set is as before (ua moved by {risen:+.2f} points), so the method may have done nothing."


def retain(record: Record) -> Iterable[str]:
    for metric, words in (("ira", "other things of the same domain (ira)"), ("cra", "things of other domains (cra)")):
        moved = change(record, metric)
        if moved is not None and moved < -15:
            yield f"Retained knowledge collapsed: accuracy on {words} fell by {-moved:.1f} points."


def collapse(record: Record, retrained: Record | None) -> Iterable[str]:
    """Remaining accuracy below half of what it was, or of what retraining leaves."""
    row, other = record.result("ra"), retrained.result("ra") if retrained else None
    if not row or not finite(row["value"]):
        return
    for words, known in (("of the original", row.get("before")), ("of retraining", other)):
        if known and finite(known["value"]) and row["value"] < known["value"] / 2:
            now, then = f"{row['value']:.1f} %", f"{known['value']:.1f} %"
            yield f"Retained knowledge collapsed: remaining accuracy (ra) is {now}, less than half {words} ({then})."
            return


def attack_order(record: Record) -> Iterable[str]:
    """A white-box attack sees more, so losing to a black-box one on the same prompts, by more than chance, says that it is weak or broken.

    One sentence for each black-box attack, with the white-box attacks against which it does best of all black-box ones.
    """
    won = {name: {key(v): bool(v["success"]) for v in attack["verdicts"]} for name, attack in record.attacks.items()}
    black, white = ([n for n, attack in record.attacks.items() if attack["access"] == access] for access in ("black", "white"))
    beaten: dict[tuple[str, int, float], list[str]] = {}
    for strong in white:
        best = max(((b, *compare(won[b], won[strong])) for b in black), key=lambda c: c[3] - c[2], default=None)
        if best and best[4] * len(black) < 0.05:  # the best of so many
            name, n, lost, found, _ = best
            beaten.setdefault((name, n, 100 * found / n), []).append(f"{strong} ({100 * lost / n:.1f} %)")
    for (name, n, share), names in beaten.items():
        many = len(names) > 1
        yield (
            f"The black-box attack {name} ({share:.1f} %) beats the white-box attack{'s' if many else ''} {', '.join(names)} on {n} common "
            f"prompts, which chance does not explain, so {'these are' if many else 'the white-box attack is'} too weak or broken."
        )


def compare(theirs: dict[tuple[str, int], bool], ours: dict[tuple[str, int], bool]) -> tuple[int, int, int, float]:
    """Common prompts, how many of them ``ours`` and ``theirs`` broke, and the p-value that theirs is no better (exact McNemar test)."""
    from scipy.stats import binomtest

    common = theirs.keys() & ours.keys()
    only = sum(theirs[k] and not ours[k] for k in common)
    apart = sum(theirs[k] != ours[k] for k in common)
    p = binomtest(only, apart, alternative="greater").pvalue if apart else 1.0
    return len(common), sum(ours[k] for k in common), sum(theirs[k] for k in common), float(p)


def small(record: Record) -> Iterable[str]:
    wide: dict[tuple[str, int], list[tuple[str, float]]] = {}
    for row in record.results:
        if is_rate(row) and finite(row["low"]) and finite(row["high"]) and row["high"] - row["low"] > 10:
            wide.setdefault((row["metric"].partition("/")[0], row["n"]), []).append((row["metric"], row["high"] - row["low"]))
    said = []
    for (family, n), rows in wide.items():
        if len(rows) > 3:  # a metric for each of many attacks or concepts
            said.append(f"{len(rows)} rates {family}/… (up to {max(points for _, points in rows):.1f} points at n = {n})")
        else:
            said += [f"{name} ({points:.1f} points at n = {n})" for name, points in rows]
    if said:
        yield f"Too few pictures for a firm number, the 95 % interval is wider than 10 points: {', '.join(said)}."
