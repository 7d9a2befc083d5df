"""Every source gives the same kind of problem, every mistake its own one-line answer, and no row is ever skipped."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from igrpo.data.sources import load_problems
from igrpo.rewards.columns import check_columns
from igrpo.rewards.functions import accuracy, load_reward_functions, reasoning_gym_score
from igrpo.settings import ConfigError
from tests.support.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
ROWS = [
    {"prompt": "1 + 1?", "solution": "2", "level": 1},
    {"prompt": "2 + 2?", "solution": 4, "level": 2},
    {"prompt": "1 / 2?", "solution": 0.5, "level": 3},
]


def write(path: Path, rows=ROWS) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def complaint(error: type[Exception], *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        load_problems(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- local files


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_local_files(tmp_path, suffix):
    rows = [{**row, "solution": str(row["solution"])} for row in ROWS] if suffix == ".parquet" else ROWS
    problems = load_problems(write(tmp_path / f"train{suffix}", rows))
    assert [problem.index for problem in problems] == [0, 1, 2]
    assert [problem.prompt for problem in problems] == ["1 + 1?", "2 + 2?", "1 / 2?"]
    assert [problem.solution for problem in problems] == ["2", "4", "0.5"]
    assert problems[2].columns == {"level": "3" if suffix == ".csv" else 3}
    assert problems[-1] == problems[2]
    with pytest.raises(IndexError):
        problems[3]


def test_paths_are_relative_to_here_or_to_home(tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_problems("rows.jsonl")) == len(load_problems("~/rows.jsonl")) == 3


def test_max_samples_keeps_the_first_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    assert [problem.index for problem in load_problems(path, max_samples=2)] == [0, 1]
    assert len(load_problems(path, max_samples=10)) == 3
    assert "max_samples is 0" in complaint(ValueError, path, max_samples=0)


def test_columns_by_other_names_reach_the_reward_functions(tmp_path):
    row = {"problem": "2 + 2?", "answer": 4.0, "solution": "Count: 4.", "id": 9}
    path = write(tmp_path / "rows.jsonl", [row])
    (problem,) = load_problems(path, dataset_prompt_column="problem", dataset_solution_column="answer")
    assert (problem.prompt, problem.solution) == ("2 + 2?", "4.0")
    assert problem.columns == {"answer": 4.0, "solution": "Count: 4.", "id": 9}


def test_conversations(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?", "name": "x"}]
    path = write(tmp_path / "rows.jsonl", [{"prompt": turns, "solution": "4"}])
    assert load_problems(path)[0].prompt == (turns[0], {"role": "user", "content": "2 + 2?"})
    path = write(
        tmp_path / "rows.jsonl", [{"prompt": [*turns, {"role": "assistant", "content": "4"}], "solution": "4"}]
    )
    assert "must end in a turn with role 'user'" in complaint(ValueError, path)


def test_a_folder_of_split_files(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:1])
    assert len(load_problems(str(tmp_path))) == 3
    assert len(load_problems(str(tmp_path), dataset_split="test")) == 1
    assert "neither a saved data set nor dev.jsonl; there is test.jsonl, train.jsonl" in complaint(
        ValueError, str(tmp_path), dataset_split="dev"
    )


def test_a_single_file_is_not_passed_off_as_another_split(tmp_path):
    path = write(tmp_path / "train.jsonl")
    assert "has no split 'test'" in complaint(ValueError, path, dataset_split="test")
    path = write(tmp_path / "test.jsonl")
    assert len(load_problems(path, dataset_split="test")) == 3


def test_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list([{**row, "solution": str(row["solution"])} for row in ROWS])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(tmp_path / "two")
    assert load_problems(str(tmp_path / "one"))[1].columns == {"level": 2}
    assert len(load_problems(str(tmp_path / "two"), dataset_split="test")) == 1
    assert "has no 'dev', only train, test" in complaint(ValueError, str(tmp_path / "two"), dataset_split="dev")


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files are not at ../shared/data")
def test_the_benchmark_files_load():
    gsm8k = {"dataset_prompt_column": "question", "dataset_solution_column": "answer"}
    train = load_problems(str(DATA / "gsm8k"), **gsm8k)
    assert len(train) == 7473
    assert train[0].solution.endswith("#### 72")
    assert len(load_problems(str(DATA / "gsm8k"), dataset_split="test", **gsm8k)) == 1319
    for name, column, count in (("aime24", "answer", 30), ("amc23", "answer", 40), ("math500", "answer", 500),
                                ("minerva_math", "solution", 272)):  # fmt: skip
        path = str(DATA / name / "test.jsonl")
        problems = load_problems(path, dataset_prompt_column="problem", dataset_solution_column=column)
        assert len(problems) == count
        assert {p.index for p in problems} == set(range(count))


# --- what can be wrong with them


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "solution": "b"}\n{"prompt": "a",\n', r"rows.jsonl:2: broken JSON, .* at column \d+"),
        ('\n\n["a"]\n', r"rows.jsonl:3: a row must be a JSON object, not list"),
        ("\n\n", "has no rows"),
        ('{"prompt": "a", "solution": "b"}\n{"prompt": "a"}\n', r"rows.jsonl:2 has no column 'solution', only prompt"),
        ('{"prompt": "a", "solution": null}\n', r"rows.jsonl:1: 'solution' must be text or a number, not None"),
        ('{"prompt": "a", "solution": []}\n', r"rows.jsonl:1: 'solution' must be text or a number, not list"),
        ('{"prompt": "a", "solution": ["b", null]}\n', r"rows.jsonl:1: 'solution' must be text or a number, not list"),
        ('{"prompt": "a", "solution": 1e999}\n', r"'solution' must be text or a number, not float"),
        ('{"prompt": "a", "solution": ' + "[" * 100000 + "\n", r"rows.jsonl:1: brackets within brackets"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "solution": "b"}\n', "blocks of text"),
        ('{"prompt": "a", "solution": NaN}\n', r"'solution' must be text or a number, not float"),
        ('{"prompt": " ", "solution": "b"}\n', r"rows.jsonl:1: 'prompt' must be text or a list of messages"),
        ('{"prompt": {"a": 1}, "solution": "b"}\n', r"'prompt' must be text or a list of messages, not dict"),
        ('{"prompt": [{"role": "user"}], "solution": "b"}\n', r"'prompt' must be text or a list of messages, not list"),
        ('{"prompt": "a\\ud83d", "solution": "b"}\n', r"rows.jsonl:1: 'prompt' holds half a character, .* at 1"),
        ('{"prompt": [{"role": "user", "content": "\\udc00"}], "solution": "b"}\n', r"'prompt' holds half a character"),
        ('{"prompt": "a", "solution": "\\ud83d"}\n', r"rows.jsonl:1: 'solution' holds half a character"),
    ],
)
def test_broken_rows_are_found_by_line(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    assert re.search(message, complaint(ValueError, str(tmp_path / "rows.jsonl")))


def test_solutions_inside_other_fields_are_found_and_named(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra": {"info": {"question": "2 + 2?"}},
    }
    path = write(tmp_path / "rows.jsonl", [row])
    for column in ("solution", "reward_model", "reward_modle.ground_truth", "reward_model.answer"):
        message = complaint(ValueError, path, dataset_solution_column=column)
        assert message.endswith("set dataset_solution_column: reward_model.ground_truth"), message
    (problem,) = load_problems(path, dataset_solution_column="reward_model.ground_truth")
    assert problem.solution == "4" and problem.prompt == ({"role": "user", "content": "2 + 2?"},)
    assert problem.columns == {key: row[key] for key in ("reward_model", "extra")}
    asked = {"dataset_prompt_column": "extra.info.question", "dataset_solution_column": "reward_model.ground_truth"}
    assert load_problems(path, **asked)[0].prompt == "2 + 2?"
    dotted = write(tmp_path / "dotted.parquet", [{"prompt": "a", "meta.x": {"answer": 3}, "meta": {"answer": 4}}])
    assert load_problems(dotted, dataset_solution_column="meta.x.answer")[0].solution == "3"
    assert load_problems(dotted, dataset_solution_column="meta.answer")[0].solution == "4"


def test_each_accepted_answer_is_right(tmp_path):
    rows = [
        {"prompt": "Capital of the UK?", "solution": ["London", "Greater London"]},
        {"prompt": "1/2?", "solution": [0.5]},
    ]
    several, one = load_problems(write(tmp_path / "rows.jsonl", rows))
    assert several.solution == ["London", "Greater London"] and one.solution == "0.5"
    texts = ["London", "<answer>greater london</answer>", "Paris"]
    assert accuracy(texts, solution=[several.solution] * 3) == [1.0, 1.0, 0.0]
    assert accuracy(["1"], solution=[["", " "]]) == [None] and accuracy(["1"], solution=[["", "1"]]) == [1.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wants_level", None),
        ("wants_solution", None),
        ("wants_levle", "wants_levle needs 'levle', which the data set has not: .* level, some; did you mean 'level'"),
        ("wants_some", "wants_some needs 'some', which row 1 lacks"),
        ("wants_position", "wants_position takes 'completions' by position only"),
        ("igrpo.rewards.functions.reasoning_gym_score", "needs 'question', which the data set has not"),
    ],
)
def test_columns_that_a_reward_function_needs_are_asked_for_before_the_start(tmp_path, function, message):
    rows = [{"prompt": "a", "solution": "b", "level": 1, "some": 2}, {"prompt": "a", "solution": "b", "level": 1}]
    problems = load_problems(write(tmp_path / "rows.jsonl", rows))
    functions = load_reward_functions([function if "." in function else f"tests.support.reward_functions:{function}"])
    if message is None:
        check_columns(functions, problems)
        return
    with pytest.raises(ConfigError, match=message):
        check_columns(functions, problems)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_byte_order_mark_is_no_mistake(tmp_path, name):
    """Windows editors write one; JSON's reader refuses it."""
    text = '{"prompt": "a", "solution": "b"}'
    (tmp_path / name).write_text(text if name.endswith("l") else f"[{text}]", encoding="utf-8-sig")
    assert load_problems(str(tmp_path / name))[0].prompt == "a"


