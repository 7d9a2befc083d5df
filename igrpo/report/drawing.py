"""Catalogue entries into matplotlib figures, and those into inline SVG in the page's light or dark colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from igrpo.report.arms import Arm, Band
from igrpo.report.catalogue import Figure, Line, Panel, shown_arms
from igrpo.report.runs import Series

# Okabe and Ito's palette, which colour-blind readers can tell apart; darkened where white is the ground.
ARM_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a8478b", "#b8860b", "#4f9bc7")
INK, MUTED, GRID = "#1c2024", "#60666d", "#e3e6e8"
_VARIABLES = {
    **{colour: f"var(--arm-{i + 1})" for i, colour in enumerate(ARM_COLOURS)},
    INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)",
}  # fmt: skip

STYLE = {
    "font.family": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.edgecolor": GRID, "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
    "xtick.major.size": 3, "ytick.major.size": 0, "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
    "svg.fonttype": "none", "svg.hashsalt": "igrpo", "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.05,
    "text.parse_math": False,
}  # fmt: skip
NARROW, WIDE, HEIGHT = 5.9, 12.1, 2.7
"""Inches; at 96 pixels each they fill half and the whole of a page 1280 pixels wide."""
SMOOTH_FROM = 40
"""Steps from which a rolling mean is drawn over the faint raw line."""
MOST_POINTS = 400
"""Points per line; more cannot be told apart on 1280 pixels, and thousands make the page heavy."""


def styled() -> AbstractContextManager[None]:
    return matplotlib.rc_context(STYLE)


def colour_of(index: int) -> str:
    return ARM_COLOURS[index % len(ARM_COLOURS)]


def draw(figure: Figure, arms: Sequence[Arm]) -> Canvas:
    """One figure; ``figure`` has only panels with data (``catalogue.drawable``)."""
    cells = [(panel, shown) for panel in figure.panels for shown in _cells(panel, arms)]
    columns = min(len(cells), 3)
    rows = -(-len(cells) // columns)
    canvas = Canvas(figsize=(WIDE if figure.wide else NARROW, HEIGHT * rows))
    # Arms side by side must be comparable by eye, so they share one scale.
    share = "all" if figure.panels[0].kind != "overlay" else "none"
    axes = list(canvas.subplots(rows, columns, squeeze=False, sharey=share).flat)
    drawers = [_stack if panel.kind == "stack" else _lines for panel, _ in cells]
    ends = [drawer(ax, *cell, arms) for drawer, ax, cell in zip(drawers, axes, cells, strict=False)]
    for ax, (panel, shown) in zip(axes, cells, strict=False):  # only now: axes that share a scale have seen all data
        _finish(ax, panel, shown, arms)
    for ax, labels in zip(axes, ends, strict=False):
        _label_ends(ax, labels)
    for ax in axes[len(cells) :]:
        ax.set_axis_off()
    return canvas


def _cells(panel: Panel, arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms of each set of axes: all in one, or one each."""
    having = shown_arms(panel, arms)
    return [having] if panel.kind == "overlay" else [[arm] for arm in having]


End = tuple[tuple[float, float], str, str]
"""Where a line ends, its label, its colour."""


def _lines(ax: Any, panel: Panel, shown: Sequence[Arm], arms: Sequence[Arm]) -> list[End]:
    ends: list[End] = []
    for arm in shown:
        colour = colour_of(arms.index(arm))
        for line in panel.lines:
            band = arm.band(line.metric)
            if not band.mean:
                continue
            _draw_band(ax, band, colour, line)
            label = line.label if panel.kind == "per_arm" else (arm.label if len(arms) > 1 else "")
            ends.append((smooth(band.mean)[-1], label, colour))
    values = [v for arm in shown for line in panel.lines for _, v in arm.band(line.metric).mean]
    if panel.log and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log")
    return ends


def _draw_band(ax: Any, band: Band, colour: str, line: Line) -> None:
    mean = smooth(band.mean)
    steps, values = zip(*thin(mean), strict=True)
    if len(mean) >= SMOOTH_FROM and band.spread is None:
        ax.plot(*zip(*thin(band.mean), strict=True), color=colour, alpha=0.28, linewidth=0.8)
    few = {"marker": "o", "markersize": 4} if len(steps) <= 12 else {}
    ax.plot(steps, values, color=colour, linestyle=line.style, clip_on=False, **few)
    if band.spread is not None:
        spread = dict(smooth([(s, d) for (s, _), d in zip(band.mean, band.spread, strict=True)]))
        low = [v - spread[s] for s, v in zip(steps, values, strict=True)]
        high = [v + spread[s] for s, v in zip(steps, values, strict=True)]
        ax.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)


