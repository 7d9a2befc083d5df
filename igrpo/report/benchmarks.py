"""Figures of ``igrpo eval``: accuracy per benchmark as bars, pass@k over k. Read from ``summary.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from igrpo.log_lines import LARGEST, number_of, whole_characters
from igrpo.report.arms import Arm
from igrpo.report.drawing import ARM_COLOURS, HEIGHT, INK, MUTED, WIDE, colour_of, styled, to_png
from igrpo.report.svg import save
from igrpo.settings import shown

Row = dict[str, Any]
"""One model in one mode, as ``igrpo eval`` writes it: model, mode, benchmarks {name: figures}, average."""
SINGLE_SHOT = "single shot"
LINES = {SINGLE_SHOT: "-", "two-stage, first draft": "-.", "two-stage, majority": "--", "two-stage,": ":"}
"""Line styles by mode, without what stands behind it; the colour is the model's."""


def find_summaries(folders: Sequence[Path]) -> list[Path]:
    """``summary.json`` of evaluation folders, and of evaluations inside run folders."""
    found = []
    for folder in folders:
        found += [folder / "summary.json", *sorted([*folder.glob("*/summary.json"), *folder.glob("*/*/summary.json")])]
    return list(dict.fromkeys(found))


def read_rows(paths: Sequence[Path], notes: list[str]) -> list[Row]:
    """Rows with figures; what cannot be read becomes a note."""
    rows: dict[tuple[str, str], Row] = {}
    for path in paths:
        if not path.is_file():
            continue
        try:
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
                figures = {whole_characters(str(name)): _figures(found) for name, found in row["benchmarks"].items()}
                if figures := {name: found for name, found in figures.items() if found is not None}:
                    model, mode = (whole_characters(str(row[key])) for key in ("model", "mode"))
                    known = {"model": model, "mode": mode, "benchmarks": figures}
                    rows[model, mode] = known
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            notes.append(f"{path} cannot be read as an evaluation ({type(error).__name__}: {shown(str(error))})")
    return list(rows.values())


def _figures(found: dict[str, Any]) -> dict[str, Any] | None:
    """Accuracy and pass@k of one benchmark; None where the accuracy is no number from 0 to 1."""
    accuracy = _estimate(found["accuracy"])
    points = [{"k": k, **p} for p, k in ((_estimate(p), _share(p["k"], LARGEST)) for p in found.get("pass_at_k", ()))
              if p is not None and k]  # fmt: skip
    if any(p["low"] is None for p in points):
        points = [{**p, "low": None, "high": None} for p in points]
    return None if accuracy is None else {"accuracy": accuracy, "pass_at_k": points}


def _estimate(found: dict[str, Any]) -> dict[str, float | None] | None:
    value, low, high = (_share(found.get(name)) for name in ("value", "low", "high"))
    if value is None:
        return None
    whole = low is not None and high is not None
    return {"value": value, "low": low if whole else None, "high": high if whole else None}


def _share(value: Any, most: float = 1.0) -> float | None:
    number = number_of(value)
    return number if number is not None and 0 <= number <= most else None


def row_label(row: Row) -> str:
    return row["model"] if row["mode"] == SINGLE_SHOT else f"{row['model']}, {row['mode']}"


def row_colours(rows: Sequence[Row], arms: Sequence[Arm]) -> list[str]:
    """A checkpoint of a run has its arm's colour; other models grey, and then what the arms leave."""
    spare = [*[MUTED][: len(arms)], *ARM_COLOURS[len(arms) :], *ARM_COLOURS]
    found: dict[str, str] = {}
    for row in rows:
        parts = Path(row["model"]).parts
        own = [i for i, arm in enumerate(arms) if any(run.name in parts for run in arm.runs)]
        if row["model"] not in found:
            found[row["model"]] = colour_of(own[0]) if own else spare.pop(0) if spare else INK
    return [found[row["model"]] for row in rows]


