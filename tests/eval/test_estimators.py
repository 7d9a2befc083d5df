"""pass@k, its intervals and its plot; which draft is shown at test time."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from igrpo.eval.pass_at_k import average, bootstrap, pass_at_k
from igrpo.eval.summary import make_row
from igrpo.eval.two_stage import RULES, choose, chosen_drafts, vote_key
from igrpo.report.benchmarks import row_colours, write_pass_at_k
from igrpo.report.drawing import ARM_COLOURS


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n in range(1, 8):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = [any(s) for s in itertools.combinations(right, k)]
                assert pass_at_k([c], n)[0, k - 1] == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_equals_the_binomials_where_floats_would_overflow():
    n, counts = 2048, [0, 1, 3, 700, 2047, 2048]
    got = pass_at_k(counts, n)
    assert got.shape == (6, n) and np.isfinite(got).all() and (np.diff(got, axis=1) >= 0).all()
    for row, c in zip(got, counts, strict=True):
        for k in (1, 2, 64, 1000, 2048):
            exact = float(1 - Fraction(comb(n - c, k), comb(n, k)))
            assert row[k - 1] == pytest.approx(exact, rel=1e-9, abs=1e-12)
    with pytest.raises(ValueError, match="between 0 and n = 4"):
        pass_at_k([5], 4)


def test_bootstrap_intervals_have_the_width_that_theory_gives_and_repeat():
    values = np.array([[float(i % 2), 1.0] for i in range(400)])
    (half, sure), drawn = bootstrap(values, seed=3)
    assert half.value == 0.5 and half.high - half.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    assert tuple(sure) == pytest.approx((1.0, 1.0, 1.0))
    assert bootstrap(values, seed=3)[0] == [half, sure] and drawn.std() == pytest.approx(0.025, rel=0.05)
    assert bootstrap(values[:1], seed=3)[0][1] == (1.0, None, None)
    _, other = bootstrap(values, seed=4)
    both = average([drawn, other], [0.5, 0.5])
    assert both.high - both.low == pytest.approx((half.high - half.low) / 2**0.5, rel=0.1)


def test_the_plot_has_a_panel_per_benchmark_and_no_empty_one(tmp_path):
    records = [{"correct": c, "score": c / 4, "completions": [{"rewards": {"accuracy": 0.0}, "finish_reason": "stop",
                "tokens": 1}] * 4} for c in (0, 1, 4)]  # fmt: skip
    modes = ["single shot", *(text.format(N=4) for text in RULES.values())]
    rows = [make_row("m", mode, dict.fromkeys("abcd", records), 0) for mode in modes]
    write_pass_at_k(rows, tmp_path)
    svg = (tmp_path / "pass_at_k.svg").read_text()
    assert [svg.count(f">{name}</text>") for name in "abcd"] == [1] * 4 and svg.count(">k</text>") == 4
    assert svg.count("stroke-dasharray") == 3  # and the single shot's whole line
    # A model's modes have one colour: each row once used one up.
    assert row_colours([*rows, rows[0] | {"model": "other"}], ()) == [*ARM_COLOURS[:1] * 4, ARM_COLOURS[1]]
    once = [
        make_row(
            "m", "single shot", {"a": [r | {"completions": r["completions"][:1], "correct": 1} for r in records]}, 0
        )
    ]
    write_pass_at_k(once, tmp_path)
    assert ">a</text>" in (tmp_path / "pass_at_k.svg").read_text()


# --- choosing a draft at test time


def test_the_majority_votes_by_value_and_the_first_such_draft_is_shown():
    texts = [r"it is \boxed{7}", r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", "no idea"]
    assert vote_key(texts[1]) == vote_key(texts[2]) and vote_key(texts[3]) is None
    assert choose("majority", texts, [1, 0, 0, 0]) == 1
    assert choose("first", texts, [0, 1, 0, 0]) == 0
    assert choose("oracle", texts, [0, 0, 0, 1]) == 3
    assert choose("majority", ["no idea", "none"], [0, 1]) == 0, "without any answer the first draft stands"
    assert choose("majority", [r"\boxed{1}", r"\boxed{2}"], [0, 1]) == 0, "a tie goes to the first"


def test_trials_are_disjoint_and_only_the_oracle_reads_scores():
    completions = [
        {"text": rf"\boxed{{{a}}}", "rewards": {"accuracy": s}} for a, s in zip("12233", "00110", strict=True)
    ]
    for c in completions:
        c["rewards"]["accuracy"] = float(c["rewards"]["accuracy"])
    record = {"completions": completions}
    assert chosen_drafts(record, "oracle", 2, "accuracy") == [0, 2]
    assert chosen_drafts(record, "majority", 2, "accuracy") == [0, 2]
    assert chosen_drafts(record, "majority", 4, "accuracy") == [1]
    assert chosen_drafts(record, "first", 1, "accuracy") == [0, 1, 2, 3, 4]
