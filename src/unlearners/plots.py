"""The report's drawings, as inline SVG that follows the page's text colour."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .flags import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text colour and is replaced by currentColor
COLOURS = ("#3b82c4", "#e07b39", "#3a9d6e", "#b5539c", "#8a7a2f", "#7a6fd0")
POINTS = 600


def losses(log: Sequence[Mapping[str, Any]], name: str) -> str:
    """One small plot for each logged number over the steps, "" when there are not two rows. ``name`` makes ids unique."""
    if any("importance" in row for row in log):  # SLUG takes one step, and its log has plots of its own
        return ""
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
    """Share of prompts that show the concept against queries spent on each, one line for each attack up to the most that it spent, with
    the 95 % Wilson interval of its end; "" when no attack spent any, which would be a single point. Logarithmic from 50 queries on."""
    curves = {label: (*cumulative(a["verdicts"]), len(a["verdicts"])) for label, a in attacks.items() if a["verdicts"]}
    ends = [xs[-1] for xs, _, _ in curves.values()]
    most = max(ends, default=0)
    if not most:
        return ""
    figure, (axis,) = canvas(1, width=6.6, height=3.0)
    for i, (label, (xs, ys, n)) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        low, high = wilson(ys[-1] / 100, n)
        at = xs[-1] * (1 + 0.03 * ends[:i].count(xs[-1]))  # side by side where attacks end at the same count
        style = "-" if i < len(COLOURS) else "--"
        axis.plot([*xs, at], [*ys, ys[-1]], drawstyle="steps-post", color=colour, linewidth=1.8, linestyle=style, label=label.lstrip("_"))
        error = [[ys[-1] - low], [high - ys[-1]]]
        axis.errorbar([at], [ys[-1]], yerr=error, color=colour, marker="o", markersize=3.5, capsize=3, linewidth=1.2, clip_on=False)
    if most >= 50:
        axis.set_xscale("symlog", linthresh=1)  # which has a place for 0, the plain prompt
        axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlim(left=0)
    axis.set_ylim(-3, 103)
    axis.set_xlabel("queries for each prompt", fontsize=9)
    axis.set_ylabel("prompts broken, %", fontsize=9)
    legend = axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="center left", bbox_to_anchor=(1.02, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    said = (f"{label} {ys[-1]:.1f} % of {n} after at most {xs[-1]}" for label, (xs, ys, n) in curves.items())
    return svg(figure, name, f"share of prompts broken against queries for each prompt: {', '.join(said)}")


def body_parts(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """How often each body part is found, original and erased, as SalUn draws it: bars on a logarithmic axis from the rows of
    ``nudenet_counts``; "" when there are none."""
    counts = {row["metric"].partition("/")[2]: row for row in rows if row["metric"].startswith("nudenet_counts/")}
    parts = [part for part in counts if part not in ("total", "pictures")]
    if not parts:
        return ""
    figure, (axis,) = canvas(1)
    sides = {"original": [counts[part]["before"] or {} for part in parts], "erased": [counts[part] for part in parts]}
    for i, (label, side) in enumerate(sides.items()):
        values = [number(row.get("value")) for row in side]
        bars = axis.barh([k + 0.2 - 0.4 * i for k in range(len(parts))], values, height=0.38, color=COLOURS[1 - i], label=label)
        axis.bar_label(bars, fmt="%d", padding=2, fontsize=7, color=INK)
    axis.set_xscale("symlog", linthresh=1)  # which has a place for 0
    axis.set_xlim(left=0)
    axis.margins(x=0.12)
    axis.set_yticks(range(len(parts)), [part.replace("_", " ") for part in parts])
    axis.set_xlabel("found in all pictures", fontsize=9)
    axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    return svg(figure, name, "body parts found, original and erased")


def fronts(log: Sequence[Mapping[str, Any]], name: str) -> str:
    """SLUG's layers, a plot for each tower: importance over alignment on logarithmic axes, each concept's front joined, its chosen layer
    ringed; "" for other logs."""
    layers = [row for row in log if "importance" in row]
    if not layers:
        return ""
    chosen = {row.get("concept"): row["chosen"] for row in log if "chosen" in row}
    towers = sorted({row["tower"] for row in layers})
    figure, axes = canvas(len(towers))

    def placed(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
        return [max(number(row["alignment"]), 1e-6) for row in rows], [number(row["importance"]) for row in rows]

    for axis, tower in zip(axes, towers, strict=True):
        for i, concept in enumerate(dict.fromkeys(row.get("concept") for row in layers)):
            own = [row for row in layers if row["tower"] == tower and row.get("concept") == concept]
            front = sorted((row for row in own if row["front"]), key=lambda row: number(row["alignment"]))
            taken = [row for row in own if row["layer"] == chosen.get(concept, chosen.get(None))]
            colour = COLOURS[1 + i % (len(COLOURS) - 1)]
            axis.scatter(*placed(own), s=14, color=INK, alpha=0.45)
            axis.scatter(*placed(front), s=26, color=colour)
            axis.plot(*placed(front), color=colour, lw=1)
            axis.scatter(*placed(taken), s=130, facecolors="none", edgecolors=COLOURS[0], linewidths=1.8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(*decade(*axis.get_xlim()))
        axis.set_ylim(*decade(*axis.get_ylim()))
        axis.set_xlabel("alignment |cos(g, r)|", fontsize=9)
        axis.set_ylabel("importance |g| / |θ|", fontsize=9)
        axis.set_title(f"tower {int(tower) + 1}", fontsize=10, color=INK)
    return svg(figure, name, "importance and alignment of every layer")


def decade(low: float, high: float) -> tuple[float, float]:
    """The ends of a logarithmic axis, far enough apart that only powers of ten need a label."""
    more = max(1.0, (30 * low / high) ** 0.5)
    return low / more, high * more


def steps(log: Sequence[Mapping[str, Any]], name: str) -> str:
    """What SLUG's search saw: forget accuracy and utility against the relative step, a colour for each layer, the step taken marked; ""
    for other logs."""
    tried = [row for row in log if "alpha" in row and "chosen" not in row]
    if not tried:
        return ""
    figure, (left, right) = canvas(2)
    searched = dict.fromkeys((row.get("concept"), row["layer"]) for row in tried)
    several = len({concept for concept, _ in searched}) > 1
    for i, (concept, layer) in enumerate(searched):
        own = [row for row in tried if (row.get("concept"), row["layer"]) == (concept, layer)]
        rows, of = sorted(own, key=lambda row: number(row["alpha"])), f", name {int(concept or 0) + 1}" if several else ""
        for axis, key in ((left, "fa"), (right, "ta")):
            points = [number(row["alpha"]) for row in rows], [number(row[key]) for row in rows]
            axis.plot(*points, marker="o", ms=2.5, lw=1.3, color=COLOURS[i % len(COLOURS)], label=f"layer {int(layer)}{of}")
    for axis, title in ((left, "forget accuracy, %"), (right, "utility, %")):
        for row in log:
            if "chosen" in row:
                axis.axvline(number(row["alpha"]), color=INK, lw=0.9, ls=":")
        axis.set_xscale("log")
        axis.set_xlabel("step α", fontsize=9)
        axis.set_title(title, fontsize=10, color=INK)
    left.legend(frameon=False, fontsize=8, labelcolor=INK)
    return svg(figure, name, "forget accuracy and utility against the step")


def similarities(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Mean cosines of pictures (rows) with names (columns), before and after, from the results of ``similarity``; "" without them."""
    found = next((row for row in rows if row["metric"] == "similarity/forgotten" and row.get("table")), None)
    if found is None or not (found["before"] or {}).get("table"):
        return ""
    figure, axes = canvas(2)
    for axis, table, title in zip(axes, (found["before"]["table"], found["table"]), ("before", "after"), strict=True):
        axis.grid(False)
        axis.imshow(table["matrix"], vmin=-20, vmax=100, cmap="viridis")
        axis.set_xticks(range(len(table["names"])), table["names"], rotation=60, ha="right", fontsize=6, parse_math=False)
        axis.set_yticks(range(len(table["names"])), table["names"], fontsize=6, parse_math=False)
        axis.set_title(title, fontsize=10, color=INK)
    return svg(figure, name, "cosine of pictures with names, before and after")


def standalone(drawing: str) -> str:
    """An ``<svg>`` element as a file of its own."""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return drawing.replace("<svg ", f"<svg {spaces} ", 1)


def cumulative(verdicts: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    """(queries, percent of verdicts that succeeded within them), from 0 queries (the plain prompt) to the most spent on one."""
    spent = sorted(0 if v["before"] else int(v["queries"]) for v in verdicts if v["success"])
    xs = sorted({0, *spent, max(int(v["queries"]) for v in verdicts)})
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


def canvas(count: int, *, width: float = 0.0, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` plots, three in a row, in the page's colours. ``width`` and ``height`` of a plot are in inches; a width of 0
    is the usual one."""
    from matplotlib.figure import Figure

    columns, rows = min(count, 3), -(-count // 3)
    figure = Figure(figsize=((width or (3.6 if count > 1 else 5.4)) * columns, height * rows), layout="constrained")
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
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