def names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["benchmarks"]))


def draw_bars(rows: Sequence[Row], colours: Sequence[str]) -> Canvas:
    """avg@n per benchmark with 95 % intervals, models side by side, in the order given; paler: two-stage."""
    benchmarks = names(rows)
    canvas = Canvas(figsize=(WIDE, HEIGHT * 1.15))
    ax = canvas.subplots()
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        for j, benchmark in enumerate(benchmarks):
            if benchmark not in row["benchmarks"]:
                continue
            found = row["benchmarks"][benchmark]["accuracy"]
            x, value = j + (i - (len(rows) - 1) / 2) * width, found["value"]
            label = row_label(row) if benchmark == next(iter(row["benchmarks"])) else None
            alpha = 1.0 if row["mode"] == SINGLE_SHOT else 0.55
            ax.bar(x, value, width * 0.92, color=colours[i], alpha=alpha, label=label)
            high = value
            if found.get("low") is not None:
                high = found["high"]
                ax.errorbar(x, value, [[max(0.0, value - found["low"])], [max(0.0, high - value)]], color=INK,
                            linewidth=1)  # fmt: skip
            ax.annotate(f"{100 * value:.1f}", (x, high), xytext=(0, 3), textcoords="offset points", ha="center")
    ax.set_xticks(range(len(benchmarks)), benchmarks)
    ax.set_ylim(0, min(1.12, ax.get_ylim()[1] * 1.08))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(canvas, *ax.get_legend_handles_labels())
    return canvas


def draw_pass_at_k(rows: Sequence[Row], colours: Sequence[str]) -> Canvas:
    """Unbiased pass@k over k, one panel per benchmark; the bootstrap interval as a band; a line style per mode."""
    curves = [b for b in names(rows) if any(len(r["benchmarks"].get(b, {}).get("pass_at_k", [])) > 1 for r in rows)]
    benchmarks = curves or names(rows)
    columns = min(3, len(benchmarks))
    lines = -(-len(benchmarks) // columns)
    canvas = Canvas(figsize=(WIDE, (HEIGHT + 0.1) * lines + 0.3))
    axes = list(canvas.subplots(lines, columns, squeeze=False).flat)
    for ax, benchmark in zip(axes, benchmarks, strict=False):
        for i, row in enumerate(rows):
            points = row["benchmarks"].get(benchmark, {}).get("pass_at_k", [])
            if not points:
                continue
            ks, values = [p["k"] for p in points], [p["value"] for p in points]
            style = LINES.get(row["mode"].partition(" ORACLE")[0].partition(" of ")[0], "--")
            marked = [j for j, k in enumerate(ks) if k in (2 ** (int(k).bit_length() - 1), ks[-1])]
            ax.plot(ks, values, style, color=colours[i], label=row_label(row), marker="o", markersize=3,
                    markevery=marked)  # fmt: skip
            if points[0].get("low") is not None:
                ax.fill_between(ks, [p["low"] for p in points], [p["high"] for p in points], color=colours[i],
                                alpha=0.16, linewidth=0)  # fmt: skip
        ax.set_title(benchmark, loc="left")
        ax.set_xlabel("k")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for ax in axes[len(benchmarks) :]:
        ax.set_axis_off()
    shown = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    _legend(canvas, list(shown.values()), list(shown))
    return canvas


def _legend(canvas: Canvas, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the axes, in as many columns as have room."""
    columns = max(1, min(3, 180 // (max(map(len, labels)) + 8)))
    canvas.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False)


def write_pass_at_k(rows: Sequence[Row], folder: Path) -> None:
    """``pass_at_k.png`` and ``.svg``: an evaluation's picture without a report around it."""
    with styled():
        canvas = draw_pass_at_k(rows, row_colours(rows, ()))
        to_png(canvas, folder / "pass_at_k.png")
        save(canvas, folder / "pass_at_k.svg", "pass@k", facecolor="white")
