"""The tables of docs/rewards.md, row by row: what counts as the right answer is written down once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from igrpo.rewards.functions import accuracy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    table = PAGE.split(f"### {heading}")[1].split("\n## ")[0].split("\n### ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def codes(cell: str) -> list[str]:
    return [text.replace("\\|", "|") for text in re.findall(r"`([^`]+)`", cell)]


FORMS = [
    (question, reference, answer, score)
    for question, (reference,), right, wrong in (
        (row[0], codes(row[1]), codes(row[2]), codes(row[3])) for row in rows("Answers, in `<answer>` or in a box")
    )
    for answers, score in ((right, 1.0), (wrong, 0.0))
    for answer in answers
]


def score(completion: str, reference: str, question: str) -> float | None:
    prompts = [[{"role": "system", "content": "Answer 72."}, {"role": "user", "content": question}]]
    return accuracy([completion], solution=[reference], prompts=prompts)[0]


@pytest.mark.parametrize("way", ["<answer>%s</answer>", r"So \boxed{%s}.", "5\n#### %s"])
def test_the_table_of_answers(way):
    assert len(FORMS) > 600
    failed = [
        row for row in FORMS if score(way % row[2], row[1], row[0]) != row[3] and row[2].count("{") == row[2].count("}")
    ]
    assert not failed


def test_the_table_of_completions():
    table = [(codes(row[0])[0], codes(row[1])[0], float(row[2])) for row in rows("Whole completions")]
    assert len(table) > 50 and {row[2] for row in table} == {0.0, 1.0}
    assert [row for row in table if score(row[0], row[1], "") != row[2]] == []
