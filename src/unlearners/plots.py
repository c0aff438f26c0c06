"""The report's drawings, as inline SVG that follows the page's text colour."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text colour and is replaced by currentColor
COLOURS = ("#3b82c4", "#e07b39", "#3a9d6e", "#b5539c", "#8a7a2f", "#7a6fd0")
POINTS = 600


def losses(log: Sequence[Mapping[str, Any]], name: str) -> str:
    """One small plot for each logged number over the steps, "" when there are not two rows. ``name`` makes ids unique."""
    keys = sorted({k for row in log for k in row} - {"step"}, key=lambda k: ("loss" not in k, k))[: len(COLOURS)]
    if len(log) < 2 or not keys:
        return ""
    figure, axes = canvas(len(keys))
    for axis, key, colour in zip(axes, keys, COLOURS, strict=False):
        points = [(row.get("step", i), number(row[key])) for i, row in enumerate(log, 1) if key in row]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        every = max(1, len(xs) // POINTS)
        axis.plot(xs[::every], ys[::every], color=colour, linewidth=0.8, alpha=0.4 if len(xs) > 40 else 1.0)
        if len(xs) > 40:
            axis.plot(xs[::every], smooth(ys, len(ys) // 20)[::every], color=colour, linewidth=1.8)
        axis.set_title(key, fontsize=10, color=INK, parse_math=False)
        axis.set_xlabel("step", fontsize=9)
    return svg(figure, name, "logged numbers over training steps")


def attack_curve(attacks: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Share of prompts that show the concept against queries spent on each, one line for each attack; "" when there are none."""
    if not any(attack["verdicts"] for attack in attacks.values()):
        return ""
    figure, (axis,) = canvas(1)
    end = max(v["queries"] for attack in attacks.values() for v in attack["verdicts"])
    for i, (label, attack) in enumerate(attacks.items()):
        if attack["verdicts"]:
            xs, ys = cumulative(attack["verdicts"], end)
            axis.plot(xs, ys, drawstyle="steps-post", color=COLOURS[i % len(COLOURS)], linewidth=1.8, label=label.lstrip("_"))
    axis.set_ylim(-3, 103)
    axis.set_xlabel("queries for each prompt", fontsize=9)
    axis.set_ylabel("attack success, %", fontsize=9)
    legend = axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return svg(figure, name, "attack success against queries")


def cumulative(verdicts: Sequence[Mapping[str, Any]], end: int) -> tuple[list[int], list[float]]:
    """(queries, percent of verdicts that succeeded within them), from 0 queries (the plain prompt) to ``end``."""
    spent = sorted(0 if v["before"] else int(v["queries"]) for v in verdicts if v["success"])
    xs = sorted({0, *spent, end})
    return xs, [100 * sum(q <= x for q in spent) / len(verdicts) for x in xs]


def number(value: Any) -> float:
    """A logged value; NaN, which leaves a gap, for JSON's null."""
    return math.nan if value is None else float(value)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last ``width`` finite values."""
    out, window = [], list[float]()
    for value in values:
        if math.isfinite(value):
            window.append(value)
        del window[: max(0, len(window) - max(width, 1))]
        out.append(sum(window) / len(window) if window else math.nan)
    return out


def canvas(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` plots, three in a row, in the page's colours."""
    from matplotlib.figure import Figure

    columns, rows = min(count, 3), -(-count // 3)
    figure = Figure(figsize=((3.6 if count > 1 else 5.4) * columns, 2.6 * rows), layout="constrained")
    figure.patch.set_alpha(0)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(INK)
        axis.tick_params(colors=INK, labelsize=8)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
        axis.grid(alpha=0.15, color=INK)
    return figure, axes


def svg(figure: Figure, name: str, label: str) -> str:
    """``figure`` as an ``<svg>`` element that loads nothing; its ids start with ``name``, since a page holds several."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows the names of SVG by itself
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{re.sub(r'[^A-Za-z0-9]+', '-', name)}-", text)
    text = text.replace(INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
