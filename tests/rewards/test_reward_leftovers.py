"""Nothing of a reward call is left after it: no process, no memory, no spoilt worker, no raw text."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import psutil
import pytest

import igrpo.rewards.workers.pool
import igrpo.rewards.workers.process
from igrpo.rewards.workers.pool import RewardPool
from igrpo.rewards.workers.process import worker_environment
from igrpo.rewards.workers.tally import RewardError, check_tallies
from tests.rewards.test_reward_pool import PROBLEM, bad, completion, scores

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mark(monkeypatch) -> str:
    """A variable that the workers of this test, and all that they start, have in their environment."""
    monkeypatch.setenv("TEST_MARK", mark := uuid.uuid4().hex)
    return mark


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_MARK") == mark and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:  # it has ended, or is a zombie
            continue
    return found


def run(names: tuple[str, ...], texts: list[str], **settings) -> tuple[dict[str, list[float | None]], RewardPool]:
    pool = RewardPool(bad(*names), **{"timeout": 3.0, "on_error": -1.0, **settings})
    rows = scores(pool, texts)
    return {name: [row[name] for row in rows] for name in names}, pool


# --- processes


def test_no_process_outlives_the_call_that_started_it(mark):
    alive = ("starts_processes", "forks_and_returns")
    dying = ("starts_processes_and_hangs", "starts_processes_and_dies", "pauses", "kills_its_parent")
    values, pool = run((*alive, *dying), ["good", "bad", "fine!"], num_workers=2)
    with pool:
        assert values == {name: [4.0, -1.0 if name in dying else 3.0, 5.0] for name in (*alive, *dying)}
        assert len(marked(mark)) <= 4  # a keeper and a worker, twice
        for _ in range(3):
            assert scores(pool, ["good"]) == [dict.fromkeys((*alive, *dying), 4.0)]
        open_ended = pool.submit(PROBLEM, [completion("bad")], "q")
        time.sleep(0.5)
    assert not marked(mark), "closing ends the calls that run, and what they started"
    with pytest.raises(RuntimeError, match="closed"):
        open_ended.result()


def test_a_killed_trainer_leaves_no_process(mark, tmp_path):
    source = """
        from igrpo.rewards.workers.pool import RewardPool
        from igrpo.rewards.functions import RewardFunction
        from igrpo.data_types import Completion, Problem

        name = "starts_processes_and_hangs"
        pool = RewardPool([RewardFunction(name, f"tests.support.bad_rewards:{name}")], timeout=600.0)
        pool.submit(Problem(0, "q", "1"), [Completion((1,), (0.0,), "bad", "stop", 0)], "q").result()
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(source))
    script = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 30
    while len(marked(mark)) < 8 and time.monotonic() < deadline:  # script, keeper, worker and five more
        time.sleep(0.1)
    assert len(marked(mark)) >= 8
    script.kill()
    script.wait()
    deadline = time.monotonic() + 10
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not marked(mark)


# --- workers that are used up or spoilt


@pytest.mark.parametrize("name", ["leaks_files", "leaks_threads"])
def test_calls_that_leak_get_their_scores_for_ever(name):
    with RewardPool(bad(name), on_error=-1.0) as pool:
        assert all(scores(pool, ["good"]) == [{name: 4.0}] for _ in range(25))
        assert pool.stats()[f"rewards/{name}/errors"] == 0.0 and pool.replaced() > 2
        assert pool.replaced() == 0, "counted from the last reading"


SPOILING = ("lowers_its_limits", "spoils_its_module", "closes_its_output", "replaces_builtins", "recurses")


def test_a_worker_that_a_call_spoilt_costs_no_other_call_its_score():
    with RewardPool(bad(*SPOILING, "closes_everything", "odd_returns"), on_error=-1.0) as pool:
        for text in ("bad", "good", "fine!", "bad", "good"):
            values = scores(pool, [text])[0]
            lost = {"recurses", "closes_everything"} if text == "bad" else set()
            assert values == {name: -1.0 if name in lost else float(len(text)) for name in values}
        assert scores(pool, ["bad list", "good"])[1]["odd_returns"] == 4.0
        for text in ("bad endless", "bad huge", "bad lambda"):
            assert scores(pool, [text])[0]["odd_returns"] == -1.0
        assert scores(pool, ["good"])[0]["odd_returns"] == 4.0


def test_a_reply_that_is_none_costs_its_own_call_its_score():
    with RewardPool(bad("forges_replies"), on_error=-1.0) as pool:
        for text in ("bad", "bad deep", "bad short", "bad other"):
            assert scores(pool, [text]) == [{"forges_replies": -1.0}]
            assert scores(pool, ["good"]) == [{"forges_replies": 4.0}]


def test_a_call_finds_its_process_as_the_first_one_did():
    with RewardPool(bad("changes_its_process"), on_error=-1.0) as pool:
        assert scores(pool, ["a"]) + scores(pool, ["b"]) == [{"changes_its_process": 1.0}] * 2
        time.sleep(1.2)  # an alarm of the call before would ring now
        assert scores(pool, ["c"]) == [{"changes_its_process": 1.0}]
        assert pool.replaced() == 0, "put back, not replaced"


