"""Options, the fixture that measures a case, and what is said and written at the end.

pytest benchmarks/                  measure and print
pytest benchmarks/ --guard          and fail where we lost against this kind of machine's record (`make bench`)
pytest benchmarks/ --record         and make this run the record (`make bench ARGS=--record`)
pytest benchmarks/ --output FILE    and write it there instead
pytest benchmarks/ --toy            tiny shapes: everything runs, no figure means anything
pytest benchmarks/ -k "linear and token"        some of it
"""

import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import records, report, tables
from benchmarks.measure import Comparison
from benchmarks.problems import make_problem
from benchmarks.provider import Provider, interpreted
from benchmarks.shapes import Shape, cases_of

ROUNDS = (5, 40)
RETRIES = 2
"""A loss is measured again: a real one stays, a burst of other work on the machine passes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("igrpo benchmarks")
    group.addoption("--guard", action="store_true", help="fail where we lost against the committed record")
    group.addoption("--record", action="store_true", help="make this run the record of this kind of machine")
    group.addoption("--output", type=Path, help="write the run as a record to this file")
    group.addoption("--toy", action="store_true", help="tiny shapes, to see that everything runs")
    group.addoption("--seconds", type=float, default=None, help="clock time per case (2 on CUDA, 4 on a CPU)")
    group.addoption("--quick", action="store_true", help="nothing that torch.compile has to compile, but Liger")
    group.addoption("--minutes", type=float, default=None, help="begin no case after so many minutes")


class Session:
    """What the run has found so far."""

    def __init__(self, config: pytest.Config):
        self.toy, self.guard = config.getoption("--toy"), config.getoption("--guard")
        self.quick = config.getoption("--quick")
        self.output, self.recording = config.getoption("--output"), config.getoption("--record")
        self.device = torch.device("cuda" if torch.cuda.is_available() and not self.toy else "cpu")
        self.kind = "toy" if self.toy else self.device.type
        self.seconds = config.getoption("--seconds") or {"toy": 0.0, "cuda": 2.0, "cpu": 4.0}[self.kind]
        self.environment = records.environment(records.command_line()) | {"toy": self.toy}
        self.load = [os.getloadavg()[0]]
        self.started = time.perf_counter()
        path = records.path_of(self.environment)
        self.reference = records.load(path) if path.is_file() and not self.toy else None
        self.rows: list[dict] = []

    def record(self) -> dict:
        load = {"load_average": [round(x, 1) for x in (*self.load, os.getloadavg()[0])]}
        return self.environment | load | {"seconds": round(time.perf_counter() - self.started), "rows": self.rows}

    def write(self) -> Path | None:
        """Where the run so far was written: --output, or with --record this kind of machine's record."""
        if self.output is not None:
            records.save(self.record(), self.output)
        elif self.recording:
            records.save(records.merge(self.reference, self.record()), records.path_of(self.environment))
        return self.output or (records.path_of(self.environment) if self.recording else None)

    def losses(self, rows: list[dict]) -> dict:
        if not (self.guard and self.reference):
            return {}
        allowance = records.ALLOWANCE[self.device.type]
        return records.losses(records.changes(rows, self.reference["rows"], allowance))


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--toy") and config.getoption("--record"):
        raise pytest.UsageError("--toy --record: toy figures are no record; leave one of them out")
    config.option.benchmark_quiet = True  # its table has one line per case; ours has one per provider
    config.stash[SESSION] = Session(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case_of("op")` on a test: one case per (shape, variant) of this kind of machine."""
    marker = metafunc.definition.get_closest_marker("case")
    if marker:
        cases = cases_of(metafunc.config.stash[SESSION].kind)[marker.args[0]]
        names = [f"{s.name}-{s.tokens}x{s.V}x{s.H}-{s.dtype_name}-{v.replace(' ', '_')}" for s, v in cases]
        metafunc.parametrize(("shape", "variant"), cases, ids=names)


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    session, limit = request.config.stash[SESSION], request.config.getoption("--minutes")
    if limit is not None and time.perf_counter() - session.started > 60 * limit:
        pytest.skip(f"out of time (--minutes {limit})")
    return session


@pytest.fixture
def compare(session: Session, benchmark):
    """compare(op, shape, variant, passes, providers): the case, its rows kept, and failed where we lost."""

    def run(op: str, shape: Shape, variant: str, passes: tuple[str, ...], providers: tuple[Provider, ...]) -> None:
        problem = make_problem(op, shape, variant, session.device)
        able = [c for c in providers if c.computes(op, variant) and runs_here(c, session)
                    and not compiles_too_long(c, session, op, shape, variant)]  # fmt: skip
        comparison = Comparison(problem, able, passes)
        comparison.prepare()
        seconds = timed(comparison.round)  # the warm-up, and how long a round takes
        if session.kind != "toy":
            comparison.round()
        comparison.discard()
        rounds = 1 if session.kind == "toy" else max(ROUNDS[0], min(ROUNDS[1], round(session.seconds / seconds)))
        benchmark.group = f"{op}, {variant}, {shape.name} {shape.tokens}x{shape.V} {shape.dtype_name}"
        benchmark.pedantic(comparison.round, rounds=rounds)
        rows = comparison.rows()
        for _ in range(RETRIES):
            if not session.losses(rows):
                break
            comparison.discard()
            for _ in range(rounds):
                comparison.round()
            rows = comparison.rows()
        finish(session, benchmark, rows)

    return run


@pytest.fixture
def record_rows(session: Session):
    """record_rows(benchmark, rows): keeps rows that were measured without `compare`."""
    return lambda benchmark, rows: finish(session, benchmark, rows)


@pytest.fixture
def ours_here(session: Session):
    return lambda provider: runs_here(provider, session)


def runs_here(provider: Provider, session: Session) -> bool:
    """Our implementations for another kind of machine are no news; one that is missing here is, like a peer."""
    if provider.impl in ("cuda", "triton"):
        return session.device.type == "cuda" or (interpreted() and provider.impl == "triton")
    return provider.impl != "cpu" or session.device.type == "cpu"


def compiles_too_long(provider: Provider, session: Session, op: str, shape: Shape, variant: str) -> bool:
    """Where compiling takes longer than the whole case: beyond the first shape on CUDA, where Liger stays in, being
    what many trainers use; on a CPU in all but the plain cases of the fused linear."""
    if not provider.compiled or session.kind == "toy":
        return False
    first = shape == cases_of(session.kind)[op][0][0]
    if session.kind == "cuda":
        return (session.quick or not first) and provider.impl != "liger"
    return op.startswith("linear") and not (first and variant in ("token", "logps"))


def finish(session: Session, benchmark, rows: list[dict]) -> None:
    session.rows += rows
    session.write()  # after every case: whatever ends this process later, these figures stay
    benchmark.extra_info["rows"] = [{k: v for k, v in row.items() if k != "samples_ms"} for row in rows]
    lost = session.losses(rows)
    if lost:
        lines = [f"{key[1]} lost: " + "; ".join(map(str, group)) for key, group in lost.items()]
        pytest.fail("slower than the record, beyond noise\n" + "\n".join(lines), pytrace=False)


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return max(time.perf_counter() - start, 1e-6)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if not session.rows:
        return
    for line in tables.terminal(session.record(), session.reference if session.guard else None):
        terminalreporter.write_line(line)
    output = session.write()
    if output is not None:
        terminalreporter.write_line(f"\nwrote {output}")
        if session.recording and records.RESULTS == records.COMMITTED:
            report.main([])
    elif session.guard and session.reference is None:
        terminalreporter.write_line(
            f"\nno record of this kind of machine ({records.kind_of(session.environment)}): nothing was compared; "
            "make bench ARGS=--record makes this one the first"
        )
