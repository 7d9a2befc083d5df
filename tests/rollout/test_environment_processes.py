"""Environments whose trainer or host is killed, of which there are too many, or which say something else."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trl.chat_template_utils as templates

import igrpo.rollout.turns
from igrpo.data_types import Completion, Problem
from igrpo.engines import Request
from igrpo.engines.base import Sampling
from igrpo.environments.calculator import Calculator
from igrpo.environments.calls import ToolCall, read_calls
from igrpo.environments.host import Host
from igrpo.environments.sessions import EnvironmentFailed, Session
from igrpo.environments.setup import start_environment
from igrpo.environments.template import ToolTemplate
from igrpo.rewards.columns import check_columns
from igrpo.rewards.functions import load_reward_functions
from igrpo.rollout.prompts import PromptBuilder
from igrpo.rollout.turns import Turns
from igrpo.settings import ConfigError
from tests.rollout.test_turns import CASES, HERE, PROBLEMS, RESET, SCHEMA, ask, config, trls, with_template
from tests.support.environments import call
from tests.support.tiny import tiny_tokenizer

TRAINER = """
import os
from igrpo.environments.sessions import Environments
made = Environments("tests.support.environments:Hostile", (), 60.0, 2**34, 0, os.environ)
session = made.open()
for request in (("reset", {"prompt": ""}, "", ""), ("call", [("leave", {})]), ("call", [("sleep", {})])):
    made.ask(session, *request)
    while not session.answered:
        made.poll(0.05)
    print(session.take(), flush=True)
"""


def ends(pid: int) -> bool:
    """Soon."""
    deadline = time.monotonic() + 10
    with suppress(psutil.Error):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


def test_nothing_that_a_tool_started_outlives_a_killed_trainer_or_host():
    root = Path(__file__).resolve().parents[2]
    script = subprocess.Popen(
        [sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    script.stdout.readline()
    left = int(script.stdout.readline().split("'")[1])
    assert psutil.pid_exists(left)
    script.kill()
    script.communicate()
    assert ends(left)
    with start_environment(config(environment_factory=HERE + "Hostile")) as made:
        session = made.sessions.open()
        for request in (RESET, ("call", [("leave", {})])):
            made.sessions.ask(session, *request)
            while not session.answered:
                made.sessions.poll(0.05)
            said = session.take()
        made.sessions._host.kill()  # of this environment
        made.sessions._host.wait()
        assert ask(made, RESET)[0]["ok"]  # another host takes its place
        assert ends(int(said[0][0]))


KEEPS = """
import os, subprocess, time
from igrpo.machine import SET_CHILD_SUBREAPER, process_control
from igrpo.rewards.workers.worker import end_descendants
process_control(SET_CHILD_SUBREAPER, 1)
if not (kept := os.fork()):
    code = 0
    while not code and os.getppid() != 1 and not os.path.exists("/proc/self/never"):
        code = subprocess.run(["true"]).returncode
    os._exit(1)
if not os.fork():  # something to end
    time.sleep(60)
end = time.monotonic() + 2
while time.monotonic() < end:
    end_descendants([kept])
