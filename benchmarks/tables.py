"""Figures as text: one table per case for the terminal, and the parts the report shares."""

from collections.abc import Iterable

from benchmarks import records

PASS_ORDER = ("fwd", "bwd", "fwd+bwd", "step")


def terminal(record: dict, reference: dict | None) -> Iterable[str]:
    """Every case of the run; x = how many times our best implementation's time."""
    machine = record.get("gpu") or record.get("cpu")
    yield f"\n{machine}, {record['threads']} threads, load {record['load_average']}, torch {record['torch']}"
    if record.get("toy"):
        yield "toy shapes: these times mean nothing"
    for case, rows in grouped(record["rows"]).items():
        yield f"\n{title(case, rows[0])}"
        yield from _table(rows)
    behind = list(behind_rivals(record["rows"]))
    if behind and not record.get("toy"):
        yield "\nbehind a peer:"
        yield from (f"  {line}" for line in behind)
    if reference is not None:
        yield f"\ncompared with the record of {reference['date']}, commit {str(reference['commit'])[:10]}"


def grouped(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Cases without the pass: what one table shows."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(records.case_key(row)[:-1], []).append(row)
    return found


def title(case: tuple, row: dict) -> str:
    op, shape, tokens, vocab, hidden, dtype, variant = case
    width = f", H {hidden}" if hidden else ""
    size = "" if tokens is None else f", {tokens:,} tokens"  # whole steps of the loop have no one number
    words = "" if vocab is None else f", V {vocab:,}"
    return f"{op}, {variant}: {shape}{size}{words}{width}, {dtype}"


def passes_of(rows: list[dict]) -> list[str]:
    names = {row["pass"] for row in rows}
    return [p for p in PASS_ORDER if p in names] + sorted(names - set(PASS_ORDER))


def best_of_ours(rows: Iterable[dict], passed: str) -> float | None:
    times = [r["time_ms"] for r in rows if r["pass"] == passed and r["impl"] in records.OURS and r["time_ms"]]
    return min(times, default=None)


def _table(rows: list[dict]) -> Iterable[str]:
    passes = passes_of(rows)
    head = "".join(f"{p + ' ms':>12}" for p in passes)
    yield f"  {'':26}{head}{'x':>9}{'% floor':>9}{'peak MiB':>10}{'error':>9}"
    best = best_of_ours(rows, passes[-1])
    for name, by_pass in providers(rows).items():
        last = shown_row(by_pass, passes)
        if last["note"]:
            yield f"  {name:26}{last['note']}"
            continue
        times = "".join(f"{number(by_pass.get(p, {}).get('time_ms')):>12}" for p in passes)
        x = ratio(last, best if last["pass"] == passes[-1] else None)
        yield f"  {name:26}{times}{x:>9}{percent_of_floor(last):>9}{mebibytes(last):>10}{error(last):>9}"


def shown_row(by_pass: dict[str, dict], passes: list[str]) -> dict:
    """The row that stands for a provider: that of the longest pass it has a time for, else any."""
    timed = [by_pass[p] for p in passes if p in by_pass and by_pass[p]["time_ms"]]
    return timed[-1] if timed else next(iter(by_pass.values()))


def ratio(row: dict, best: float | None) -> str:
    return f"{row['time_ms'] / best:.2f}" if row["time_ms"] and best else ""


def providers(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Provider -> pass -> row."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["provider"], {})[row["pass"]] = row
    return found


def behind_rivals(rows: Iterable[dict]) -> Iterable[str]:
    """Whole operations (`whole_passes`) in which a peer is faster than our best."""
    for case, case_rows in grouped(rows).items():
        for passed in whole_passes(case):
            ours = best_of_ours(case_rows, passed)
            for row in case_rows:
                peer = row["impl"] not in (*records.OURS, "floor")
                if ours and peer and row["pass"] == passed and row["time_ms"] and row["time_ms"] < ours:
                    yield f"{title(case, row)}, {passed}: {row['provider']} {ours / row['time_ms']:.2f}x as fast"


def whole_passes(case: tuple) -> tuple[str, ...]:
    """What a user waits for: log-probs without gradient, and everything with it. Where a loss does its work, in the
    forward or in the backward pass, is its own affair."""
    return ("fwd", "fwd+bwd") if case[0].endswith("log_softmax") else ("fwd+bwd",)


def percent_of_floor(row: dict) -> str:
    """Speed as a share of what the machine allows."""
    if not (row["time_ms"] and row["floor_ms"]):
        return ""
    return f"{100 * row['floor_ms'] / row['time_ms']:.0f} %"


def number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}" if x < 100 else f"{x:.0f}"


def mebibytes(row: dict) -> str:
    return "" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 2**20:.1f}"


def error(row: dict) -> str:
    return "" if row["max_rel_error"] is None else f"{row['max_rel_error']:.0e}"
