"""Every call has a completion length that was never seen before, as in RL: what compilation costs.

The time is the mean over the lengths, compilation included, caches on disk switched off. Correctness is checked in the
contests of one length.
"""

import gc
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._inductor.config

from benchmarks import contenders_linear, contenders_logits
from benchmarks.contender import Contender
from benchmarks.measure import Contest, release, significant
from benchmarks.problems import make_problem
from benchmarks.shapes import contests

NEW_LENGTHS = 6
SKIPPED = ("cce, its torch_compile", "liger, in place", "cuda, in place", "triton, in place", "cpu, in place")


def contenders_of(module) -> list[Contender]:
    """Those of the plain loss; torch.compile with its defaults, which make lengths symbolic once they change."""
    op = module.LOSS
    found = [c for c in module.OURS + module.RIVALS if c.enters(op, "token") and c.name not in SKIPPED]
    by_default = partial(module.eager, True, None)
    return [replace(c, build=by_default) if c.impl == "compile" else c for c in found]


@pytest.mark.parametrize("module", [contenders_logits, contenders_linear], ids=lambda m: m.LOSS)
def bench_new_lengths(session, record_rows, ours_here, module, monkeypatch, tmp_path, benchmark):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    shape = contests(session.kind)[module.LOSS][0][0]
    entering = [c for c in contenders_of(module) if ours_here(c)]
    count = 2 if session.kind == "toy" else NEW_LENGTHS
    lengths = [shape.T + 1 + i for i in range(count)] if session.kind == "toy" else [
        round(shape.T * (0.55 + 0.07 * i)) + i for i in range(count)
    ]  # fmt: skip
    with torch._inductor.config.patch(force_disable_caches=True):
        sweep = Sweep(module.LOSS, shape, entering, session.device)
    benchmark.group = f"{module.LOSS}, new lengths"
    with torch._inductor.config.patch(force_disable_caches=True):
        benchmark.pedantic(lambda: [sweep.at(length) for length in lengths], rounds=1)
    record_rows(benchmark, sweep.rows(lengths))


class Sweep:
    """The same contenders, their compiled state kept, on one length after the other."""

    def __init__(self, op, shape, contenders, device):
        self.op, self.shape, self.device = op, shape, device
        problem = make_problem(op, shape, "token", device)
        contest = Contest(problem, contenders, ("fwd", "bwd", "fwd+bwd"))
        for entrant in contest.entrants:  # imports, first compilation
            entrant.note = entrant.contender.missing(device) or ""
            if not entrant.note:
                contest.guarded(entrant, lambda e=entrant: self._build(contest, e))
        self.entrants = contest.entrants

    def _build(self, contest, entrant):
        entrant.forward = entrant.contender.build()
        contest.problem.old = contest.problem.clock_old
        contest.problem.begin(entrant.contender.extra_row)
        contest.problem.backward(entrant.forward(contest.problem))

    def at(self, length: int) -> None:
        problem = make_problem(self.op, replace(self.shape, T=length), "token", self.device)
        problem.old = problem.clock_old
        contest = Contest(problem, [], ("fwd", "bwd", "fwd+bwd"))
        for entrant in self.entrants:
            if not entrant.note:
                contest.guarded(entrant, lambda e=entrant: contest.timed_turn(e))
        release(problem)
        gc.collect()

    def rows(self, lengths: list[int]) -> list[dict]:
        shape, tokens = self.shape, round(self.shape.B * statistics.fmean(lengths))
        return [
            {
                "op": self.op, "pass": "fwd+bwd", "impl": e.contender.impl, "contender": e.contender.name,
                "shape": shape.name, "tokens": tokens, "vocab": shape.V,
                "hidden": shape.H if self.op.startswith("linear") else None, "dtype": shape.dtype_name,
                "variant": "new lengths",
                "time_ms": significant(statistics.fmean(e.samples_ms["fwd+bwd"])) if not e.note else None,
                "floor_ms": None, "peak_extra_bytes": None, "max_rel_error": None, "note": e.note,
                "samples_ms": [significant(x) for x in e.samples_ms["fwd+bwd"]],
            }
            for e in self.entrants
        ]  # fmt: skip
