"""The sample for the browser: spread over the run, bounded in size, and changes that are the real changes."""

from __future__ import annotations

import itertools
import json
import random

from igrpo.report.arms import Arm
from igrpo.report.completions import MOST_CHARACTERS, as_script_json, changes, sample_groups
from igrpo.report.runs import Run


def record(step, row, text="6 - 4 = 2"):
    def scored(reward, **more):
        return {
            "text": text,
            "reward": reward,
            "rewards": {"accuracy": reward},
            "tokens": 7,
            "finish_reason": "stop",
        } | more

    return {
        "step": step, "row": row, "prompt": "q", "solution": "2", "drafts": [scored(0.0), scored(1.0)], "chosen": 1,
        "refinements": [scored(1.0, advantage=0.7), scored(0.0, advantage=-0.7)],
    }  # fmt: skip


def arm(tmp_path, lines):
    (tmp_path / "completions.jsonl").write_text("".join(lines))
    return Arm("a", (Run(tmp_path, {}, {}),))


def test_a_long_run_is_sampled_evenly_with_its_ends(tmp_path):
    lines = [json.dumps(record(step, row)) + "\n" for step in range(1, 1001) for row in range(8)]
    sample = sample_groups([arm(tmp_path, lines)], [], most=100)
    steps = sorted({g["step"] for g in sample.groups})
    assert sample.total == 8000 and 80 <= len(sample.groups) <= 100
    assert steps[0] == 1 and steps[-1] == 1000 and max(b - a for a, b in itertools.pairwise(steps)) < 50


def test_long_texts_do_not_make_a_huge_page(tmp_path):
    lines = [json.dumps(record(step, 0, text="x" * 200_000)) + "\n" for step in range(100)]
    groups = sample_groups([arm(tmp_path, lines)], [], most=300).groups
    assert len(as_script_json(groups)) < 1.2 * MOST_CHARACTERS
    assert groups[0]["drafts"][0]["text"].endswith("more characters are in completions.jsonl]")


def test_broken_and_older_lines(tmp_path):
    older = {"step": 2, "refinements": [{"text": "t", "reward": float("nan")}]}
    lines = [json.dumps(record(1, 0)) + "\n", json.dumps(older) + "\n", "[]\n", '{"step": 3, "dra']
    notes: list[str] = []
    groups = sample_groups([arm(tmp_path, lines)], notes).groups
    assert [g["step"] for g in groups] == [1, 2] and groups[1]["refinements"][0]["reward"] is None
    assert any("2 lines" in note for note in notes)
    json.loads(as_script_json(groups))  # no NaN: JavaScript could not read it


def test_outcomes(tmp_path):
    (group,) = sample_groups([arm(tmp_path, [json.dumps(record(1, 0)) + "\n"])], []).groups
    assert group["tags"] == ["signal", "some right", "worse than draft", "copies draft"]


def test_changes_turn_the_draft_into_the_refinement():
    generator = random.Random(0)
    words = ["2", "+", "3", "=", "5", "\n", " ", "so", "the answer", "🙂", "é", "<b>"]
    for _ in range(200):
        draft, refinement = ("".join(generator.choices(words, k=generator.randrange(12))) for _ in range(2))
        rebuilt, at = "", 0
        for a0, a1, b0, b1 in changes(draft, refinement):
            rebuilt += draft[at:a0] + refinement[b0:b1]
            at = a1
        assert rebuilt + draft[at:] == refinement
    assert changes("a b c", "a b c") == []
    assert changes("the sum is 4", "the sum is 5") == [[11, 12, 11, 12]]


def test_no_text_can_end_the_script_element():
    text = as_script_json({"t": "</script><!--<script>\u2028&\ud800"})
    assert not set("<>&\u2028\ud800") & set(text)
    assert json.loads(text)["t"].startswith("</script><!--<script>\u2028&")