def test_broken_files(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert "a.json:2: broken JSON" in (message := complaint(ValueError, str(tmp_path / "a.json")))
    assert "belongs in a .jsonl file" in message
    (tmp_path / "b.json").write_text('{"a": 1}')
    assert "must be a list of JSON objects" in complaint(ValueError, str(tmp_path / "b.json"))
    (tmp_path / "c.parquet").write_text("no parquet")
    assert "is no parquet file" in complaint(ValueError, str(tmp_path / "c.parquet"))
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "\xff"}')
    assert "is not UTF-8 text" in complaint(ValueError, str(tmp_path / "d.jsonl"))
    (tmp_path / "e.txt").write_text("x")
    assert "is none of .jsonl, .json, .parquet, .csv" in complaint(ValueError, str(tmp_path / "e.txt"))


def test_missing_files_name_their_neighbour(tmp_path):
    write(tmp_path / "train.jsonl")
    message = complaint(FileNotFoundError, str(tmp_path / "trian.jsonl"))
    assert message.endswith(f"did you mean '{tmp_path / 'train.jsonl'}'?")
    assert "did you mean" in complaint(FileNotFoundError, str(tmp_path / "train.jsnl"))
    assert "neither does the folder" in complaint(FileNotFoundError, str(tmp_path / "nowhere" / "train.jsonl"))


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        (("question", "answer"), {}, "no column 'prompt', only question, answer; set dataset_prompt_column: question"),
        (("prompt", "answer"), {}, "no column 'solution', only prompt, answer; set dataset_solution_column: answer"),
        (("problem", "solution"), {"dataset_prompt_column": "problme"}, "set dataset_prompt_column: problem"),
        (("xyz", "solution"), {}, "dataset_prompt_column: "),
    ],
)
def test_missing_columns_are_suggested(tmp_path, columns, settings, message):
    path = write(tmp_path / "rows.jsonl", [dict.fromkeys(columns, "1")])
    assert message in complaint(ValueError, path, **settings)


