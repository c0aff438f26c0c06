"""What reports are written with: tables in four formats, text escaped for each, numbers and amounts for reading."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import unknown
from .flags import finite


def table(rows: Sequence[Mapping[str, Any]], fmt: str) -> str:
    """``rows`` as a "markdown", "latex", "csv" or "html" table; columns in order of first appearance, text escaped for the format.

    CSV keeps numbers exactly; the others round them for reading. Raises ``UsageError`` for another format.
    """
    writers = {"markdown": as_markdown, "latex": as_latex, "csv": as_csv, "html": as_html}
    if fmt not in writers:
        raise unknown("table format", fmt, writers)
    return writers[fmt](rows, list(dict.fromkeys(name for row in rows for name in row)))


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if row.get(c) is None else row[c] for c in columns] for row in rows])
    return buffer.getvalue()


def as_markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    if not columns:
        return ""
    lines = [[escape_markdown(c) for c in columns], ["---:" if numeric(rows, c) else "---" for c in columns]]
    lines += [[escape_markdown(show(row.get(c, ""))) for c in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_latex(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    if not columns:
        return ""
    lines = [" & ".join(map(escape_latex, columns)) + r" \\ \hline"]
    lines += [" & ".join(escape_latex(show(row.get(c, ""))) for c in columns) + r" \\" for row in rows]
    layout = "".join("r" if numeric(rows, c) else "l" for c in columns)
    return "\n".join([rf"\begin{{tabular}}{{{layout}}}", r"\hline", *lines, r"\hline", r"\end{tabular}", ""])


def as_html(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(show(row.get(c, '')))}</td>" for c in columns) + "</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n"


def numeric(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether a column holds numbers only."""
    values = [row[column] for row in rows if row.get(column) not in (None, "")]
    return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def escape_markdown(text: str) -> str:
    """``text`` as plain words inside Markdown, also in a table's cell."""
    text = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_code(text: str) -> str:
    """``text`` as a fenced block that no backticks inside can close."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"{fence}sh\n{text}\n{fence}"


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"}


def escape_latex(text: str) -> str:
    """``text`` as plain words inside LaTeX."""
    return re.sub(r"[\\~^<>&%$#_{}]", lambda m: LATEX.get(m[0], "\\" + m[0]), " ".join(text.split()))


def show(value: Any, rate: bool = False, digits: int = 1) -> str:
    """A value for reading: rates and numbers from 10 on with ``digits`` decimals, smaller ones with three digits, lists in words."""
    if value is None:
        return "—"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value)) or "none"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not finite(value):
        return "not finite"
    if isinstance(value, int) and not rate:
        return str(value)
    return f"{value:.{digits}f}" if rate or 10 <= abs(value) < 1e9 else f"{value:.3g}"


def join(words: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def duration(seconds: float) -> str:
    """3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes as kB, MB or GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
