"""Which tests are slow, which apply here, and at the end of a run what did not run and why.

`slow_tests.json` has the measured seconds of every test function (all its parameters together) and of every fixture
that takes more than SLOW_SECONDS. Those functions, all tests that use such a fixture, and those of the files in
STARTS_PROGRAMS carry the mark `slow`, as do tests that were marked by hand. `make test ARGS=--measure` writes the file
anew for what ran. Where pytest-xdist runs the tests in several processes, each collects all of them and what it counted
comes back when it ends; files that took longest come first.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {path.parent for path in (ROOT / "tests").glob("*/__init__.py") if path.parent.name != "support"}
"""Each is a mark of its tests, so that ``-m "rewards or data"`` can choose them."""
RECORD = Path(__file__).with_name("slow_tests.json")
SLOW_SECONDS = 2.0
# Each of their tests starts trainers, servers or an installation of its own: slow, measured or not.
STARTS_PROGRAMS = (
    "tests/test_train.py", "engines/test_servers.py", "engines/test_url_servers.py", "test_setup_env.py")  # fmt: skip
TOGETHER = "quick tests together"
test_seconds: dict[str, float] = {}
fixture_seconds: Counter[str] = Counter()
names_there: Counter[str] = Counter()
missing_packages: Counter[str] = Counter()
left_out: Counter[str] = Counter()
COUNTS = {"fixtures": fixture_seconds, "names": names_there, "missing": missing_packages, "left": left_out}
"""What a process of pytest-xdist sends to the one that writes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measure", action="store_true", help="write tests/slow_tests.json for the tests that run")


def pytest_configure(config: pytest.Config) -> None:
    for room in sorted(ROOMS):
        config.addinivalue_line("markers", f"{room.name}: is in tests/{room.name}")
    if hasattr(config, "workerinput"):  # a pytest that a test starts is no part of this run: benchmarks measure there
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
            os.environ.pop(name, None)


def record() -> dict[str, float]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def function_of(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def fixture_name(definition: pytest.FixtureDef) -> str:
    """As a test function's: the file that has it, and its name."""
    return f"{getattr(definition.func, '__module__', '').replace('.', '/')}.py::{definition.argname}"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow, files = set(record()), Counter()
    for name, seconds in record().items():
        files[name.partition("::")[0]] += seconds
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -files[item.nodeid.partition("::")[0]])
    kept, left = [], []
    for item in items:
        for folder in item.path.parents:
            if folder in ROOMS:
                item.add_marker(folder.name)
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        names = {function_of(item.nodeid), *(fixture_name(definitions[-1]) for definitions in fixtures)}
        names_there.update(names)
        if item.path.as_posix().endswith(STARTS_PROGRAMS) or not names.isdisjoint(slow):
            item.add_marker("slow")
        (kept if applies(item) else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def applies(item: pytest.Item) -> bool:
    """A test that can never run here is not there: a skip is for what somebody should mend."""
    for mark in item.iter_markers("applies"):
        condition = mark.args[0]
        if not (condition(item.callspec.params) if callable(condition) else condition):
            return False
    for mark in item.iter_markers("needs_package"):
        if importlib.util.find_spec(mark.args[0]) is None:
            missing_packages[mark.args[0]] += 1
            return False
    return True


def pytest_deselected(items: list[pytest.Item]) -> None:
    left_out["slow"] += sum("slow" in item.keywords for item in items)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef):
    start = time.perf_counter()
    try:
        return (yield)
    finally:
        name = fixture_name(fixturedef)
        fixture_seconds[name] = max(fixture_seconds.get(name, 0.0), time.perf_counter() - start)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        name = function_of(report.nodeid)
        test_seconds[name] = test_seconds.get(name, 0.0) + report.duration


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    for name, counted in getattr(node, "workeroutput", {}).get("counts", {}).items():
        COUNTS[name] |= Counter(counted)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = {name: dict(counted) for name, counted in COUNTS.items()}
    elif session.config.getoption("--measure"):
        write_record(session)


def write_record(session: pytest.Session) -> None:
    before, measured = record(), fixture_seconds | test_seconds
    slow = {name: round(seconds, 1) for name, seconds in measured.items() if seconds > SLOW_SECONDS}
    after = {name: seconds for name, seconds in before.items() if name not in measured} | slow
    whole = session.config.args == [str(ROOT / "tests")] or session.config.args == ["tests"]
    # What lies elsewhere, or was renamed or taken away, goes.
    there = names_there.__contains__ if whole else lambda name: (ROOT / name.partition("::")[0]).is_file()
    after = {name: seconds for name, seconds in after.items() if there(name)}
    together = sum(seconds for name, seconds in test_seconds.items() if name not in after)
    after[TOGETHER] = round(together, 1) if whole else before.get(TOGETHER, 0.0)
    RECORD.write_text(json.dumps(dict(sorted(after.items())), indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line on what did not run, and one on tests that have become slow."""
    skipped = terminalreporter.stats.get("skipped", [])
    # A file that skips as a whole has no keywords.
    others = [report for report in skipped if "gpu" not in getattr(report, "keywords", ())]
    if skipped or missing_packages:
        words = [f"{len(skipped) - len(others)} skipped tests need a GPU, {len(others)} need something else"]
        # Not in requirements/, each for its reason: CONTRIBUTING.md.
        words += [f"{count} were left out without {package}" for package, count in missing_packages.items()]
        terminalreporter.write_line("; ".join(words))
    if left_out["slow"]:
        terminalreporter.write_line(f"{left_out['slow']} slow tests were left out")
    for report in others:
        terminalreporter.write_line(f"  {report.nodeid}: {report.longrepr[2]}")
    known = record()
    grown = sorted(name for name, seconds in test_seconds.items() if seconds > 2 * SLOW_SECONDS and name not in known)
    if grown and not terminalreporter.config.getoption("--measure"):
        terminalreporter.write_line(f"slow, and not marked so (make test ARGS=--measure): {', '.join(grown)}")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs to mount a file system: root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(autouse=True)
def root_logger_as_before():
    """TRL's and accelerate's trainers raise its level, and a later test would miss its warnings."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a tiny random model."""
    from tests.support.tiny import save_tiny  # torch, which most tests of settings and pages do without

    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
