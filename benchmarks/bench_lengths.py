"""Every call has a completion length that was never seen before, as in RL: what compilation costs.

The time is the mean over the lengths, compilation included, caches on disk switched off. Correctness is checked in the
cases of one length.
"""

import gc
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._inductor.config

from benchmarks import providers_linear, providers_logits
from benchmarks.measure import Comparison, release, significant
from benchmarks.problems import make_problem
from benchmarks.provider import Provider
from benchmarks.shapes import cases_of

NEW_LENGTHS = 6
SKIPPED = ("cce, its torch_compile", "liger, in place", "cuda, in place", "triton, in place", "cpu, in place")


def providers_of(module) -> list[Provider]:
    """Those of the plain loss; torch.compile with its defaults, which make lengths symbolic once they change."""
    op = module.LOSS
    found = [c for c in module.OURS + module.RIVALS if c.computes(op, "token") and c.name not in SKIPPED]
    by_default = partial(module.eager, True, None)
    return [replace(c, build=by_default) if c.impl == "compile" else c for c in found]


@pytest.mark.parametrize("module", [providers_logits, providers_linear], ids=lambda m: m.LOSS)
def bench_new_lengths(session, record_rows, ours_here, module, monkeypatch, tmp_path, benchmark):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    shape = cases_of(session.kind)[module.LOSS][0][0]
    able = [c for c in providers_of(module) if ours_here(c)]
    count = 2 if session.kind == "toy" else NEW_LENGTHS
    lengths = [shape.T + 1 + i for i in range(count)] if session.kind == "toy" else [
        round(shape.T * (0.55 + 0.07 * i)) + i for i in range(count)
    ]  # fmt: skip
    with torch._inductor.config.patch(force_disable_caches=True):
        sweep = Sweep(module.LOSS, shape, able, session.device)
    benchmark.group = f"{module.LOSS}, new lengths"
    with torch._inductor.config.patch(force_disable_caches=True):
        benchmark.pedantic(lambda: [sweep.at(length) for length in lengths], rounds=1)
    record_rows(benchmark, sweep.rows(lengths))


class Sweep:
    """The same providers, their compiled state kept, on one length after the other."""

    def __init__(self, op, shape, providers, device):
        self.op, self.shape, self.device = op, shape, device
        problem = make_problem(op, shape, "token", device)
        comparison = Comparison(problem, providers, ("fwd", "bwd", "fwd+bwd"))
        for measurement in comparison.measurements:  # imports, first compilation
            measurement.note = measurement.provider.missing(device) or ""
            if not measurement.note:
                comparison.guarded(measurement, lambda e=measurement: self._build(comparison, e))
        self.measurements = comparison.measurements

    def _build(self, comparison, measurement):
        measurement.forward = measurement.provider.build()
        comparison.problem.old = comparison.problem.clock_old
        comparison.problem.begin(measurement.provider.extra_row)
        comparison.problem.backward(measurement.forward(comparison.problem))

    def at(self, length: int) -> None:
        problem = make_problem(self.op, replace(self.shape, T=length), "token", self.device)
        problem.old = problem.clock_old
        comparison = Comparison(problem, [], ("fwd", "bwd", "fwd+bwd"))
        for measurement in self.measurements:
            if not measurement.note:
                comparison.guarded(measurement, lambda e=measurement: comparison.timed_turn(e))
        release(problem)
        gc.collect()

    def rows(self, lengths: list[int]) -> list[dict]:
        shape, tokens = self.shape, round(self.shape.B * statistics.fmean(lengths))
        return [
            {
                "op": self.op, "pass": "fwd+bwd", "impl": e.provider.impl, "provider": e.provider.name,
                "shape": shape.name, "tokens": tokens, "vocab": shape.V,
                "hidden": shape.H if self.op.startswith("linear") else None, "dtype": shape.dtype_name,
                "variant": "new lengths",
                "time_ms": significant(statistics.fmean(e.samples_ms["fwd+bwd"])) if not e.note else None,
                "floor_ms": None, "peak_extra_bytes": None, "max_rel_error": None, "note": e.note,
                "samples_ms": [significant(x) for x in e.samples_ms["fwd+bwd"]],
            }
            for e in self.measurements
        ]  # fmt: skip
