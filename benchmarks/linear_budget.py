"""What `linear_grpo_loss` costs on a GPU, on paper: its matmuls, and what comes beside them. No GPU is needed.

    python -m benchmarks.linear_budget           print the table; docs/performance.md has the same

bf16, 8,192 tokens, H = 4,096, V = 128,256, forward and backward, policy loss with an entropy bonus.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks import sass

TOKENS, HIDDEN, VOCAB = 8192, 4096, 128_256
TILE = (128, 256)
"""Of the logits that a block of a large matmul computes."""
SUSTAINED = {"A100": 260e12, "H200": 790e12}
"""FLOP/s of large bf16 matmuls, which a device keeps up at its power limit."""
KERNELS = {"triton": "triton, one launch", "cuda": {"A100": "cuda, resident", "H200": "cuda, cluster"}}
LAUNCHES = {"by operators": 138, "by small kernels": 24}
"""Beside the matmuls in one call of one chunk: two of the loss kernel, two that join its halves, those of the upstream
factor, and the objective with its metrics: by PyTorch's operators, as `tests/plan/test_rehearsal.py` counts them, or by
the small kernels, which come to 12 with `impl="triton"` and to 22 to 24 with `impl="cuda"`, counted without a GPU."""
LAUNCH = 4e-6
"""Seconds that a kernel of (n,) numbers takes on the device, with the gap before it."""


@dataclass(frozen=True)
class Budget:
    """Milliseconds."""

    matmuls: float
    memory: float
    """Of the loss kernel, which that bounds when it runs alone."""

    issue: float
    """Of the loss kernel at the least: its instructions want the multiprocessors, whatever runs beside it."""

    waves: float
    """By which the halves' tiles fill the multiprocessors worse than the whole's."""

    small: dict[str, float]

    def total(self, launches: str, beside: bool) -> float:
        """With the loss kernel hidden beside matmuls as far as it can be, or not at all."""
        return self.matmuls + self.waves + self.small[launches] + (self.issue if beside else self.memory)


def budget(device: sass.Device, kernel: str) -> Budget:
    found = json.loads(sass.RECORD.read_text(encoding="utf-8"))["rows"]
    name = KERNELS[kernel] if isinstance(KERNELS[kernel], str) else KERNELS[kernel][device.name]
    row = next(
        sass.Row(**row)
        for row in found
        if (row["name"], row["capability"], row["variant"]) == (name, device.capability, "plain")
    )
    share = TOKENS * VOCAB / (sass.ROWS * sass.V)  # of what the record's bounds are for
    times = row.milliseconds(device)
    bonus = next((r["gradient"] for r in found if (r["name"], r["capability"], r["variant"]) == (
        name, device.capability, "entropy")), row.bonus)  # fmt: skip
    issue = times["issue"] * (row.total - row.gradient + bonus) / row.total
    one = 1e3 * 2 * TOKENS * HIDDEN * VOCAB / SUSTAINED[device.name]
    small = {name: 1e3 * LAUNCH * count for name, count in LAUNCHES.items()}
    return Budget(3 * one, times["memory"] * share, issue * share, one * _worse(device.multiprocessors), small)


def _worse(processors: int) -> float:
    """Share of a product's time by which logits and dX in halves take more waves than whole."""

    def waves(rows: int, columns: int) -> float:
        return -(-(-(-rows // TILE[0]) * -(-columns // TILE[1])) // processors)

    return sum(2 * waves(TOKENS // 2, n) / waves(TOKENS, n) - 1 for n in (VOCAB, HIDDEN))


def section() -> Iterable[str]:
    """The part of docs/performance.md that follows from it."""
    yield "## The fused linear loss on a GPU, on paper\n"
    yield (
        f"`linear_grpo_loss`, {TOKENS:,} × {HIDDEN:,} × {VOCAB:,} in bf16, forward and backward with policy loss and "
        "entropy bonus, by `python -m benchmarks.linear_budget`; **nothing here was measured on a GPU**. *matmuls*: "
        "6·n·H·V FLOP at the rate that a device sustains ("
        + ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in SUSTAINED.items())
        + f", assumed). *loss kernel*: bytes and instructions of the record below. *halves*: more waves of {TILE[0]} × "
        f"{TILE[1]} tiles than in one piece. *small*: launches beside those "
        f"({', '.join(f'{name} {count}' for name, count in LAUNCHES.items())}, counted) at "
        f"{LAUNCH * 1e6:.0f} µs, assumed. dW is one product in one chunk: no fp32 sum and no rounding pass. Host "
        "waits: none, counted. *serial* and *beside* are the whole: the loss kernel hides beside matmuls not at all or "
        "all but its instructions. Which it is depends on how the device shares its multiprocessors: a block of a "
        "matmul may fill one's registers.\n"
    )
    yield (
        "| | matmuls, ms | loss kernel: memory | issue | halves | small, by operators | by kernels "
        "| **serial**, by operators | by kernels | beside, by kernels | over the matmuls, by kernels |"
    )
    yield "|---" * 11 + "|"
    for device in sass.DEVICES:
        for kernel in KERNELS if device.name in SUSTAINED else ():
            b = budget(device, kernel)
            now, then = LAUNCHES
            serial, beside = b.total(then, False), b.total(then, True)
            yield (
                f"| {device.name}, {kernel} | {b.matmuls:.2f} | {b.memory:.2f} | {b.issue:.2f} | {b.waves:.2f} | "
                f"{b.small[now]:.2f} | {b.small[then]:.2f} | {b.total(now, False):.2f} | {serial:.2f} | {beside:.2f} | "
                f"{serial / b.matmuls - 1:.1%} to {beside / b.matmuls - 1:.1%} |"
            )
    yield (
        "\nTargets: H200 ≤ 34.3 ms and at most 4 % over the matmuls, A100 at least 90 % of the bare matmuls' speed. "
        "On paper, with small kernels, `cuda` meets all of them serially; `triton` meets the time, "
        "but the 4 % on an H200 only if a third of what can hide does, as its second read of a row comes from memory. "
        "With one launch per operator `cuda` meets the time and neither meets the 4 % serially. A first record must "
        "show the sustained rate, the loss kernel's own time, and the whole with and without the second stream.\n"
    )


if __name__ == "__main__":
    print("\n".join(section()))
