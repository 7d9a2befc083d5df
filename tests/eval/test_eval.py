"""`igrpo eval` as a user runs it, its estimators against exact arithmetic, and the benchmark files' field names."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from igrpo.config.train_config import TrainConfig
from igrpo.eval.benchmarks import BENCHMARKS, load_benchmark
from igrpo.eval.command import main
from igrpo.rewards.functions import accuracy
from igrpo.rewards.grading.passages import last_boxed
from igrpo.settings import ConfigError
from igrpo.settings.yaml_text import dump_yaml
from tests.support.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tests" / "data" / "benchmarks"
SHARED = ROOT.parent / "shared" / "data"
STARTS_LOW = "tests.support.reward_functions:starts_low"


# --- benchmarks


@pytest.mark.applies(lambda x: x["folder"] == SHARED or x["name"] in BENCHMARKS, otherwise="not among the samples")
@pytest.mark.parametrize("name", ["aime24", "amc23", "math500", "minerva_math", "gsm8k", "gsm8k/train.jsonl"])
@pytest.mark.parametrize("folder", [SAMPLES, SHARED], ids=["sample", "shared"])
def test_every_reference_answer_grades_itself_right(name, folder):
    if not folder.is_dir():
        pytest.skip("real benchmark files are not beside this checkout")
    asked, data_dir = (name, str(folder)) if name in BENCHMARKS else (str(folder / name), None)
    benchmark = load_benchmark(asked, 1, data_dir, None, None)
    assert len(benchmark.problems) >= 2 and benchmark.reward_funcs == ("accuracy",)
    answers = [gold(p.solution) for p in benchmark.problems]
    scores = accuracy([f"So it is \\boxed{{{a}}}." for a in answers], [p.solution for p in benchmark.problems])
    wrong = [(p.index, a) for p, a, s in zip(benchmark.problems, answers, scores, strict=True) if s != 1.0]
    assert wrong == []
    assert not any(s for s in accuracy(["no idea"] * len(answers), [p.solution for p in benchmark.problems]))


def gold(solution: str) -> str:
    return (solution.rpartition("####")[2] if "####" in solution else last_boxed(solution) or solution).strip()


def test_the_fields_of_a_file_are_mapped_by_name_and_said():
    read = {name: load_benchmark(name, 1, str(SAMPLES), None, None).origin.split(": ")[1] for name in BENCHMARKS
            if (SAMPLES / name).is_dir()}  # fmt: skip
    assert read == {
        "aime24": "problem -> answer",
        "amc23": "problem -> answer",
        "math500": "problem -> answer",
        "minerva_math": "problem -> solution",
        "gsm8k": "question -> answer",
    }
    own = load_benchmark(f"{SAMPLES}/gsm8k/test.jsonl@3", 1, None, 1, None)
    assert (own.name, own.n, len(own.problems)) == ("test", 3, 1)


@pytest.mark.parametrize(
    ("asked", "data_dir", "said"),
    [
        ("aime2", None, r"there is no 'aime2', did you mean aime2[45]\. Known: aime25, aime24.*path of a \.jsonl file"),
        ("aime25", SAMPLES, r"has no file for aime25; put it at aime25/test\.jsonl.*amc23/test\.jsonl.*mean aime24"),
        ("gsm8k", "/nowhere", "no folder /nowhere"),
        ("held_out", None, "held_out needs --model RUN"),
        ("mine.jsonl", None, r"there is no 'mine.jsonl'"),
    ],
)
def test_a_benchmark_that_is_not_there_says_what_is(asked, data_dir, said):
    with pytest.raises(ConfigError, match=said):
        load_benchmark(asked, 1, data_dir and str(data_dir), None, None)


# --- the command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run as training leaves it: settings, and a checkpoint that from_pretrained loads."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save_tiny(folder / "checkpoint-3")
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(20)]
    data = folder.parent / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        model_name_or_path=str(folder / "checkpoint-3"), dataset_name=str(data), dataset_prompt_column="question",
        dataset_solution_column="answer", eval_samples=6, system_prompt="Be brief.", max_completion_length=12,
        num_drafts=2, bf16=False, use_cpu=True, use_vllm=False, reward_funcs=[STARTS_LOW],
    )  # fmt: skip
    (folder / "config.yaml").write_text(dump_yaml(config))
    return folder


def words(run: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(run), "--benchmarks", "held_out", "--n", "4", "--output_dir", str(out), *more]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(run_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("eval")
    assert main(words(run_folder, out, "--two_stage", "first,majority,oracle")) == 0
    return out


def model_folder(out: Path) -> Path:
    (folder,) = [p for p in out.iterdir() if p.is_dir()]
    return folder


def test_an_evaluation_leaves_records_a_table_and_a_plot(evaluated):
    records = lines(model_folder(evaluated) / "held_out.jsonl")
    assert [r["row"] for r in records] == [14, 15, 16, 17, 18, 19], "the rows the run held out"
    for r in records:
        scores = [c["rewards"]["starts_low"] for c in r["completions"]]
        assert len(scores) == 4 and r["correct"] == sum(scores)
    rows = json.loads((evaluated / "summary.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["tiny/checkpoint-3"] * 4
    single = rows[0]["benchmarks"]["held_out"]
    rates = [r["correct"] / 4 for r in records]
    assert single["accuracy"]["value"] == pytest.approx(np.mean(rates)) and 0 < np.mean(rates) < 1
    assert [p["k"] for p in single["pass_at_k"]] == [1, 2, 3, 4]
    assert single["pass_at_k"][0]["value"] == pytest.approx(np.mean(rates))
    assert single["pass_at_k"][3]["value"] == np.mean([r["correct"] > 0 for r in records])
    assert single["accuracy"]["low"] <= np.mean(rates) <= single["accuracy"]["high"]
    table = (evaluated / "summary.md").read_text()
    assert "| tiny/checkpoint-3 | 4 |" in table and "ORACLE" in table and "pass@4" in table
    assert (evaluated / "pass_at_k.png").read_bytes()[:4] == b"\x89PNG"
    assert "pass@k" in (evaluated / "pass_at_k.svg").read_text()


def test_two_stage_refines_the_chosen_drafts(evaluated):
    singles = {r["row"]: r for r in lines(model_folder(evaluated) / "held_out.jsonl")}
    for rule, trials in (("first", 4), ("majority", 2), ("oracle", 2)):
        for r in lines(model_folder(evaluated) / f"held_out.two_stage-{rule}.jsonl"):
            drafts = singles[r["row"]]["completions"]
            N = 4 // trials
            assert len(r["completions"]) == trials == len(r["drafts"])
            assert [d // N for d in r["drafts"]] == list(range(trials)), "every trial has drafts of its own"
            chosen = [drafts[d]["rewards"]["starts_low"] for d in r["drafts"]]
            assert r["draft_score"] == np.mean(chosen)
            if rule == "oracle":
                assert chosen == [
                    max(d["rewards"]["starts_low"] for d in drafts[t * N : t * N + N]) for t in range(trials)
                ]


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(evaluated, run_folder, tmp_path):
    for seed, same in (("42", True), ("43", False)):
        out = tmp_path / seed
        assert main(words(run_folder, out, "--seed", seed, "--two_stage", "first,majority,oracle")) == 0
        for name in ("held_out.jsonl", "held_out.two_stage-majority.jsonl"):
            equal = (model_folder(out) / name).read_text() == (model_folder(evaluated) / name).read_text()
            assert equal is same, (seed, name)


def test_a_killed_evaluation_goes_on_where_it_was(run_folder, tmp_path, capsys):
    """SIGKILL after the first problems; no problem is lost, none is done twice, and what was done stays as it was."""
    out = tmp_path / "out"
    arguments = words(run_folder, out, "--max_completion_length", "200", "--vllm_max_num_seqs", "2", "--n", "2")
    command = [sys.executable, "-m", "igrpo.eval", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    path = out / re.sub(r"[^\w.-]+", "--", "tiny/checkpoint-3") / "held_out.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.is_file() and path.read_text().count("\n") >= 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = path.read_text().splitlines()
    assert 2 <= len(done) < 6, "killed in the middle"
    with path.open("a") as file:
        file.write('{"row": 19, "prompt": "What')  # a line cut by the kill
    assert main(arguments) == 0
    assert f"{len(done)} problems are already done" in capsys.readouterr().out
    after = path.read_text().splitlines()
    assert [json.loads(line)["row"] for line in after] == [14, 15, 16, 17, 18, 19]
    assert set(done) <= set(after)
    again = path.read_bytes()
    assert main(arguments) == 0 and path.read_bytes() == again


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--temperature", "0.9"], "holds an evaluation with another eval_temperature (0.6, now 0.9)"),
        (["--n", "8"], "has 4 completions per problem, not n = 8"),
        (["--reward_funcs", "[accuracy]"], "was scored by starts_low, not by accuracy"),
        (["--two_stage", "best"], "there is no rule 'best'; write some of first, majority, oracle"),
        (["--two_stage", "--num_drafts", "5"], "make no trial of 5 drafts"),
        (["--max_completion_length", "5000"], "leaves 99"),
        (["--benchmarks", "gsm9k"], "did you mean gsm8k"),
        (["--learning_rte", "1"], "learning_rte: there is no such key; did you mean learning_rate?"),
        (["--eval_temperature", "1"], "eval_temperature: `igrpo eval` sets this itself"),
    ],
)
def test_mistakes_are_answered_in_one_line(evaluated, run_folder, capsys, more, said):
    before = (model_folder(evaluated) / "held_out.jsonl").read_bytes()
    assert main(words(run_folder, evaluated, *more)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (model_folder(evaluated) / "held_out.jsonl").read_bytes() == before


def test_rewards_that_fail_are_told_and_never_count_in_silence(run_folder, tmp_path, capfd):
    functions = "tests.support.reward_functions:lacks_a_column"
    assert main(words(run_folder, tmp_path, "--reward_funcs", f"[{functions}]")) == 5
    error = capfd.readouterr().err
    assert "lacks_a_column failed on all 24 completions of held_out: TypeError" in error and "[float(nowhere" in error
    assert not (model_folder(tmp_path) / "held_out.jsonl").read_text(), "nothing counts as a wrong answer"
    functions = "tests.support.reward_functions:raises_on_solution_14"
    assert main(words(run_folder, tmp_path, "--reward_funcs", f"[{functions}]", "--n", "1")) == 0
    assert "failed" not in capfd.readouterr().err


def test_vllm_and_a_second_model_make_a_second_row(run_folder, tmp_path):
    """Real vLLM, two models in one command, named files from a folder, one count of samples per benchmark."""
    other = save_tiny(tmp_path / "other", seed=1)
    arguments = ["--model", str(run_folder), other, "--benchmarks", "gsm8k@2,minerva_math@3",
                 "--data_dir", str(SAMPLES), "--use_vllm", "true", "--use_cpu", "--bf16", "false",
                 "--max_completion_length", "8", "--two_stage", "majority", "--num_drafts", "2",
                 "--output_dir", str(tmp_path / "out")]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "igrpo.eval", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert [(row["model"], row["mode"].split(",")[0]) for row in rows] == [
        ("tiny/checkpoint-3", "single shot"), ("tiny/checkpoint-3", "two-stage"),
        (other, "single shot"), (other, "two-stage"),
    ]  # fmt: skip
    assert {b: f["n"] for b, f in rows[0]["benchmarks"].items()} == {"gsm8k": 2, "minerva_math": 3}
    assert {b: f["n"] for b, f in rows[1]["benchmarks"].items()} == {"gsm8k": 1, "minerva_math": 1}
    texts = [c["text"] for path in sorted((tmp_path / "out").glob("*/gsm8k.jsonl")) for r in lines(path)
             for c in r["completions"]]  # fmt: skip
    assert len(texts) == 8 and len(set(texts)) > 4, "two models, two problems, two samples each"