alive = os.waitpid(kept, os.WNOHANG)[0] == 0
end_descendants()
print(alive)
"""


def test_what_a_living_trajectory_starts_meanwhile_is_kept():
    made = subprocess.run([sys.executable, "-c", KEEPS], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert made.stdout == "True\n", made.stderr


def test_one_trajectory_alone_fails_where_there_is_no_room_for_its_process(monkeypatch):
    with start_environment(config(tools=[HERE + "double"])) as made:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            session = made.sessions.open()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        with pytest.raises(EnvironmentFailed, match="Too many open files"):
            session.take()
        assert ask(made, RESET) == [{"ok": None}]
        session = made.sessions.open()
        made.sessions.timeout = 500.0
        made.sessions.ask(session, *RESET)
        while not session.answered:
            made.sessions.poll(0.05)
        assert session.deadline > time.monotonic() + 400  # counted from when its process was there

        def full() -> int:
            raise BlockingIOError("no more processes")

        ours, theirs = socket.socketpair()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", full)
            Host(theirs, os.getppid())._begin(1, theirs, None, 0)
        session = Session(10**6, ours)
        made.sessions._channels[ours.fileno()] = session
        made.sessions._poll.register(ours)
        session.asked = "reset"
        while not session.answered:
            made.sessions.poll(0.05)
        with pytest.raises(EnvironmentFailed, match="reset: BlockingIOError: no more processes"):
            session.take()


@dataclass(eq=False)
class Call:
    problem: Problem


def wrote(text: str) -> Completion:
    ids = tiny_tokenizer().encode(text + "<|end|>", add_special_tokens=False)
    return Completion(tuple(ids), (0.0,) * len(ids), text, "stop", 0)


def played(setting, problem=PROBLEMS[0], texts=(), vocab_size=None):
    """The completions of one call whose first turns are these, and the most environments at once; then all say 7."""
    functions = load_reward_functions(setting.reward_funcs)
    with start_environment(setting) as made:
        prompts, most = PromptBuilder(tiny_tokenizer(), setting, 4000, vocab_size, made.schemas), 0
        turns = Turns(made, prompts, functions)
        one = Call(problem)
        turns.begin(one, [(Request("r", (2,), len(texts), Sampling(1.0, 2000)), [wrote(text) for text in texts])])
        for _ in range(2000):
            turns.poll(0.05)
            most = max(most, len(made.sessions._channels))
            if not turns.busy:  # the engine's part
                for _, request in turns.requests():
                    turns.go_on(request.request_id, wrote("7"))
            if whole := turns.completed():
                assert not turns._open and not turns._queue and not made.sessions._channels
                return whole[0][1], most
    raise AssertionError("it never ends")


def test_so_many_environments_at_once_and_the_others_wait(monkeypatch):
    monkeypatch.setattr(igrpo.rollout.turns, "MOST_SESSIONS", 2)
    texts = [call("double", f'{{"n": {n}}}') for n in range(5)]
    found, most = played(config(tools=[HERE + "double"]), texts=texts)
    assert most == 2
    assert [one.trajectory.messages[1]["content"] for one in found] == [str(2 * n) for n in range(5)]


def test_whose_fault_an_early_end_is():
    setting = config(environment_factory=HERE + "Hostile", reward_funcs=["environment"])
    (one,), _ = played(setting, texts=[call("add", '{"n": 3}')])  # the run began with another observation
    assert "something else" in one.trajectory.reward and one.trajectory.failures == 1
    (one,), _ = played(config(tools=[HERE + "double"]), texts=[call("double")], vocab_size=4)
    assert one.trajectory.failures == 1 and one.trajectory.reward == 0.0 and "does not know" in one.trajectory.ended


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"environment_factory": HERE + "SilentlyBroken"}, "row 0: reset: LookupError: no such level"),
        ({"environment_factory": HERE + "Hostile", "tools": [HERE + "add"]}, "tools: add is a method of environment"),
    ],
)
def test_what_no_run_begins_with(settings, message):
    with pytest.raises(ConfigError, match=message), start_environment(config(**settings)) as made:
        made.observed(PROBLEMS)


def test_a_reward_function_cannot_demand_what_get_reward_said():
    check_columns(load_reward_functions(["environment"]), PROBLEMS, has_environment=True)
    with pytest.raises(ConfigError, match="paid needs 'environment_rewards'"):  # not there where nobody called
        check_columns(load_reward_functions([HERE + "paid"]), PROBLEMS, has_environment=True)


def test_a_draft_without_its_answer_may_end_before_its_last_turn():
    tokenizer = tiny_tokenizer()
    prompts = PromptBuilder(tokenizer, config(draft_max_tokens=4, draft_hide_answer=True))
    parts = prompts.parts(PROBLEMS[0])
    draft = tokenizer.encode("abcdefgh \\boxed{7} and so on", add_special_tokens=False)
    made, _ = prompts.with_draft(parts, draft, spans=[(2, 18, len(draft) - 20)])
    assert tokenizer.decode(made[len(parts.before_draft) : len(made) - len(parts.after_draft)]) == "xed{"


def test_a_calculator_takes_nothing_back():
    one = Calculator()
    one.reset("7")
    assert [one.submit("7"), one.submit("8"), one.get_reward()] == ["right", "wrong: it is too large", 1.0]


@pytest.mark.parametrize("text, names, wrong", CASES)
def test_calls_are_read_as_a_tokenizer_says(text, names, wrong):
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = templates.qwen3_template
    text = text if len(text) < 10**6 / 4 else text[: len(text) // 100]  # the parser takes microseconds for each token
    ids = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    found = read_calls(tokenizer, ids, tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False), [SCHEMA])
    assert bool(found) == (names != []) and all(bool(one.wrong) == bool(wrong) for one in found[:32])


@pytest.mark.parametrize("name, stop", [("phi3", "<|assistant|>"), ("phi3", "<|user|>"), ("lfm2", "<|pad|>")])
def test_a_stop_token_that_the_template_writes_elsewhere_takes_no_answer_away(name, stop):
    template = ToolTemplate(with_template(trls(name)), {}, [SCHEMA])
    said = template.between([ToolCall("add")], ["seven"], template.tokenizer.convert_tokens_to_ids(stop))
    assert "seven" in template.tokenizer.decode(said)
