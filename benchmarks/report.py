"""Writes docs/performance.md and its pictures from the records in benchmarks/results/.

    python -m benchmarks.report             write
    python -m benchmarks.report --check     say what is out of date, and fail if anything is

What people wrote by hand (predictions, what was tried, what bounds a kernel) is docs/performance-log.md.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import linear_budget, loop_tables, records, sass, tables, targets

PAGE = records.ROOT / "docs" / "performance.md"
PICTURES = PAGE.parent / "performance"
INTRO = """# Performance

Written by `python -m benchmarks.report` from `benchmarks/results/*.json`; edit neither. Predictions, experiments and
what bounds each kernel are in [performance-log.md](performance-log.md).

```bash
pytest benchmarks/            # measure everything this machine can run, print the tables (a CPU: about ten minutes)
make bench                    # the same, and fail where we lost against this kind of machine's record
make bench ARGS=--record      # the same, and make it the record and this page
make gpu-check                # on a CUDA device: kernel tests and benchmarks, one JSON
```

All providers of a table took turns in one process on the same tensors; times are medians. *x* is a provider's time
divided by that of our fastest implementation: above 1 we are faster. *% of floor* is the floor's time divided by the
provider's; the floor is a copy of the fewest bytes, or the bare matmuls. *peak* is memory allocated beyond the inputs,
gradients included. *error* is the largest deviation from fp64 of the output or a gradient, relative to that tensor's
largest entry, on tokens on both sides of both ends of the clip range; above 5 % in bf16 or 0.1 % in fp32 a provider is
wrong and gets no time.

`token` is the plain clipped loss, `gspo` has sequence-level ratios, `kl` beta = 0.04, `entropy bonus` a coefficient of
0.01; `cross entropy` is the case whose gradient kernels without GRPO share; `frozen head` needs no dW; in `new lengths`
every call has a length never seen before, compilation included. `torch` is this package's readable reference. A busy
machine moves times, and much less the ratios: each record says its load.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    arguments = parser.parse_args(argv)
    found = load_records()
    stale = out_of_date(found)
    if arguments.check:
        for path in stale:
            print(f"{path.relative_to(records.ROOT)} is out of date; run python -m benchmarks.report")
        return 1 if stale else 0
    write(found)
    print(f"wrote {PAGE} and {PICTURES}")
    return 0


def write(found: list[dict]) -> None:
    from benchmarks import plots

    PAGE.write_text(page(found), encoding="utf-8")
    for record in found:
        plots.draw_all(record, PICTURES)


def load_records() -> list[dict]:
    """GPUs first."""
    every = [records.load(path) for path in sorted(records.RESULTS.glob("*.json"))]
    return sorted(every, key=lambda record: "cpu" in record)


def out_of_date(found: list[dict]) -> list[Path]:
    """Files that differ from what the records would give."""
    from benchmarks import plots

    stale = [] if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page(found) else [PAGE]
    for record in found:
        for name, rows in plots.pictures(record).items():
            path = PICTURES / name
            if not path.is_file() or plots.digest(rows) not in path.read_text(encoding="utf-8"):
                stale.append(path)
    return stale


def page(found: list[dict]) -> str:
    parts = [INTRO, "## Targets\n", *targets.section(found)]
    for record in found:
        parts += machine_section(record)
    if not any("gpu" in record for record in found):
        parts.append("## CUDA devices\n\nNo record yet. `make gpu-check` on such a machine writes one.\n")
    parts += linear_budget.section()
    parts += [*sass.section(), *launches()]
    return "\n".join(parts).rstrip() + "\n"


def launches() -> Iterable[str]:
    counts = json.loads((records.RESULTS.parent / "launches.json").read_text(encoding="utf-8"))
    yield "## Launches per call\n"
    yield (
        "`grpo_loss` with Triton in bf16, forward and backward together, metrics included, at any number of tokens: "
        "operators that PyTorch dispatches and Triton's grids, counted without a GPU by `python -m "
        "tests.kernels.launches`. Packed batches take as many. None waits for the device.\n"
    )
    yield "| | launches |\n|---|---|"
    yield from (f"| {name} | {count} |" for name, count in counts.items() if not name.endswith("packed"))
    yield (
        "\nOne program of eight warps walks a sequence in steps of 256 rows, one to four times, so few long sequences "
        "leave a GPU idle. By count, 8 × 32,768 tokens on an H200: 128 steps a walk, at most 165 instructions of a "
        "warp in a step (sm_90), 330 cycles of issue. If every step waits 1,000 cycles for memory, that is 0.07 ms a "
        "walk and 0.3 ms for four, on 8 of 132 multiprocessors, beside 56 ms of the loss kernel (V = 151,936). The one "
        "program that ranks all rows (top-entropy quantile, Clip-Cov, KL-Cov) goes over them 7 to 10 times, 2,048 rows "
        "a step: 0.7 ms by the same count.\n"
    )


