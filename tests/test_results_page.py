"""The page of results says what the summaries say: its advice, its verdicts, its intervals."""

from __future__ import annotations

import json
import math
import random
import re

import pytest

from experiments.choices import judge
from experiments.page import PAGE, READING, page, reading, scattered, verdict
from experiments.plan import RESULTS
from experiments.record import point, read_json, write_json
from experiments.summary import detectable, holm, interval, p_value, show, student_t95


def test_the_page_of_results_is_what_the_records_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m experiments.page"


def test_a_paragraph_of_the_reading_stands_on_figures_or_is_left_out(tmp_path):
    """Its figures and verdicts are the summaries', so that no number on the page is typed by hand."""
    figures = {"accuracy": {"mean": 0.5, "half_width": None, "n": 1}, **gap(-0.123, 0.04)}
    (tmp_path / "matched-budget").mkdir()
    summary = {"baseline": "grpo", "arms": {"grpo": figures, "igrpo": figures}, "missing_arms": []}
    (text,) = reading(tmp_path)
    assert "## What it comes to" in text and "points" not in text
    (tmp_path / "matched-budget" / "summary.json").write_text(json.dumps(summary))
    source = tmp_path / "reading.md"
    source.write_text("A.\n\n{matched-budget/igrpo/minus_baseline} {matched-budget/igrpo/minus_baseline?}.\n\n"
                      "{matched-budget/other/accuracy}\n\nB, {controls/best/accuracy}.")  # fmt: skip
    assert reading(tmp_path, source) == ["A.\n\n-12.3 ± 4.0 worse.\n"]
    of_two = {"grpo": figures, "igrpo": {**figures, **gap(-0.1, 0.099)}, "other": {**figures, **gap(0.0, 0.4)}}
    (tmp_path / "matched-budget" / "summary.json").write_text(json.dumps({**summary, "arms": of_two}))
    assert "worse alone, not after Holm's correction." in reading(tmp_path, source)[0]
    written = re.findall(r"\d+\.\d", READING.read_text(encoding="utf-8"))
    assert not written, f"figures typed by hand: {written}"


def test_the_advice_follows_the_sign_of_its_figure(tmp_path):
    """The first table once advised iGRPO whatever its figure said."""
    (tmp_path / "lab-control").mkdir()
    summary = read_json(RESULTS / "lab-control" / "summary.json")
    summary["arms"] = {arm: summary["arms"][arm] for arm in ("grpo", "igrpo")}
    for mean, half_width, run, cell in (
        (0.064, 0.009, "iGRPO as published", "**6.4 ± 0.9**"),
        (-0.064, 0.009, "GRPO", "-6.4 ± 0.9"),
        (-0.064, 0.05, "GRPO", "-6.4 ± 5.0, p 0.022"),
        (-0.064, 0.1, "GRPO, for its simplicity: nothing is shown", "-6.4 ± 10.0 *not shown*, p 0.16 [14]"),
    ):
        summary["arms"]["igrpo"]["minus_baseline"] = {"mean": mean, "half_width": half_width, "n": 6}
        write_json(tmp_path / "lab-control" / "summary.json", summary)
        assert f"likelier](#lab-control) | {run} | {cell} |  |" in page(tmp_path)


@pytest.mark.parametrize(("n", "level"), [(3, 0.05), (6, 0.05), (6, 0.05 / 7)])
def test_what_seeds_would_have_shown_four_times_in_five(n, level):
    """By drawing: seeds of a normal of deviation 1 and this mean are told from zero at this level."""
    draw, seen = random.Random(0), 0
    true = detectable({"mean": 0.0, "half_width": student_t95(n - 1) / math.sqrt(n), "n": n}, level)
    for _ in range(4000):
        seen += p_value(interval([draw.gauss(true, 1.0) for _ in range(n)])) <= level
    assert seen / 4000 == pytest.approx(0.8, abs=0.02)


