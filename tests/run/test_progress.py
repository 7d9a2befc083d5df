"""The line a person sees: its figures, and an ETA that counts steps alone."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time

import igrpo.run.progress
from igrpo.run.progress import LiveView, sparkline, summary

SCRIPT = """
import logging, time
from igrpo.run.progress import LiveView
from igrpo.terminal import shown_warnings
with shown_warnings(), LiveView(total=3) as view:
    for step in (1, 2):
        view.begin_step(2)
        for stage in ("drafts", "refinements", "drafts", "refinements"):
            view.rolled_out(stage)
        view.learned(1, 4)
        view.stage("weights to the engine")
        time.sleep(0.3)
        view.end_step(step, {"reward": step / 4, "refinement/accuracy": step / 4, "rollout/tokens_per_second": 123.0,
                             "step_time": 0.5, "peak_memory_gib": 7.25})
    view.note({"eval/accuracy": 0.5})
    view.say("saved [bold]somewhere[/bold]")
    view.say("forged \\x1b]0;title\\x07\\rstep 9/9 \\u202e")
    logging.getLogger("igrpo.rewards.workers.pool").warning("a reward [red]failed \\x1b[2J")
"""


def terminal(**variables) -> str:
    """What a terminal receives from the script."""
    main, other = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {"TERM": "xterm", "COLUMNS": "100", **variables}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=other, stderr=other, env=environment)
    os.close(other)
    received = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        received += part
    assert process.wait() == 0, received
    os.close(main)
    return received.decode()


def test_a_terminal_shows_bars_trends_and_figures():
    seen = terminal()
    assert "\x1b[" in seen
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    for part in ("drafts", "2/2", "learner", "1/4", "▁█", "refinement accuracy", "50%", "bare-prompt accuracy",
                 "123 tok/s", "0.5 s/step", "7.2 GiB peak", "ETA 0:00:", "weights to the engine"):  # fmt: skip
        assert part in text, part
    assert "saved [bold]somewhere[/bold]" in text  # a path in brackets is no markup
    assert r"forged \x1b]0;title\x07\rstep 9/9 \u202e" in text
    assert r"warning: a reward [red]failed \x1b[2J" in text and "\x1b[2J" not in seen


def test_ci_and_dumb_terminals_get_plain_lines():
    for variables in ({"CI": "true"}, {"TERM": "dumb"}):
        lines = terminal(**variables).replace("\r\n", "\n").splitlines()
        assert len(lines) == 5 and lines[1].startswith("step 2/3  reward 0.50  refinement acc 50%  tok/s 123")
        assert all(line.isprintable() for line in lines)


def test_a_pipe_hears_from_a_long_step(monkeypatch, capsys):
    monkeypatch.setattr(igrpo.run.progress, "HEARTBEAT_SECONDS", 0.05)
    with LiveView(total=9, done=3) as view:
        view.begin_step(problems=8)
        view.rolled_out("drafts")
        time.sleep(0.4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and set(lines) == {"step 4/9  rollout  drafts 1/8"}


def test_sparklines_span_the_values_and_survive_what_is_no_number():
    assert sparkline([1.0, 2.0, float("nan"), 8.0]) == "▁▂█"
    assert sparkline([3.0, 3.0]) == "▁▁" and sparkline([]) == "" and len(sparkline(range(99))) == 24


def test_figures_a_run_does_not_have_are_left_out():
    line = summary({"reward": 1.234, "refinement/accuracy": 0.5, "rollout/tokens_per_second": 310.4})
    assert line == "reward 1.23  refinement acc 50%  tok/s 310"


def test_eta_counts_from_the_first_step_of_this_run(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    view = LiveView(total=10, done=4)
    now[0] = 1000.0  # an evaluation before the first step
    view.begin_step(problems=2)
    assert view.eta() == "-:--:--"
    now[0] = 1020.0
    view.end_step(5, {"reward": 0.5})
    assert view.eta() == "0:01:40"  # one step took 20 s, five are left
    assert capsys.readouterr().out == "step 5/10  reward 0.50  ETA 0:01:40\n"


def test_only_the_main_process_speaks(capsys):
    view = LiveView(total=1, silent=True)
    view.begin_step(1)
    view.end_step(1, {"reward": 1.0})
    view.say("hello")
    assert capsys.readouterr().out == ""
