"""Reward functions that raise, hang, exit or crash cost their own completion its score and nothing else."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import igrpo.rewards.workers.pool
from igrpo.data_types import Completion, Problem
from igrpo.rewards.functions import RewardFunction, load_reward_functions
from igrpo.rewards.workers.pool import RewardPool

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = Problem(3, "2 + 2?", "4")


def bad(*names: str) -> list[RewardFunction]:
    return [RewardFunction(name, f"tests.support.bad_rewards:{name}") for name in names]


def completion(text: str, ids: tuple[int, ...] = (1,)) -> Completion:
    return Completion(ids, (-0.5,) * len(ids), text, "stop", 0)


def scores(pool: RewardPool, texts: list[str], problem: Problem = PROBLEM) -> list[dict[str, float | None]]:
    return [scored.rewards for scored in pool.submit(problem, list(map(completion, texts)), problem.prompt).result()]


@pytest.fixture(scope="module")
def builtin_pool():
    with RewardPool(load_reward_functions(["accuracy", "format"]), weights=[1.0, 0.5]) as pool:
        yield pool


# --- the ordinary case


def test_the_first_scores_come_soon():
    started = time.monotonic()
    with RewardPool(load_reward_functions(["accuracy", "format"])) as pool:
        assert scores(pool, [r"\boxed{4}"]) == [{"accuracy": 1.0, "format": 0.0}]
    assert time.monotonic() - started < 5.0


def test_weighted_sum_in_the_order_of_the_completions(builtin_pool):
    completions = [completion(text) for text in ("5", "<think>2+2</think><answer>4</answer>", r"\boxed{4}")]
    pending = builtin_pool.submit(PROBLEM, completions, "2 + 2?")
    scored = pending.result()
    assert pending.done()
    assert [s.reward for s in scored] == [0.0, 1.5, 1.0]
    assert [s.completion for s in scored] == completions
    assert scored[1].rewards == {"accuracy": 1.0, "format": 1.0}
    assert pending.result() == scored


def test_many_submissions_at_once(builtin_pool):
    problems = [Problem(i, "q", str(i)) for i in range(40)]
    pending = [builtin_pool.submit(p, [completion("7"), completion(p.solution)], "q") for p in problems]
    for i, one in enumerate(pending):
        assert [s.rewards["accuracy"] for s in one.result()] == [float(i == 7), 1.0]


def test_calls_run_while_nobody_asks(builtin_pool):
    pending = [builtin_pool.submit(PROBLEM, [completion("4")], "q") for _ in range(20)]
    deadline = time.monotonic() + 20
    while any(call.outcome is None for one in pending for call in one._open) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert all(one.done() for one in pending)


def test_nothing_to_score(builtin_pool):
    assert builtin_pool.submit(PROBLEM, [], "q").result() == ()


def test_none_contributes_nothing(builtin_pool):
    formatted = completion("<think></think><answer></answer>")
    (scored,) = builtin_pool.submit(Problem(0, "q", " "), [formatted], "q").result()
    assert scored.rewards == {"accuracy": None, "format": 1.0}
    assert scored.reward == 0.5


def test_functions_are_called_as_trl_calls_them():
    problem = Problem(0, ({"role": "user", "content": "2 + 2?"},), "4", {"level": 7, "source": "made up"})
    completions = [completion("a", (1,)), completion("bc", (2, 3))]
    with RewardPool(bad("seen", "names_few_arguments")) as pool:
        scored = pool.submit(problem, completions, problem.prompt).result()
    assert [s.rewards for s in scored] == [{"seen": 1.0, "names_few_arguments": 7.0}] * 2


# --- misbehaviour

NAMES = ("length", "raises", "raises_unpicklable", "exits", "kills_itself", "segfaults", "short_list", "odd_scores",
         "none_instead_of_list", "numpy_scores", "awaited", "ignores_interrupt", "exits_with_zero")  # fmt: skip
HANGING = ("sleeps", "holds_the_lock")


@pytest.fixture(scope="module")
def carnage():
    """All functions in one pool on three completions: (scores per function, counts)."""
    with RewardPool(bad(*NAMES, *HANGING), num_workers=2, timeout=2.0, on_error=-1.0) as pool:
        rows = scores(pool, ["good", "bad", "fine!"])
        return {name: [row[name] for row in rows] for name in NAMES + HANGING}, pool.stats()


@pytest.mark.parametrize(
    "name", ["raises", "raises_unpicklable", "exits", "kills_itself", "segfaults", "exits_with_zero", *HANGING]
)
def test_only_the_guilty_completion_loses_its_score(carnage, name):
    values, counts = carnage
    assert values[name] == [4.0, -1.0, 5.0]
    hung = name in HANGING
    assert (counts[f"rewards/{name}/errors"], counts[f"rewards/{name}/timeouts"]) == (float(not hung), float(hung))


@pytest.mark.parametrize("name", ["length", "numpy_scores", "awaited", "ignores_interrupt"])
def test_well_behaved_functions_do_not_notice(carnage, name):
    values, counts = carnage
    assert values[name] == [4.0, 3.0, 5.0]
    assert counts[f"rewards/{name}/errors"] == counts[f"rewards/{name}/timeouts"] == 0.0


@pytest.mark.parametrize("name", ["short_list", "none_instead_of_list"])
def test_a_result_of_the_wrong_shape_is_an_error(carnage, name):
    values, counts = carnage
    assert values[name] == [-1.0] * 3
    assert counts[f"rewards/{name}/errors"] == 3.0


def test_scores_that_are_no_numbers_are_errors_where_they_stand():
    with RewardPool(bad("odd_scores"), on_error=-1.0) as pool:
        rows = scores(pool, ["nan", "inf", "text", "none", "true", "int", "else"])
        assert [row["odd_scores"] for row in rows] == [-1.0, -1.0, -1.0, None, 1.0, 3.0, 0.5]
        assert pool.stats() == {"rewards/odd_scores/errors": 3.0, "rewards/odd_scores/timeouts": 0.0}
        assert pool.stats()["rewards/odd_scores/errors"] == 0.0, "stats start again after each reading"


def test_none_as_error_value_leaves_the_function_out():
    with RewardPool(bad("raises", "length"), weights=[1.0, 2.0], on_error=None) as pool:
        scored = pool.submit(PROBLEM, [completion("good"), completion("bad")], "q").result()
    assert [s.rewards["raises"] for s in scored] == [4.0, None]
    assert [s.reward for s in scored] == [12.0, 6.0]


def test_a_message_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING, "igrpo.rewards.workers.pool"), RewardPool(bad("raises")) as pool:
        for _ in range(3):
            scores(pool, ["bad"])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "raises failed" in record.message
    assert "KeyError: 'no such thing' (bad_rewards.py:" in record.message


def test_a_worker_that_dies_while_idle_is_replaced():
    with RewardPool(bad("dies_later"), timeout=20.0, on_error=-1.0) as pool:
        for _ in range(3):
            assert scores(pool, ["bad", "good"]) == [{"dies_later": 3.0}, {"dies_later": 4.0}]
            time.sleep(0.5)
        pending = [pool.submit(PROBLEM, [completion("good")] * 3, "q") for _ in range(20)]
        assert all(s.reward == 4.0 for one in pending for s in one.result())
        assert pool.stats()["rewards/dies_later/errors"] == 0.0


def test_a_worker_killed_in_the_middle_of_a_call_costs_no_score():
    """As by an operator or by the kernel out of memory: the completion that it was scoring is not at fault."""
    with RewardPool(bad("takes_its_time"), timeout=20.0, on_error=-1.0) as pool:
        pid = int(scores(pool, ["pid"])[0]["takes_its_time"])
        for texts in (["good"], ["good", "fine!"]):
            pending = pool.submit(PROBLEM, list(map(completion, texts)), "q")
            time.sleep(0.3)
            os.kill(pid, signal.SIGKILL)
            assert [s.reward for s in pending.result()] == [float(len(text)) for text in texts]
            (pid,) = (int(s["takes_its_time"]) for s in scores(pool, ["pid"]))
        assert pool.stats() == {"rewards/takes_its_time/errors": 0.0, "rewards/takes_its_time/timeouts": 0.0}


def test_a_worker_that_stops_answering_is_replaced(monkeypatch):
    with RewardPool(bad("worker_pid"), timeout=1.0) as pool:
        (first,) = scores(pool, ["good"])
        os.kill(int(first["worker_pid"]), signal.SIGSTOP)
        monkeypatch.setattr(igrpo.rewards.workers.pool, "STALL_SECONDS", 4.0)
        (second,) = scores(pool, ["good"])
    assert second["worker_pid"] not in (first["worker_pid"], 0.0)


# --- workers


def test_workers_are_light_and_single_threaded():
    with RewardPool(bad("worker_modules", "worker_threads")) as pool:
        assert scores(pool, ["x"]) == [{"worker_modules": 0.0, "worker_threads": 2.0}]


def run_script(path: Path, source: str) -> subprocess.Popen:
    path.write_text(textwrap.dedent(source))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environment)


def test_workers_do_not_run_the_main_script_again(tmp_path):
    """A script without a main guard, as people write them."""
    script = run_script(
        tmp_path / "script.py",
        """
        print("main runs", flush=True)
        import pytest  # stands for everything heavy: worker_modules looks for it
        from igrpo.rewards.workers.pool import RewardPool
        from igrpo.rewards.functions import RewardFunction
        from igrpo.data_types import Completion, Problem

        pool = RewardPool([RewardFunction("m", "tests.support.bad_rewards:worker_modules")])
        print(pool.submit(Problem(0, "q", "1"), [Completion((1,), (0.0,), "x", "stop", 0)], "q").result()[0].reward)
        """,  # and it never closes the pool
    )
    output, _ = script.communicate(timeout=60)
    assert script.returncode == 0
    assert output.split("\n") == ["main runs", "0.0", ""]


def test_workers_die_with_the_main_program(tmp_path):
    script = run_script(
        tmp_path / "script.py",
        """
        from igrpo.rewards.workers.pool import RewardPool
        from igrpo.rewards.functions import RewardFunction
        from igrpo.data_types import Completion, Problem

        names = ("worker_pid", "sleeps")
        functions = [RewardFunction(name, f"tests.support.bad_rewards:{name}") for name in names]
        with RewardPool(functions[:1], timeout=600.0) as first, RewardPool(functions, timeout=600.0) as pool:
            problem, completion = Problem(0, "q", "1"), Completion((1,), (0.0,), "bad", "stop", 0)
            idle = int(first.submit(problem, [completion], "q").result()[0].reward)
            pending = pool.submit(problem, [completion], "q")
            while any(call.outcome is None for call in pending._open if call.function.name == "worker_pid"):
                pass
            pending.done()
            print(idle, int(pending._scores["worker_pid"][0]), flush=True)
            pending.result()
        """,
    )
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 2
    script.kill()
    script.wait()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_closing_stops_workers_and_refuses_work():
    pool = RewardPool(bad("worker_pid", "sleeps"), num_workers=2)
    (row,) = scores(pool, ["good"])
    pending = pool.submit(PROBLEM, [completion("bad")], "q")
    pool.close()
    pool.close()
    assert not is_running(int(row["worker_pid"]))
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(PROBLEM, [completion("good")], "q")
    with pytest.raises(RuntimeError, match="closed"):
        pending.result()


# --- mistakes of the caller


def test_a_column_that_cannot_travel_is_named(builtin_pool):
    problem = Problem(7, "q", "4", {"fine": 1, "checker": lambda x: x})
    with pytest.raises(ValueError, match=r"column 'checker' of row 7 cannot be sent to reward workers"):
        builtin_pool.submit(problem, [completion("4")], "q")
    assert scores(builtin_pool, ["4"])[0]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"functions": []}, "there must be one"),
        ({"functions": bad("length", "length")}, "distinct names"),
        ({"functions": bad("length"), "weights": [1.0, 2.0]}, "2 reward weights for 1 functions: length"),
        ({"functions": bad("length"), "num_workers": 0}, r"num_workers \(0\)"),
        ({"functions": bad("length"), "timeout": 0.0}, r"timeout \(0.0\)"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardPool(**arguments)


def test_a_function_that_cannot_be_imported_in_the_worker_is_an_error():
    with RewardPool([RewardFunction("gone", "tests.support.bad_rewards:gone")], on_error=-2.0) as pool:
        assert scores(pool, ["x"]) == [{"gone": -2.0}]
