"""``igrpo report RUN [RUN …] [-o report.html]``: reads run folders, writes the page and the same figures as PNG."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igrpo.settings import EXIT_BAD_CONFIG
from igrpo.terminal import print_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from igrpo.report.arms import Arm
    from igrpo.report.page import Drawn

DESCRIPTION = "One self-contained HTML page (no network needed) and PNG figures from one or more runs."
EXAMPLES = """\
examples:
  igrpo report runs/quickstart                                  writes runs/quickstart/report.html
  igrpo report runs/grpo runs/igrpo -o compare.html             both runs in every figure
  igrpo report runs/grpo-1 runs/grpo-2 runs/igrpo-1 runs/igrpo-2
      runs that differ only in the seed become one line: mean and standard deviation
  igrpo report runs/igrpo runs/eval                             with the benchmarks and pass@k of `igrpo eval`

Figures are also written as PNG into REPORT_figures/ beside the page. A run that is still going, or was killed, can be
reported on: the page says what is missing.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 written; 2 a folder that is no run."""
    from igrpo.report.completions import MOST_GROUPS

    parser = argparse.ArgumentParser(
        "igrpo report", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run, or of an evaluation")
    parser.add_argument("-o", "--output", type=Path, help="page to write; default RUN/report.html, for several runs "
                        "report.html")  # fmt: skip
    parser.add_argument("--no-png", action="store_true", help="write the page only")
    parser.add_argument("--completions", type=int, default=MOST_GROUPS, metavar="N",
                        help=f"groups in the completions browser, over all runs (default {MOST_GROUPS})")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        page = write_report(args.runs, args.output, png=not args.no_png, completions=args.completions)
    except OSError as error:  # no run there, or no place for the page
        print_error(error)
        return EXIT_BAD_CONFIG
    print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0


def write_report(folders: Sequence[Path], output: Path | None, png: bool = True, completions: int = 300) -> Path:
    """Returns the page's path.

    Raises:
        FileNotFoundError: a folder that is neither a run nor an evaluation.
    """
    from igrpo.report import benchmarks, tables
    from igrpo.report.arms import group_runs
    from igrpo.report.completions import sample_groups
    from igrpo.report.page import Content, render
    from igrpo.report.runs import read_run

    evaluations = [folder for folder in folders if (folder / "summary.json").is_file()]
    runs = [read_run(folder) for folder in folders if folder not in evaluations]
    if not runs:
        raise FileNotFoundError(f"{folders[0]} is an evaluation; give the output_dir of at least one run too")
    output = output or (runs[0].path / "report.html" if len(runs) == 1 else Path("report.html"))
    output.parent.mkdir(parents=True, exist_ok=True)
    arms = group_runs(runs)
    notes = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    rows = benchmarks.read_rows(benchmarks.find_summaries(folders), notes)
    sections = _draw_all(arms, rows, notes, output.with_name(f"{output.stem}_figures") if png else None)
    config = runs[0].path / "config.yaml"
    content = Content(
        arms=arms,
        results=tables.results(arms),
        resources=tables.resources(arms),
        settings=tables.settings(runs),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        sections=sections,
        sample=sample_groups(arms, notes, completions),
        notes=notes,
    )
    output.write_text(render(content), encoding="utf-8")
    return output


def _draw_all(
    arms: Sequence[Arm], rows: Sequence[dict[str, Any]], notes: list[str], pictures: Path | None
) -> list[tuple[str, list[Drawn]]]:
    """Every figure that has data, as SVG for the page and as PNG; those without are named in ``notes``."""
    from igrpo.report import benchmarks
    from igrpo.report.catalogue import drawable, sections
    from igrpo.report.drawing import draw, styled, to_png, to_svg
    from igrpo.report.page import Drawn
    from igrpo.report.timeline import draw_timeline

    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)

    def finish(canvas: Canvas, name: str, title: str, text: str, wide: bool) -> Drawn:
        if pictures is not None:
            to_png(canvas, pictures / f"{name}.png")
        return Drawn(name, title, text, to_svg(canvas, name, title), wide)

    result, empty = [], []
    with styled():
        for section in sections(arms):
            drawn = []
            for figure in section.figures:
                shown = drawable(figure, arms)
                if shown is None:
                    empty += [] if figure.extra else [figure.title.lower()]
                else:
                    drawn.append(finish(draw(shown, arms), figure.name, figure.title, figure.text, figure.wide))
            result.append((section.title, drawn))
        schedule = draw_timeline(arms, notes)
        if schedule is None:
            empty.append("schedule (no timeline.jsonl)")
        else:
            result[-1][1].append(finish(schedule[0], "timeline", "Schedule", schedule[1], True))
        if rows:
            colours = benchmarks.row_colours(rows, arms)
            text = "Accuracy averaged over n samples per problem (avg@n), with the evaluation's 95 % interval."
            drawn = [finish(benchmarks.draw_bars(rows, colours), "benchmarks", "Benchmarks", text, True)]
            if any(len(figures["pass_at_k"]) > 1 for row in rows for figures in row["benchmarks"].values()):
                text = "Chance that at least one of k samples is right, estimated without bias from n samples."
                drawn.append(finish(benchmarks.draw_pass_at_k(rows, colours), "pass_at_k", "pass@k", text, True))
            result.append(("Evaluation", drawn))
    if empty:
        notes.append(f"no data for: {', '.join(empty)}")
    return result
