"""The pictures of a report: which are shown, what the judge says of them, and how they are embedded."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .flags import Plain, Record, inside, key, opened

SIDE = 256  # pixels; larger pictures are embedded smaller


def spread(record: Record, *, named: bool, most: int) -> list[Plain]:
    """Up to ``most`` samples that name the concept (or do not), spread over prompts, labels and seeds, never chosen by outcome.

    Samples that were attacked too come first, so that all three pictures stand side by side.
    """
    attacked = {key(v) for attack in record.attacks.values() for v in attack["verdicts"]}
    left = [row for row in record.samples if row["named"] is named]
    seen: Counter[Any] = Counter()
    chosen: list[Plain] = []
    while left and len(chosen) < most:
        best = min(left, key=lambda row: (key(row) not in attacked, sum(seen[mark] for mark in marks(row))))
        left.remove(best)
        seen.update(marks(best))
        chosen.append(best)
    return chosen


def marks(row: Plain) -> list[Any]:
    """What a sample should not share with those already chosen."""
    return [*row["truth"].items(), row["prompt"], ("seed", row["seed"])]


def grid(record: Record, samples: Iterable[Plain]) -> list[Plain]:
    """For each sample: prompt, seed and the pictures original, erased and, where there is one, attacked."""
    rows = []
    for sample in samples:
        original = record.originals.get(key(sample))
        pictures = [
            {
                "who": "original",
                "uri": picture(record.original, original["file"]) if original and record.original else "",
                **said(record, original, False),
            },
            {"who": "erased", "uri": picture(record.folder, sample["file"]), **said(record, sample, sample["named"])},
        ]
        tried = [
            (name, v) for name, attack in record.attacks.items() for v in attack["verdicts"] if sample["named"] and key(v) == key(sample)
        ]
        if tried:  # one attacked picture beside the others is enough; the part about attacks has the rest
            name, verdict = next(((name, v) for name, v in tried if v.get("picture")), tried[0])
            uri = picture(record.folder, verdict["picture"]) if verdict.get("picture") else ""
            pictures.append({"who": name, "uri": uri, **outcome(verdict)})
        rows.append({"prompt": sample["prompt"], "seed": sample["seed"], "pictures": pictures})
    return rows


def said(record: Record, sample: Plain | None, gone: bool) -> Plain:
    """The judge's words about a sample, and whether they are what one hopes for: the concept ``gone``, else the prompt's truth."""
    if not sample or not sample.get("labels"):
        return {"label": "not judged", "good": "same"}
    labels = sample["labels"]
    order = sorted(labels, key=lambda domain: domain != record.axis)
    text = " · ".join(labels[domain] or f"no {domain}" for domain in order)
    right = all(sample["truth"].get(domain, label) == label for domain, label in labels.items())
    if gone:
        right = labels.get(record.axis) not in record.task["concepts"]
    return {"label": text, "good": "good" if right else "bad"}


def outcome(verdict: Plain) -> Plain:
    """What became of an attacked prompt."""
    if verdict["before"]:
        return {"label": "shown by the plain prompt", "good": "bad"}
    spent = f"{verdict['queries']} {'query' if verdict['queries'] == 1 else 'queries'}"
    if verdict["success"]:
        return {"label": f"back after {spent}", "good": "bad"}
    return {"label": f"resisted {spent}", "good": "good"}


def picture(root: Path, name: str) -> str:
    """A picture of the folder ``root`` as a data URI, at most ``SIDE`` pixels wide and high; "" when it is missing or damaged."""
    file = inside(root, name)
    small, buffer = opened(file) if file else None, io.BytesIO()
    if not small:
        return ""
    if max(small.size) > SIDE:
        small.thumbnail((SIDE, SIDE))
        small.save(buffer, "JPEG", quality=88)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