def _stack(ax: Any, panel: Panel, shown: Sequence[Arm], arms: Sequence[Arm]) -> list[End]:
    (arm,) = shown
    colour = colour_of(arms.index(arm))
    columns = [(line, dict(thin(smooth(arm.band(line.metric).mean)))) for line in panel.lines]
    columns = [(line, column) for line, column in columns if column]
    steps = sorted(set.intersection(*(set(column) for _, column in columns)))
    base, ends = [0.0] * len(steps), []
    for i, (line, column) in enumerate(columns):
        top = [b + column[s] for b, s in zip(base, steps, strict=True)]
        ax.fill_between(steps, base, top, color=colour, alpha=(0.75, 0.4, 0.18)[i % 3], linewidth=0)
        if max(column.values()) > 0:
            ends.append(((steps[-1], (base[-1] + top[-1]) / 2), line.label, INK))
        base = top
    if panel.unit == "%":
        ax.set_ylim(0, 1)
    if not ends:
        ax.annotate("none in any step", (0.5, 0.5), xycoords="axes fraction", ha="center", color=MUTED)
        ax.set_xlim(min(steps), max(steps) + 1)
    return ends


def _finish(ax: Any, panel: Panel, shown: Sequence[Arm], arms: Sequence[Arm]) -> None:
    own_axes = panel.kind != "overlay" and len(arms) > 1
    title = ", ".join(filter(None, (shown[0].label if own_axes else "", panel.title)))
    if title:
        ax.set_title(title, loc="left", color=colour_of(arms.index(shown[0])) if own_axes else INK)
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.unit != "%" and panel.unit:
        ax.set_ylabel(panel.unit)
    if ax.get_yscale() == "log":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        return
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10] if panel.unit == "%" else [1, 2, 2.5, 5, 10]))
    if (
        panel.zero and panel.kind != "stack"
    ):  # room above, for the margin was one of the data's range, not of its height
        ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
    low, high = ax.get_ylim()
    if panel.unit == "%":
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.04 else 2))
    elif high - low < 1e-3 * max(abs(high), abs(low)):  # a flat line: full numbers, not an offset in the corner
        ax.ticklabel_format(axis="y", useOffset=False)
    elif max(abs(high), abs(low)) >= 10_000:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))


def _label_ends(ax: Any, ends: list[End]) -> None:
    """Names at the right ends of the lines, pushed apart until no two overlap: no legend to look up."""
    named = sorted((y, label, colour) for (_, y), label, colour in ends if label)
    if not named:
        return
    right = max(x for (x, _), _, _ in ends)
    low, high = ax.get_ylim()
    log = ax.get_yscale() == "log"
    heights = [_fraction(y, low, high, log) for y, _, _ in named]
    gap = 0.085
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    over = max(0.0, heights[-1] - 1.0)
    for i in reversed(range(len(heights))):
        ceiling = heights[i + 1] - gap if i + 1 < len(heights) else heights[i] - over
        heights[i] = min(heights[i], ceiling)
    for height, (_, label, colour) in zip(heights, named, strict=True):
        ax.annotate(label, (right, height), xycoords=("data", "axes fraction"), xytext=(6, 0),
                    textcoords="offset points", va="center", color=colour, annotation_clip=False)  # fmt: skip
    ax.set_ylim(low, high)


def _fraction(y: float, low: float, high: float, log: bool) -> float:
    if log:
        y, low, high = (math.log10(max(value, 1e-300)) for value in (y, low, high))
    return (y - low) / (high - low) if high > low else 0.5


def smooth(points: Series) -> Series:
    """Rolling mean over a twentieth of the run, from ``SMOOTH_FROM`` points on; shorter at the ends."""
    if len(points) < SMOOTH_FROM:
        return points
    half = max(2, len(points) // 40)
    sums = list(accumulate((value for _, value in points), initial=0.0))
    result = []
    for i, (step, _) in enumerate(points):
        first, last = max(0, i - half), min(len(points), i + half + 1)
        result.append((step, (sums[last] - sums[first]) / (last - first)))
    return result


def thin(points: Series, most: int = MOST_POINTS) -> Series:
    """At most about ``most`` points, keeping each stretch's lowest and highest, so that spikes stay visible."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) * 2 // most)
    kept: list[tuple[float, float]] = []
    for first in range(0, len(points), size):
        part = points[first : first + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [points[0], *kept[1:-1], points[-1]]


def to_svg(canvas: Canvas, name: str, title: str) -> str:
    """Inline SVG: colours are the page's variables, text its font, and ids start with ``name``."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: var(--font)", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]+", r"\1 var(--font)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>",
                 rf'<svg viewBox="\1" role="img" aria-label="{title}" xmlns="http://www.w3.org/2000/svg" '
                 r'xmlns:xlink="http://www.w3.org/1999/xlink">', svg, count=1)  # fmt: skip
    return svg.strip()


def to_png(canvas: Canvas, path: Path) -> None:
    canvas.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})
