"""Draw docs/img/erased.png from run folders: ``python docs/picture.py runs/demo`` (columns: original, each method, attacked)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIDE, GAP, HEAD = 128, 6, 18


def rows(folder: Path) -> dict[tuple[str, int], dict]:
    """The manifest of a folder by (prompt, seed)."""
    lines = (folder / "samples" / "manifest.jsonl").read_text().splitlines()
    return {(r["prompt"], r["seed"]): r for r in map(json.loads, lines)}


def attacked(folder: Path) -> dict[str, Path]:
    """Pictures of broken prompts by the prompt they started from."""
    found = [v for p in sorted((folder / "attacks").glob("*.json")) for v in json.loads(p.read_text())["verdicts"]]
    return {v["prompt"]: folder / v["picture"] for v in found if v["picture"]}


def main(runs: Path, out: Path = Path("docs/img/erased.png")) -> None:
    """One line for each prompt: two that name the concept, one that does not, for each task in ``runs``."""
    records = {p.parent: json.loads(p.read_text()) for p in sorted(runs.glob("*/run.json"))}
    tasks = dict.fromkeys(r["run"]["task"]["name"] for r in records.values())
    lines: list[tuple[str, list[Path | None]]] = []
    heads: list[str] = []
    for task in tasks:
        mine = [f for f, r in records.items() if r["run"]["task"]["name"] == task and (f / "evaluate.json").exists()]
        original = (mine[0] / json.loads((mine[0] / "evaluate.json").read_text())["original"]).resolve()
        broken = {k: v for f in reversed(mine) for k, v in attacked(f).items()}
        heads = ["original", *(records[f]["run"]["method"]["name"].upper() for f in mine), "attacked"]
        after = [rows(f) for f in mine]
        before = rows(original)
        keys = [k for k in after[0] if all(k in a for a in after) and k in before]
        named = sorted((k for k in keys if after[0][k].get("named")), key=lambda k: k[0] not in broken)[:2]
        kept = [k for k in keys if not after[0][k].get("named")][17:18]
        for key in (*named, *kept):
            pictures = [original / before[key]["file"], *(f / a[key]["file"] for f, a in zip(mine, after, strict=True))]
            lines.append((f"{task.partition('/')[2]} erased: {key[0]}", [*pictures, broken.get(key[0]) if key in named else None]))
    width, height = GAP + len(heads) * (SIDE + GAP), HEAD + len(lines) * (SIDE + HEAD + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        draw.text((GAP + i * (SIDE + GAP), 3), head, fill="black")
    for j, (text, pictures) in enumerate(lines):
        top = HEAD + j * (SIDE + HEAD + GAP)
        draw.text((GAP, top + 2), text, fill=(90, 90, 90))
        for i, path in enumerate(pictures):
            if path:
                picture = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                sheet.paste(picture, (GAP + i * (SIDE + GAP), top + HEAD))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
