"""The loop's figures in the report: learner steps, rollouts, whole training steps."""

from collections.abc import Iterable

OPS = {
    "learner_step": "One optimiser step on the same model and completions",
    "rollout": "Sampling one batch of prompts at a budget of 8 completions per prompt",
    "training_step": "Rollout, learner step and weight push",
}


def section(rows: list[dict]) -> Iterable[str]:
    """One table per operation that the record has."""
    for op, heading in OPS.items():
        chosen = [row for row in rows if row["op"] == op]
        if not chosen:
            continue
        yield f"### {heading}\n"
        yield "| | | ms | tokens/s | samples/s | peak, MiB | relative time |"
        yield "|---|---|---|---|---|---|---|"
        for shape in dict.fromkeys(row["shape"] for row in chosen):
            yield from _lines([row for row in chosen if row["shape"] == shape])
        yield ""


def _lines(rows: list[dict]) -> Iterable[str]:
    base = next((row["time_ms"] for row in rows if row["time_ms"]), None)
    for row in rows:
        if not row["time_ms"]:
            yield f"| {row['shape']} | {row['contender']} | {row['note']} | | | | |"
            continue
        seconds = row["time_ms"] / 1e3
        tokens = f"{row['tokens'] / seconds:,.0f}" if row["tokens"] else ""
        samples = f"{row['samples'] / seconds:.2f}" if row.get("samples") else ""
        peak = f"{row['peak_extra_bytes'] / 2**20:,.0f}" if row["peak_extra_bytes"] else ""
        relative = f"{row['time_ms'] / base:.2f}"
        times = f"{row['time_ms']:,.0f} | {tokens} | {samples} | {peak} | {relative}"
        yield f"| {row['shape']} | {row['contender']} | {times} |"