def test_a_function_that_always_fails_does_not_cost_a_worker_each_time():
    with RewardPool(bad("raises_controls", "worker_pid")) as pool:
        pids = {scores(pool, ["x"])[0]["worker_pid"] for _ in range(20)}
        assert len(pids) <= 6


def test_a_worker_is_replaced_after_so_many_calls(monkeypatch):
    monkeypatch.setattr(igrpo.rewards.workers.process, "CALLS", 5)
    with RewardPool(bad("worker_pid")) as pool:
        pids = [scores(pool, ["x"])[0]["worker_pid"] for _ in range(15)]
        assert [len(set(pids[i : i + 5])) for i in (0, 5, 10)] == [1, 1, 1] and len(set(pids)) == 3
        assert pool.replaced() == 0, "nothing was wrong"


# --- memory


def test_a_call_that_takes_too_much_memory_is_killed_and_what_it_held_is_free(mark):
    names = ("takes_memory", "takes_memory_in_a_child", "keeps_memory")
    values, pool = run(names, ["good", "bad"], timeout=30.0, memory_gib=0.25)
    with pool:
        assert values == {name: [4.0, 3.0 if name == "keeps_memory" else -1.0] for name in names}
        assert pool.stats()["rewards/takes_memory/timeouts"] == 0.0
        assert "reward_memory_gib" in pool.tallies()["takes_memory"].error
        assert sum(process.memory_info().rss for process in marked(mark)) < 200 * 2**20


def test_what_a_first_call_keeps_is_not_kept_for_ever_and_not_loaded_at_every_call(mark):
    with RewardPool(bad("hoards", "worker_pid"), timeout=30.0) as pool:
        rows = [scores(pool, ["good"])[0] for _ in range(6)]
        assert all(row["hoards"] == 4.0 for row in rows) and pool.replaced() == 1
        assert len({row["worker_pid"] for row in rows[1:]}) <= 2, "a model that is loaded late is kept the second time"


# --- text


def test_what_a_function_prints_is_cut_and_made_safe(caplog):
    with (
        caplog.at_level(logging.INFO, "igrpo.rewards.workers.pool"),
        RewardPool(bad("prints", "raises_controls")) as pool,
    ):
        assert scores(pool, ["bad"])[0]["prints"] == 3.0
        printed = [r.getMessage() for r in caplog.records if "printed" in r.getMessage()]
        (failed,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert 2 <= len(printed) < 30 and sum(map(len, printed)) < 8000 and "bytes more" in printed[-1]
    assert all(line.startswith("prints printed: ") and line.isprintable() for line in printed)
    caplog.clear()
    with caplog.at_level(logging.INFO, "igrpo.rewards.workers.pool"), RewardPool(bad("prints_little")) as pool:
        for _ in range(1000):
            scores(pool, ["good"])
        assert 20 < len(caplog.records) <= 2 * igrpo.rewards.workers.pool.PRINTED_A_MINUTE + 2
    assert failed.isprintable() and len(failed) < 1500 and r"\x1b]0;title\x07\rstep 9/9\n\u202e\ud800" in failed
    assert "bad_rewards.py:" in failed and "raise ValueError" in failed, "the user's own line is not cut off"


# --- keys


def test_keys_stay_with_the_trainer_unless_they_are_named(monkeypatch):
    keys = ("IGRPO_SERVER_SECRET", "OPENAI_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "PGPASSWORD", "MY_JUDGE")
    for name in (*keys, "TOKENIZERS_PARALLELISM", "NOT_A_MONKEY_BUSINESS"):
        monkeypatch.setenv(name, "value")
    environment, kept = worker_environment(["HF_TOKEN"], ["MY_JUDGE"])
    assert set(kept) >= {*keys} - {"HF_TOKEN"}
    text = f"{' '.join(keys)} TOKENIZERS_PARALLELISM NOT_A_MONKEY_BUSINESS PATH"
    with RewardPool(bad("variables"), environment=environment) as pool:
        assert scores(pool, [text]) == [{"variables": 4.0}]
    with RewardPool(bad("variables")) as pool:
        assert scores(pool, [text]) == [{"variables": 3.0 + 1.0}], "without names: MY_JUDGE looks like nothing secret"


# --- failures of everything


def test_a_function_that_fails_on_everything_is_found():
    with RewardPool(bad("raises_controls", "raises")) as pool:
        scores(pool, ["good", "bad"])
        assert pool.failing()
        tallies = pool.tallies()
        assert (tallies["raises"].scored, tallies["raises"].failed) == (1, 1)
        with pytest.raises(RewardError, match="raises_controls failed on all 4 completions of step 3: ValueError"):
            check_tallies([tallies, tallies], "step 3")
        assert not pool.failing()
        del tallies["raises_controls"]
        check_tallies([tallies], "step 3")
        check_tallies([pool.tallies()], "an empty step")
