"""Scores by reasoning-gym's own rules, without ever running what a model wrote."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest

from igrpo.rewards.functions import EVALUATING_TASKS, reasoning_gym_score


def gym_rows(task: str, count: int = 2) -> list[dict]:
    import reasoning_gym

    data = reasoning_gym.create_dataset(task, size=count, seed=3)
    return [data[i] for i in range(count)]


def gym_score(entry: dict, completion: str) -> float:
    columns = {key: [entry[key]] for key in ("question", "answer", "metadata")}
    return reasoning_gym_score([completion], **columns)[0]


def gym_tasks() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})


def test_answers_score_as_reasoning_gym_scores_them():
    import reasoning_gym

    judged = 0
    for task in gym_tasks():
        data = reasoning_gym.create_dataset(task, size=1, seed=3)
        entry = data[0]
        if entry["answer"] is not None:
            assert gym_score(entry, f"<think>hm 3</think><answer>{entry['answer']}</answer>") == 1.0, task
            judged += 1
        try:
            own = data.score_answer("certainly not", entry)
        except ValueError:  # a few scorers only take numbers; the pool counts that as the function's error
            with pytest.raises(ValueError):
                gym_score(entry, "<answer>certainly not</answer>")
        else:
            assert gym_score(entry, "<answer>certainly not</answer>") == own, task
    assert judged >= 95


ODD = [
    "nan",
    "NaN",
    "-inf",
    "Infinity",
    "1e999",
    "nan+nanj",
    "[nan]",
    "(nan, nan)",
    "nan nan",
    '{"a": NaN}',
    "9" * 1900,
    "1e-999",
]


def test_numbers_that_are_none_are_never_right():
    """Python's ``float`` takes them, and a distance that is nan was worth min(1, nan) = 1."""
    for task in gym_tasks():
        entry = gym_rows(task, 1)[0]
        for answer in ODD:
            try:
                assert gym_score(entry, f"<answer>{answer}</answer>") <= 0.1, (task, answer)
            except (ValueError, TypeError, KeyError, AttributeError):  # a scorer's own: the pool counts it as an error
                continue


def test_digits_that_only_python_reads_are_no_answer():
    entry = gym_rows("rectangle_count", 1)[0]
    right = entry["answer"]
    assert gym_score(entry, f"<answer>{right}</answer>") == 1.0
    entry = {**entry, "answer": "10"}
    assert gym_score(entry, "<answer>10</answer>") == 1.0
    assert [gym_score(entry, f"<answer>{odd}</answer>") < 0.5 for odd in ("1_0", "\uff11\uff10", "1e999")] == [True] * 3


def test_partial_credit_is_kept():
    entry = gym_rows("countdown", 1)[0]
    numbers = "+".join(map(str, entry["metadata"]["numbers"]))
    assert gym_score(entry, f"<answer>{numbers}</answer>") == pytest.approx(0.05)
    assert gym_score(entry, "<answer>1</answer>") in (0.01, 0.05)


def test_task_options_reach_the_scorer():
    entry = gym_rows("puzzle24", 1)[0]
    columns = {key: [entry[key]] for key in ("question", "answer", "metadata")}
    answer = [f"<answer>{entry['answer']}</answer>"]
    assert reasoning_gym_score(answer, **columns, task_options=[{}]) == [1.0]
    assert reasoning_gym_score(answer, **columns, task_options=[{"min_value": 9, "max_value": 10}]) == [0.01]


@pytest.mark.parametrize("task", sorted(EVALUATING_TASKS["literal"] | EVALUATING_TASKS["formula"]))
def test_model_text_is_never_executed(task, tmp_path):
    entry, trace = gym_rows(task, 1)[0], tmp_path / "executed"
    for code in (
        f"open('{trace}', 'w')", f"[open('{trace}', 'w')]", f"__import__('os').system('touch {trace}')",
        f"exec(\"open('{trace}', 'w')\")", f"[].__class__.__base__.__subclasses__() or open('{trace}','w')",
        f"().__init__.__globals__['os'].system('touch {trace}')",
    ):  # fmt: skip
        assert gym_score(entry, f"<answer>{code}</answer>") < 0.1
        assert not trace.exists()


def test_the_tasks_that_evaluate_answers_are_all_known():
    from reasoning_gym.factory import DATASETS

    evaluating = set()
    for task in gym_tasks():
        tree = ast.parse(textwrap.dedent(inspect.getsource(DATASETS[task][0].score_answer)))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in calls:
            name = ast.unparse(call.func).split(".")[-1]
            if name in ("eval", "exec", "parse_expr", "sympify") and ast.unparse(call.args[0]) == "answer":
                evaluating.add(task)
    assert evaluating == EVALUATING_TASKS["literal"] | EVALUATING_TASKS["formula"]
