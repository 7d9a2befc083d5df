"""One case: providers with the same work take turns, the ones that are right get a time.

    gate     output and gradients against fp64, on inputs at the borders of the clip range; wrong -> no figure
    memory   one turn under the allocator's eyes
    clock    rounds; in each, every provider has one turn, starting with another one each round

A GPU is timed with CUDA events, its L2 flushed before every turn; a CPU by the wall clock, with inputs that exceed its
caches and were just written again. Nothing of the preparation is inside the clock.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.problems import Problem, truth
from benchmarks.provider import Forward, Provider
from benchmarks.shapes import minimum_bytes, minimum_flops
from igrpo_kernels import available_impls

# Largest error, relative to the largest entry of each tensor, that passes as right. Wide enough for honest bf16: a
# log-prob of -10 with 8 bits is off by 0.03, and so is the ratio. The error itself stands in the table.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
FLUSH_BYTES = 256 * 2**20  # more than any L2
PASSES = ("fwd", "bwd", "fwd+bwd")


@dataclass
class Measurement:
    """A provider with what was found out about it; `note` says why it has no figure."""

    provider: Provider
    forward: Forward | None = None
    error: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    first_ms: dict[str, float] = field(default_factory=dict)
    samples_ms: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PASSES})


class Comparison:
    """All providers on one problem.

    Args:
        passes: ("fwd",) runs without gradients; otherwise forward and backward are timed in one go, and of forward,
            backward and their sum those named are kept.
    """

    def __init__(self, problem: Problem, providers: list[Provider], passes: tuple[str, ...]):
        self.problem, self.passes = problem, passes
        self.measurements = [Measurement(c) for c in providers]
        self.clock = CudaClock(problem.device) if problem.device.type == "cuda" else WallClock()
        self._round = 0

    def prepare(self) -> None:
        """Gate and memory of everyone; afterwards `running` are those with a figure to come."""
        problem = self.problem
        torch._dynamo.reset()  # past its limit of recompilations it would run the eager code
        problem.old = problem.gate_old
        error_of = truth(problem)
        for measurement in self.measurements:
            self._check(measurement, error_of)
            release(problem)
        problem.old = problem.clock_old
        for measurement in self.running:
            self.guarded(measurement, lambda e=measurement: self._measure_memory(e))
        problem.begin()  # its buffer, which the floor copies into
        self.floor = Floor(problem, self.passes)

    @property
    def running(self) -> list[Measurement]:
        return [e for e in self.measurements if not e.note]

    def _check(self, measurement: Measurement, error_of: Callable) -> None:
        provider, problem = measurement.provider, self.problem
        measurement.note = provider.missing(problem.device) or ""
        if not measurement.note and self.passes != ("fwd",) and provider.forward_only:
            measurement.note = "has no backward pass"
        if measurement.note:
            return

        def attempt() -> None:
            measurement.forward = provider.build()
            outputs = self._turn(measurement)
            measurement.error = error_of(self._without_extra_row(outputs), self.passes != ("fwd",))
            limit = TOLERANCE[problem.shape.dtype]
            if not measurement.error <= limit:
                measurement.note = f"wrong: error {measurement.error:.1e} exceeds {limit:.0e}"

        self.guarded(measurement, attempt)

    def guarded(self, measurement: Measurement, action: Callable[[], None]) -> None:
        """Whatever a provider raises becomes its note: one that fails must not take the others along."""
        try:
            action()
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            kind = "out of memory" if "out of memory" in str(error).lower() else f"{type(error).__name__}: {first}"
            measurement.note = f"failed ({kind[:120]})"
        release(self.problem)

    def _turn(self, measurement: Measurement) -> dict[str, torch.Tensor]:
        self.problem.begin(measurement.provider.extra_row)
        if self.passes == ("fwd",):
            with torch.no_grad():
                return measurement.forward(self.problem)
        outputs = measurement.forward(self.problem)
        self.problem.backward(outputs)
        return outputs

    def _without_extra_row(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: x.detach() if x.dim() == 0 else x.detach()[:, : self.problem.shape.T] for n, x in outputs.items()}

    def _measure_memory(self, measurement: Measurement) -> None:
        self.problem.begin(measurement.provider.extra_row)
        measurement.peak_bytes = peak_extra_bytes(lambda: self._work(measurement), self.problem.device)

    def _work(self, measurement: Measurement) -> None:
        if self.passes == ("fwd",):
            with torch.no_grad():
                measurement.forward(self.problem)
        else:
            self.problem.backward(measurement.forward(self.problem))

    def round(self) -> None:
        """One turn for everyone."""
        turns = [*self.running, self.floor]
        start = self._round % len(turns)
        self._round += 1
        gc.disable()
        try:
            for measurement in turns[start:] + turns[:start]:
                self.timed_turn(measurement)
        finally:
            gc.enable()

    def timed_turn(self, measurement: "Measurement | Floor") -> None:
        problem, clock = self.problem, self.clock
        if isinstance(measurement, Floor):
            clock.cold()
            measurement.time(clock)
            return
        problem.begin(measurement.provider.extra_row)
        clock.cold()
        if self.passes == ("fwd",):
            with torch.no_grad():
                clock.start()
                outputs = measurement.forward(problem)
                clock.split()
        else:
            clock.start()
            outputs = measurement.forward(problem)
            clock.split()
            problem.backward(outputs)
            clock.split()
        splits = clock.read_ms()
        for name, value in zip(PASSES, [*splits, sum(splits)], strict=False):
            if name in self.passes:
                measurement.samples_ms[name].append(value)

    def discard(self) -> None:
        """Forgets the times so far: those of the warm-up, whose first turn had all its memory to fetch."""
        for measurement in self.measurements:
            first = {name: significant(x[0]) for name, x in measurement.samples_ms.items() if x}
            measurement.first_ms = measurement.first_ms or first
        for measurement in [*self.measurements, self.floor]:
            for values in measurement.samples_ms.values():
                values.clear()

    def rows(self) -> list[dict]:
        """The record's rows: one per provider and pass, the floor first."""
        floors = {name: statistics.median(v) for name, v in self.floor.samples_ms.items() if v}
        rows = [self._row("floor", "floor", name, self.floor.samples_ms[name], floors) for name in floors]
        for measurement in self.measurements:
            for name in self.passes:
                provider, samples = measurement.provider, measurement.samples_ms[name]
                row = self._row(provider.name, provider.impl, name, samples, floors)
                row |= {"peak_extra_bytes": measurement.peak_bytes, "max_rel_error": measurement.error}
                row |= {"first_ms": measurement.first_ms.get(name)}
                rows.append(row | {"note": measurement.note})
        return rows

    def _row(self, name: str, impl: str, passed: str, samples: list[float], floors: dict[str, float]) -> dict:
        problem, shape = self.problem, self.problem.shape
        return {
            "op": problem.op, "pass": passed, "impl": impl, "provider": name, "shape": shape.name,
            "tokens": shape.tokens, "vocab": shape.V, "hidden": shape.H if problem.linear else None,
            "dtype": shape.dtype_name, "variant": problem.variant,
            "time_ms": significant(statistics.median(samples)) if samples else None,
            "floor_ms": significant(floors[passed]) if passed in floors else None,
            "peak_extra_bytes": None, "max_rel_error": None, "note": "",
            "samples_ms": [significant(x) for x in samples],
        }  # fmt: skip


