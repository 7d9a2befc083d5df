"""The loop's figures in the report: learner steps, rollouts, whole training steps."""

from collections.abc import Iterable

OPS = {
    "learner_step": """One optimiser step on the same weights and completions. Tokens are those of the sequences without
padding and each with its whole prompt; *computed* are those that go through the model. Peak memory is what a step
allocates beyond weights and optimiser.""",
    "rollout": """Sampling for a batch of prompts, eight completions for each: GRPO's 8, iGRPO's 4 drafts and 4
refinements. Peak memory is the process's.""",
    "training_step": "The same runs' whole steps: sampling, rewards, optimiser step, weights to the engine.",
}


def section(rows: list[dict]) -> Iterable[str]:
    """One table per operation that the record has."""
    if any(row["op"] in OPS for row in rows):
        yield "### The training loop\n"
    for op, text in OPS.items():
        chosen = [row for row in rows if row["op"] == op]
        if not chosen:
            continue
        yield f"`{op}`: {text}\n"
        yield "| | | ms | relative to the first | tokens/s | samples/s | computed tokens | peak, MiB |"
        yield "|---|---|---|---|---|---|---|---|"
        for shape in dict.fromkeys(row["shape"] for row in chosen):
            yield from _lines([row for row in chosen if row["shape"] == shape])
        yield ""


def _lines(rows: list[dict]) -> Iterable[str]:
    base = next((row["time_ms"] for row in rows if row["time_ms"]), None)
    for row in rows:
        if not row["time_ms"]:
            yield f"| {row['shape']} | {row['provider']} | {row['note']} | | | | | |"
            continue
        seconds, tokens = row["time_ms"] / 1e3, row["tokens"] or row.get("decoded_tokens")
        cells = [
            f"{row['time_ms']:,.0f}",
            f"{row['time_ms'] / base:.2f}",
            f"{tokens / seconds:,.0f}" if tokens else "",
            f"{row['samples'] / seconds:.2f}" if row.get("samples") else "",
            f"{row['computed_tokens']:,.0f}" if row.get("computed_tokens") else "",
            f"{row['peak_extra_bytes'] / 2**20:,.0f}" if row["peak_extra_bytes"] else "",
        ]
        yield f"| {row['shape']} | {row['provider']} | {' | '.join(cells)} |"