def test_settings_that_do_nothing_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    assert "dataset_kwargs and dataset_config do not apply" in complaint(ValueError, path, dataset_kwargs={"size": 3})
    assert "dataset_kwargs and dataset_config do not apply" in complaint(ValueError, path, dataset_config="main")
    assert len(load_problems(path, dataset_kwargs={})) == 3


def test_the_hub_is_asked_and_its_failure_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "org/good":
            return datasets.Dataset.from_list([{"prompt": "a", "solution": "b"}])
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"dataset_config": "main", "dataset_split": "test", "dataset_kwargs": {"revision": "v1"}}
    assert load_problems("org/good", **options)[0].solution == "b"
    assert asked == [(("org/good", "main"), {"split": "test", "revision": "v1"})]
    message = complaint(ValueError, "org/bad")
    assert "cannot load 'org/bad' (split 'train')" in message
    assert message.endswith("(ConnectionError: no network)")


def test_mistakes_are_told_without_heavy_imports():
    code = """
import sys
from igrpo.data.sources import load_problems
try:
    load_problems("nothing.jsonl")
except FileNotFoundError:
    print(*{"datasets", "pyarrow", "torch", "numpy", "reasoning_gym"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""


# --- reasoning-gym


def test_reasoning_gym_rows_repeat_and_can_be_scored():
    problems = load_problems("reasoning_gym:chain_sum", dataset_kwargs={"size": 20, "seed": 5, "min_terms": 2})
    assert len(problems) == 20
    again = load_problems("reasoning_gym:chain_sum", dataset_kwargs={"size": 20, "seed": 5, "min_terms": 2})
    assert list(problems) == list(again)
    assert problems[3] == problems[3]
    problem = problems[7]
    assert problem.index == 7
    columns = {name: [value] * 2 for name, value in problem.columns.items()}
    assert columns["task_options"] == [{"min_terms": 2}] * 2
    assert reasoning_gym_score([f"<answer>{problem.solution}</answer>", "<answer>no</answer>"], **columns) == [1.0, 0.0]
    pickle.dumps(problem)


def test_reasoning_gym_is_seeded_by_default_and_differently_per_split():
    train, again = (load_problems("reasoning_gym:chain_sum", max_samples=30) for _ in range(2))
    test = load_problems("reasoning_gym:chain_sum", dataset_split="test", max_samples=30)
    assert len(train) == 30
    assert list(train) == list(again)
    assert len({p.prompt for p in train} & {p.prompt for p in test}) < 3


def test_several_tasks_take_turns():
    options = {"size": 5, "leg_counting": {"min_animals": 2, "max_animals": 2}}
    problems = load_problems("reasoning_gym:chain_sum,leg_counting", dataset_kwargs=options)
    tasks = [problem.columns["metadata"]["source_dataset"] for problem in problems]
    assert tasks == ["chain_sum", "leg_counting", "chain_sum", "leg_counting", "chain_sum"]
    assert all(len(problems[i].columns["metadata"]["animals"]) == 2 for i in (1, 3))
    alone = load_problems("reasoning_gym:chain_sum", max_samples=3)
    assert [problem.prompt for problem in problems][::2] == [problem.prompt for problem in alone]


def test_tasks_without_a_single_answer_have_an_empty_solution():
    problem = load_problems("reasoning_gym:graph_color", max_samples=1)[0]
    assert (problem.solution, problem.columns["answer"]) == ("", None)
    assert accuracy(["1"], solution=[problem.solution]) == [None]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reasoning_gym:chainsum", {}, "no task 'chainsum'; did you mean 'chain_sum'?"),
        ("reasoning_gym:", {}, "no task ''"),
        ("reasoning_gym:chain_sum,", {}, "no task ''"),
        ("reasoning_gym:composite", {}, "no task 'composite'"),
        (
            "reasoning_gym:chain_sum",
            {"min_term": 2},
            "has no option 'min_term'; did you mean 'min_terms'?",
        ),
        ("reasoning_gym:chain_sum", {"min_terms": -2}, "task 'chain_sum' refuses its options"),
        ("reasoning_gym:chain_sum", {"size": 0}, "size is 0"),
        ("reasoning_gym:chain_sum,gcd", {"min_terms": 2}, "write 'min_terms' under its task: {chain_sum: {…}}"),
        ("reasoning-gym:chain_sum", {}, "no source 'reasoning-gym:'; it is 'reasoning_gym:<task>'"),
    ],
)
def test_reasoning_gym_mistakes(name, options, message):
    assert message in complaint(ValueError, name, dataset_kwargs=options)


def test_a_token_outside_the_vocabulary_is_told_with_its_row_before_the_model_loads(tmp_path, capsys):
    """A tokenizer that grew beside a model that did not: the padding token alone does no harm."""
    from igrpo.train import main

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([f"<{i}>" for i in range(40)])
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama().config.save_pretrained(tmp_path / "model")  # no weights
    rows = [{"question": f"{i} + 1?", "answer": "1"} for i in range(5)] + [{"question": "2 + <30>?", "answer": "1"}]
    (tmp_path / "q.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "q.jsonl", "output_dir": tmp_path / "run",
        "dataset_prompt_column": "question", "dataset_solution_column": "answer", "use_vllm": False, "use_cpu": True,
    }  # fmt: skip
    assert main([word for key, value in settings.items() for word in (f"--{key}", str(value))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"q.jsonl:11: the token '<30>' of the question has the id {tokenizer.convert_tokens_to_ids('<30>')}" in line
    assert not (tmp_path / "run").exists()
