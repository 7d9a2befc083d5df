"""The line a person sees: its figures, and an ETA that counts steps alone."""

from __future__ import annotations

import time

from igrpo.progress import LiveView, summary


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
