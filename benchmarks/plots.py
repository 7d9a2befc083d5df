"""Pictures of a record, as SVG. Each carries a digest of its rows, by which `report --check` knows it is current."""

import hashlib
import json
from pathlib import Path

from benchmarks import records, tables
from igrpo.report.svg import save

COLOURS = {"ours": "#1b6ca8", "peer": "#b0b0b0", "floor": "#d1495b"}
OPS = ("selective_log_softmax", "grpo_loss", "linear_selective_log_softmax", "linear_grpo_loss")


def pictures(record: dict) -> dict[str, list[dict]]:
    """File name -> the rows drawn in it."""
    kind = records.kind_of(record)
    shown = main_rows(record)
    found = {f"{kind}-time.svg": shown, f"{kind}-memory.svg": shown}
    growing = over_tokens(record)
    if growing:
        found[f"{kind}-tokens.svg"] = growing
    return {name: rows for name, rows in found.items() if rows}


def main_rows(record: dict) -> list[dict]:
    """The first case of each operation that has the plain variant, whole pass."""
    chosen = []
    for op in OPS:
        for case, rows in tables.grouped(record["rows"]).items():
            if case[0] == op and case[-1] in ("token", "logps"):
                passed = tables.passes_of(rows)[-1]
                chosen += [without_samples(r) for r in rows if r["pass"] == passed and r["time_ms"]]
                break
    return chosen


def over_tokens(record: dict) -> list[dict]:
    """The losses' plain variant where one shape was run with at least three token counts."""
    chosen = []
    for op in ("grpo_loss", "linear_grpo_loss"):
        rows = [r for r in record["rows"] if r["op"] == op and r["variant"] == "token" and r["pass"] == "fwd+bwd"]
        for key in dict.fromkeys((r["shape"], r["vocab"], r["hidden"], r["dtype"]) for r in rows):
            same = [r for r in rows if (r["shape"], r["vocab"], r["hidden"], r["dtype"]) == key]
            if len({r["tokens"] for r in same}) >= 3:
                chosen += [without_samples(r) for r in same if r["time_ms"]]
                break
    return chosen


def without_samples(row: dict) -> dict:
    return {k: v for k, v in row.items() if k != "samples_ms"}


def digest(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:32]


def draw_all(record: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and the same rows give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "igrpo", "font.size": 11})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in pictures(record).items():
        draw = draw_tokens if name.endswith("-tokens.svg") else draw_bars
        figure = draw(rows, name)
        save(figure, folder / name, digest(rows), bbox_inches="tight")


def draw_bars(rows: list[dict], name: str):
    """One panel per operation, a bar per provider, shortest first."""
    from matplotlib import pyplot as plt

    key, label = ("peak_extra_bytes", "peak memory beyond inputs, MiB") if "memory" in name else ("time_ms", "time, ms")
    panels = [(op, [r for r in rows if r["op"] == op and r[key] is not None]) for op in OPS]
    panels = [(op, chosen) for op, chosen in panels if chosen]
    heights = [len(chosen) for _, chosen in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 0.34 * sum(heights) + 1.1 * len(panels)), layout="constrained", squeeze=False,
        height_ratios=[h + 1.5 for h in heights],
    )  # fmt: skip
    for axis, (op, chosen) in zip(axes[:, 0], panels, strict=True):
        chosen = sorted(chosen, key=lambda r: r[key], reverse=True)
        values = [r[key] / 2**20 if key == "peak_extra_bytes" else r[key] for r in chosen]
        bars = axis.barh([r["provider"] for r in chosen], values, color=[COLOURS[owner(r)] for r in chosen])
        axis.bar_label(bars, [tables.number(v) for v in values], padding=3)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        row = chosen[0]
        axis.set_title(
            f"{op}, {row['variant']}, {row['pass']}: {row['shape']}, {row['tokens']:,} tokens, V {row['vocab']:,}, "
            f"{row['dtype']}", loc="left", fontsize=11,
        )  # fmt: skip
        axis.set_xlabel(label)
    plt.close(figure)
    return figure


def draw_tokens(rows: list[dict], name: str):
    """Time per token, share of the floor and peak memory against the number of tokens, per operation."""
    from matplotlib import pyplot as plt

    ops = [op for op in OPS if any(r["op"] == op for r in rows)]
    quantities = (
        ("time per token, µs", lambda r: 1e3 * r["time_ms"] / r["tokens"]),
        ("% of floor", lambda r: 100 * r["floor_ms"] / r["time_ms"] if r["floor_ms"] else None),
        ("peak memory, MiB", lambda r: r["peak_extra_bytes"] / 2**20 if r["peak_extra_bytes"] is not None else None),
    )
    figure, axes = plt.subplots(len(ops), 3, figsize=(14, 4.2 * len(ops)), layout="constrained", squeeze=False)
    for line, op in zip(axes, ops, strict=True):
        chosen = [r for r in rows if r["op"] == op]
        names = list(dict.fromkeys(r["provider"] for r in chosen))
        for axis, (label, value) in zip(line, quantities, strict=True):
            for i, provider in enumerate(names):
                points = sorted((r["tokens"], value(r)) for r in chosen
                                if r["provider"] == provider and value(r) is not None)  # fmt: skip
                mine = next(r["impl"] in records.OURS for r in chosen if r["provider"] == provider)
                axis.plot(*zip(*points, strict=True) if points else ([], []), marker="os^Dv"[i % 5], label=provider,
                          linewidth=2.4 if mine else 1.2, color=f"C{i % 10}")  # fmt: skip
            axis.set_xlabel("tokens")
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            axis.set_title(f"{op}, {chosen[0]['shape']}", loc="left", fontsize=11)
            axis.spines[["top", "right"]].set_visible(False)
        line[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    plt.close(figure)
    return figure


def owner(row: dict) -> str:
    return "floor" if row["impl"] == "floor" else "ours" if row["impl"] in records.OURS else "peer"
