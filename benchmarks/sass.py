"""Instructions per logit of the loss kernels, ours and the peers', read from their machine code. No GPU is needed.

    python -m benchmarks.sass                    print the tables for sm_80, sm_90a and sm_100a
    python -m benchmarks.sass --arch 90          for one of them
    python -m benchmarks.sass --record           and make them the record that docs/performance.md and a test read

bf16, V = 151,936, the plain clipped loss; `entropy` with an entropy bonus, `softcap` with a final softcap. Bounds are
for 8,192 rows.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from benchmarks.machine_code import CLASSES, Function, Instruction, Loop, busy_cycles, classes, functions, resources
from benchmarks.sass_kernels import ROOT, Kernel, LossKernels, V, every_path

RECORD = ROOT / "benchmarks" / "sass.json"
CAPABILITIES = (80, 90, 100)
ROWS = 8192
WARP = 32
REGISTERS, WARPS, SCHEDULERS = 65_536, 64, 4  # of a multiprocessor


@dataclass(frozen=True)
class Device:
    name: str
    capability: int
    multiprocessors: int
    hertz: float
    bandwidth: float  # bytes per second of a copy


DEVICES = (
    Device("A100", 80, 108, 1.41e9, 1.8e12),
    Device("H100", 90, 132, 1.755e9, 3.0e12),
    Device("H200", 90, 132, 1.755e9, 4.3e12),
    Device("B200", 100, 148, 1.9e9, 7.0e12),
)


@dataclass(frozen=True)
class Phase:
    """The code of one trip and how many logits a thread handles in it; `loop` is None for code without one."""

    loop: Loop | None
    code: list[Instruction]
    logits: float

    @property
    def per_logit(self) -> float:
        return len(self.code) / self.logits


@dataclass(frozen=True)
class Row:
    """One line of the table: all figures are per logit, registers and warps those of each kernel."""

    name: str
    variant: str
    capability: int
    bytes: int
    statistics: float
    gradient: float
    bonus: float  # the gradient's loop with an entropy bonus; 0 where that is another kernel
    row: float  # what is not in these loops
    classes: dict[str, float]
    busy: dict[str, float]  # unit -> cycles of a scheduler
    registers: list[int]
    warps: list[int]  # per multiprocessor
    multiprocessors: int  # that it can use; 0 = all

    @property
    def total(self) -> float:
        return self.statistics + self.gradient + self.row

    def milliseconds(self, device: Device) -> dict[str, float]:
        """Time that each unit and the memory need for all rows."""
        processors = min(self.multiprocessors or device.multiprocessors, device.multiprocessors)
        per_second = processors * SCHEDULERS * device.hertz * WARP
        logits = ROWS * V
        times = {unit: 1e3 * logits * cycles / per_second for unit, cycles in self.busy.items()}
        return times | {"memory": 1e3 * logits * self.bytes / device.bandwidth}


def phases(function: Function) -> tuple[list[Phase], list[Phase]]:
    """Loops with an exp that store nothing (statistics) and that store rows (gradient).

    First those of most logits, among them those that read shared memory: there the rows are.
    """
    pieces = [(loop, function.trip(loop)) for loop in function.innermost]
    pieces = [(loop, code) for loop, code in pieces if _logits(code)]
    if not pieces:
        pieces = [(None, function.straight())]
    found = [Phase(loop, code, _logits(code)) for loop, code in pieces]
    storing = [p for p in found if any(i.stores and i.row_bytes for i in p.code)]
    reading = [p for p in found if p not in storing]
    return tuple(sorted(group, key=lambda p: (*_place(p), p.per_logit)) for group in (reading, storing))


def _place(phase: Phase) -> tuple[float, bool]:
    return -phase.logits, not any(i.base == "LDS" and i.row_bytes >= 16 for i in phase.code)


def _logits(code: list[Instruction]) -> float:
    """bf16 logits of a trip: what it stores, else what it loads; 0 without an exp."""
    if not classes(code)["exp"]:
        return 0
    stored = sum(i.row_bytes for i in code if i.stores)
    return (stored or sum(i.row_bytes for i in code if i.loads)) / 2


def row_overhead(kernel: Kernel, function: Function, hot: list[Phase]) -> float:
    """Instructions per logit outside the hot loops. One thread's extra work counts as its longest way."""
    if any(phase.loop is None for phase in hot):
        return 0.0  # counted with the code itself
    least, most = function.around([phase.loop for phase in hot])
    warps = kernel.threads // WARP
    least -= round(kernel.unrolled * sum(phase.per_logit for phase in hot))
    issued = warps * least + (most - least if kernel.leader else 0)
    return issued / (kernel.logits / WARP)