def test_what_was_corrected_together_is_judged_at_the_level_where_it_failed(tmp_path):
    """Two of three are shown, so the third had to come below 5 %; the power is said of that. Arms that a plan holds
    against another than GRPO are held against it here, seed by seed."""
    (tmp_path / "train-on-drafts").mkdir()
    runs = {"grpo": (0.5, 0.6, 0.7), "igrpo": (0.3, 0.4, 0.6), "train_on_drafts": (0.4, 0.6, 0.6)}
    for arm, ends in runs.items():
        for seed, accuracy in enumerate(ends):
            name = f"{arm}{seed}"
            ends_at = {"accuracy": accuracy, "format": None, "reward": accuracy, "samples": 10**9}
            write_json(tmp_path / "runs" / f"{name}.json", {"evaluations": [ends_at]})
            point(tmp_path / "train-on-drafts", arm, seed, name)
    figures = gap(0.1, 0.05) | {"against": "igrpo", "accuracy": {"mean": 0.5, "half_width": 0.1, "n": 3}}
    write_json(tmp_path / "train-on-drafts" / "summary.json", {"arms": dict.fromkeys(runs, figures)})
    cell = ("train-on-drafts", "train_on_drafts", "grpo")
    found = judge(tmp_path, [cell])[cell]
    assert found.gap["mean"] == pytest.approx(-0.2 / 3, abs=1e-6) and found.late and not found.shown
    assert found.cell().startswith("-6.7 ± 14.3 † *not shown*") and found.level == 0.05
    two = judge(tmp_path, [cell, ("train-on-drafts", "train_on_drafts", "igrpo"), ("nowhere", "igrpo", "grpo")])
    assert len(two) == 2 and two[cell].p > found.p / 2


def gap(mean: float, half_width: float | None) -> dict:
    figure = {"mean": mean, "half_width": half_width, "n": 3}
    return {"against": "base", "minus_baseline": figure, "reward_minus_baseline": {**figure, "mean": -mean}}


def test_seeds_that_end_far_apart_are_listed():
    ends = {"a": (0.0, 0.6, 0.1), "b": (0.5, 0.5, 0.51), "c": (0.0, 0.9)}
    records = [{"arm": arm, "seed": seed, "evaluations": [{"accuracy": 0.3}, {"accuracy": end}]}
               for arm, some in ends.items() for seed, end in enumerate(some)]  # fmt: skip
    assert scattered(records[::-1], [*ends]) == " Seed by seed, where they end far apart: `a` 0.0, 60.0, 10.0."
    assert scattered(records, ["b"]) == ""


def test_only_an_interval_without_zero_is_called_a_difference():
    arms = {
        "base": gap(0.0, 0.0),
        "up": gap(0.1, 0.05),
        "down": gap(-0.1, 0.05),
        "even": gap(0.1, 0.2),
        "one": gap(0.5, None),
        "paired": gap(0.1, 0.05) | {"against": "up"},
    }
    said = verdict({"baseline": "base", "arms": arms})
    assert "against `base`" in said and "`up`, accuracy: better" in said and "`up`, reward: worse" in said
    assert "`down`, accuracy: worse" in said and "`base`," not in said
    assert "`even`, accuracy: no difference" in said and "`one`, accuracy: one seed, no claim" in said
    assert "`paired` against `up`, accuracy: better" in said


def test_p_values_belong_to_the_intervals_and_are_corrected_together():
    for n, at_1_percent in ((2, 63.657), (3, 9.925), (6, 4.032), (7, 3.707), (11, 3.169)):
        half_width = student_t95(n - 1) / at_1_percent
        assert p_value({"mean": 1.0, "half_width": half_width, "n": n}) == pytest.approx(0.01, rel=2e-3)
        assert p_value({"mean": -1.0, "half_width": 1.0, "n": n}) == pytest.approx(0.05, rel=2e-3)
    assert (
        p_value({"mean": 1.0, "half_width": None, "n": 1}) == p_value({"mean": 0.0, "half_width": 0.0, "n": 3}) == 1.0
    )
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([0.9, 0.8]) == [1.0, 1.0]


def test_figures_are_shown_with_their_interval():
    assert show({"mean": 0.7341, "half_width": 0.0212, "n": 3}, 100) == "73.4 ± 2.1"
    assert show({"mean": 2.5, "half_width": None, "n": 1}, 1) == "2.50" and show(None, 1) == "–"