class Floor:
    """What no implementation can beat: a copy of the least bytes, or the bare matmuls."""

    def __init__(self, problem: Problem, passes: tuple[str, ...]):
        shape = problem.shape
        self.samples_ms: dict[str, list[float]] = {}
        self.work: dict[str, Callable[[], None]] = {}
        for name, count in minimum_bytes(problem.op, shape, problem.variant).items():
            if name in passes:
                self._add(name, copier(problem, count))
        if problem.linear:
            matmuls = self._matmuls(problem)
            for name, flops in minimum_flops(problem.op, shape, problem.variant).items():
                if name in passes:
                    count = flops // (2 * shape.tokens * shape.H * shape.V)
                    chosen = matmuls[1:] if name == "bwd" else matmuls[:count]
                    self._add(name, lambda chosen=chosen: [matmul() for matmul in chosen])

    def _add(self, name: str, work: Callable[[], None]) -> None:
        self.work[name], self.samples_ms[name] = work, []

    @staticmethod
    def _matmuls(problem: Problem) -> list[Callable[[], torch.Tensor]]:
        """logits = X·Wᵀ, dX = d·W, dW = dᵀ·X in the dtype of the inputs, into buffers that are there."""
        x, w = problem.pristine.view(-1, problem.shape.H), problem.weight.detach()
        d, dx, dw = (
            torch.zeros(len(x), len(w), dtype=x.dtype, device=x.device),
            torch.empty_like(x),
            torch.empty_like(w),
        )
        return [
            lambda: torch.mm(x, w.t(), out=d), lambda: torch.mm(d, w, out=dx), lambda: torch.mm(d.t(), x, out=dw)
        ]  # fmt: skip

    def time(self, clock: "WallClock | CudaClock") -> None:
        for name, work in self.work.items():
            clock.cold()
            clock.start()
            work()
            clock.split()
            self.samples_ms[name].append(clock.read_ms()[0])


def copier(problem: Problem, count: int) -> Callable[[], None]:
    """Moves `count` bytes in all, half of them read and half written, as device copies between two large buffers."""
    source = problem.pristine.view(-1)
    target = problem.storage[: source.numel()]
    whole, rest = divmod(count // 2, source.numel() * source.element_size())
    rest //= source.element_size()

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return copy


class WallClock:
    """Milliseconds on the CPU."""

    def cold(self) -> None:
        """Inputs are larger than the caches and were just written."""

    def start(self) -> None:
        self.marks = [time.perf_counter()]

    def split(self) -> None:
        self.marks.append(time.perf_counter())

    def read_ms(self) -> list[float]:
        return [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False)]


class CudaClock:
    """Milliseconds on the device between points of its stream."""

    def __init__(self, device: torch.device):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def cold(self) -> None:
        self.flush.zero_()

    def start(self) -> None:
        self.events = []
        self.split()

    def split(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def read_ms(self) -> list[float]:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.events, self.events[1:], strict=False)]


def peak_extra_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at once during `work` beyond what was there before it; gradients it leaves count.

    On CUDA from the caching allocator. On the CPU from the profiler's allocation events, which see every tensor and
    scratch buffer that torch or an operator of ours allocates (not what a BLAS library keeps for itself).
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile_of_allocations() as profile:
        work()
    return peak_of(profile)


def profile_of_allocations() -> torch.profiler.profile:
    """For `peak_of`. Nothing is kept of earlier gradients: taking it again is no event."""
    release_kept_gradients()
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def peak_of(profile: torch.profiler.profile) -> int:
    """Largest running sum of the allocations and releases that a profile has seen."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def release_kept_gradients() -> None:
    """The memory that `impl="cpu"` would hand out again."""
    if available_impls()["cpu"] == "available":
        torch.ops.igrpo.cpu_keep_at_most(0)


def release(problem: Problem) -> None:
    """Drops what the last turn left, so that the next provider finds the memory it would have alone."""
    problem.leaf = None
    if problem.weight is not None:
        problem.weight.grad = None
    release_kept_gradients()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()


def significant(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")