def occupancy(kernel: Kernel, registers: int) -> int:
    """Warps per multiprocessor that registers and the launch allow; registers are given out by 256 to a warp."""
    warps = kernel.threads // WARP
    per_warp = -(-registers * WARP // 256) * 256
    return warps * min(REGISTERS // (per_warp * warps), WARPS // warps, kernel.blocks_limit)


def count(path: LossKernels, capability: int) -> Row:
    statistics = gradient = bonus = None
    overhead, registers, warps = 0.0, [], []
    for kernel in path.kernels:
        name, function = next((n, f) for n, f in functions(kernel.cubin).items() if kernel.function in n)
        reading, storing = phases(function)
        hot = [group[0] for group in (reading, storing) if group]
        overhead += row_overhead(kernel, function, hot)
        if reading:
            statistics = reading[0]
        if storing:
            gradient = storing[0]
            like = [p for p in storing[1:] if _place(p) == _place(gradient)]
            bonus = like[0] if like else bonus
        used = resources(kernel.cubin)[name]["reg"]
        registers.append(used)
        warps.append(occupancy(kernel, used))
    assert statistics and gradient, path.name
    kinds, busy = Counter(), Counter(issue=overhead)
    for phase in (statistics, gradient):
        for kind, number in classes(phase.code).items():
            kinds[kind] += number / phase.logits
        for unit, cycles in busy_cycles(phase.code, capability).items():
            busy[unit] += cycles / phase.logits
    return Row(
        path.name, path.variant, capability, path.bytes, statistics.per_logit, gradient.per_logit,
        bonus.per_logit if bonus else 0.0, overhead, {k: kinds[k] for k in CLASSES}, dict(busy), registers, warps,
        path.multiprocessors.get(capability, 0),
    )  # fmt: skip


# --- tables


def table(rows: list[Row], capability: int) -> Iterable[str]:
    """Markdown for one architecture."""
    devices = [d for d in DEVICES if d.capability == capability]
    rows = [row for row in rows if row.capability == capability]
    yield (
        f"| sm_{capability} | B | statistics | gradient | row | **total** | " + " | ".join(CLASSES) + " | registers "
        "| warps | " + " | ".join(f"{device.name}, ms" for device in devices) + " |"
    )
    yield "|---" * (8 + len(CLASSES) + len(devices)) + "|"
    for row in rows:
        yield line(row, row.name if row.variant == "plain" else f"{row.name}, {row.variant}", row.gradient, devices)
        if row.bonus and row.variant == "plain":
            yield f"| {row.name}, entropy | | | {row.bonus:.1f} | | {row.total - row.gradient + row.bonus:.1f} |"


def line(row: Row, label: str, gradient: float, devices: list[Device]) -> str:
    cells = [
        label,
        str(row.bytes),
        f"{row.statistics:.1f}",
        f"{gradient:.1f}",
        f"{row.row:.1f}",
        f"**{row.total:.1f}**",
    ]
    cells += [f"{row.classes[kind]:.1f}" for kind in CLASSES]
    cells += [", ".join(map(str, row.registers)), ", ".join(map(str, row.warps))]
    for device in devices:
        times = row.milliseconds(device)
        unit = max(times, key=times.get)
        cells.append(
            f"{times[unit]:.2f} {unit} ({times['issue']:.2f} issue)" if unit != "issue" else f"{times[unit]:.2f} issue"
        )
    return "| " + " | ".join(cells) + " |"


def section() -> Iterable[str]:
    """The part of docs/performance.md that comes from the record."""
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    yield "## Instructions per logit\n"
    yield (
        f"Read from machine code by `python -m benchmarks.sass` ({found['compilers']}), bf16, V = 151,936; no GPU was "
        "used. *row* is what a row costs outside the loops, spread over its logits: the shortest way of every warp, "
        "and the longest of the thread that works for its block. *B* is memory traffic per logit. The last columns "
        "bound the time of 8,192 rows: the unit that needs longest, at the clocks and copy bandwidths in "
        "`benchmarks/sass.py`; *special* is the unit of exp, *integer* that of compares and conversions. `liger` and "
        "`trl` are their own Triton kernels, forward and backward. cut-cross-entropy has none to compare: its exps "
        "are part of its matrix products.\n"
    )
    for capability in CAPABILITIES:
        yield from table([Row(**row) for row in found["rows"]], capability)
        yield ""


def compilers() -> str:
    import triton

    answer = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', answer)[1]}, triton {triton.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, choices=CAPABILITIES, help="only this compute capability, without the point"
    )
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.record and arguments.arch:
        parser.error("--record needs every architecture; leave out --arch")
    rows = []
    for capability in [arguments.arch] if arguments.arch else CAPABILITIES:
        rows += [count(path, capability) for path in every_path(capability)]
        print("\n".join(table(rows, capability)), end="\n\n", flush=True)
    if arguments.record:
        found = {"compilers": compilers(), "rows": [_rounded(asdict(row)) for row in rows]}
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