def machine_section(record: dict) -> Iterable[str]:
    from benchmarks import plots

    yield f"## {record.get('gpu') or record.get('cpu')}\n"
    yield (
        f"{record['threads']} threads, torch {record['torch']}, triton {record['triton']}"
        f"{', driver ' + record['driver'] if record['driver'] else ''}; commit {str(record['commit'])[:10]}"
        f"{' with uncommitted changes' if record['uncommitted_changes'] else ''}, {record['date'][:10]}; "
        f"load average {record['load_average'][0]} before and {record['load_average'][1]} after "
        f"({record['cores']} cores: above that, other work ran beside it). Command: `{record['command']}`.\n"
    )
    for name in plots.pictures(record):
        yield f"![{name.partition('.')[0].rpartition('-')[2]}](performance/{name})\n"
    kernels = [row for row in record["rows"] if row["pass"] in tables.PASS_ORDER and row["op"] not in loop_tables.OPS]
    yield "### How many times slower than ours\n"
    yield from summary(kernels)
    behind = list(tables.behind_rivals(kernels))
    yield "Behind a peer: " + ("; ".join(behind) if behind else "none") + ".\n"
    yield from loop_tables.section(record["rows"])
    yield "### All figures\n"
    for case, rows in tables.grouped(kernels).items():
        yield f"<details><summary>{tables.title(case, rows[0])}</summary>\n"
        yield from details(rows)
        yield "</details>\n"


def summary(rows: list[dict]) -> Iterable[str]:
    """One table per operation: a line per case, a column per peer, the whole pass only."""
    by_op: dict[str, list[tuple[tuple, list[dict]]]] = {}
    for case, case_rows in tables.grouped(rows).items():
        by_op.setdefault(case[0], []).append((case, case_rows))
    for op, cases in by_op.items():
        columns = list(
            dict.fromkeys(r["provider"] for _, rs in cases for r in rs if r["impl"] not in (*records.OURS, "floor"))
        )
        yield f"`{op}`\n"
        yield "| | ours, ms | % of floor | " + " | ".join(columns) + " |"
        yield "|---|---|---|" + "---|" * len(columns)
        for case, case_rows in cases:
            for passed in tables.whole_passes(case):
                yield summary_line(case, case_rows, passed, columns)
        yield ""


def summary_line(case: tuple, rows: list[dict], passed: str, columns: list[str]) -> str:
    best = tables.best_of_ours(rows, passed)
    ours = next((r for r in rows if r["pass"] == passed and r["impl"] in records.OURS and r["time_ms"] == best), None)
    cells = []
    for name in columns:
        row = next((r for r in rows if r["provider"] == name and r["pass"] == passed), None)
        cells.append(ratio_cell(row, best))
    _, shape, tokens, vocab, hidden, dtype, variant = case
    width = f", H {hidden}" if hidden else ""
    label = f"{variant}, {passed}: {shape} {tokens:,} × {vocab:,}{width}, {dtype}"
    mine = f"{tables.number(best)} ({ours['provider']}) | {tables.percent_of_floor(ours)}" if ours else "– | –"
    return f"| {label} | {mine} | " + " | ".join(cells) + " |"


def ratio_cell(row: dict | None, best: float | None) -> str:
    if row is None or not best:
        return ""
    if not row["time_ms"]:
        return "wrong" if row["note"].startswith("wrong") else "–"
    return f"{row['time_ms'] / best:.2f}"


def details(rows: list[dict]) -> Iterable[str]:
    passes = tables.passes_of(rows)
    best = tables.best_of_ours(rows, passes[-1])
    yield "| | " + "".join(f"{p}, ms | " for p in passes) + "x | % of floor | peak, MiB | error |"
    yield "|---|" + "---|" * len(passes) + "---|---|---|---|"
    for name, by_pass in tables.providers(rows).items():
        last = tables.shown_row(by_pass, passes)
        if last["note"]:
            yield f"| {name} | {last['note']} |" + " |" * (len(passes) + 3)
            continue
        times = "".join(f"{tables.number(by_pass.get(p, {}).get('time_ms'))} | " for p in passes)
        x = tables.ratio(last, best if last["pass"] == passes[-1] else None)
        share = tables.percent_of_floor(last)
        yield f"| {name} | {times}{x} | {share} | {tables.mebibytes(last)} | {tables.error(last)} |"
    yield ""


if __name__ == "__main__":
    sys.exit(main())
