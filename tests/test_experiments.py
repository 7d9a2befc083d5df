"""Plans are runnable, finished runs are never repeated, and the summaries are the arithmetic they say they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from experiments import starting_points, test_time
from experiments.__main__ import main, run_one
from experiments.figures import as_run, draw_plan
from experiments.page import page
from experiments.plan import BASE_CPU, BASE_GPU, PLANS, Plan, fingerprint, load_base, load_plan
from experiments.record import core_seconds, load_records, make_record, point, read_json, record_of, write_json
from experiments.summary import (
    accuracy_at,
    at_equal_tokens,
    interval,
    share_variance,
    student_t95,
    summarise,
    summarise_arm,
)
from igrpo.config.train_config import TrainConfig
from igrpo.settings import ConfigError
from tests.support.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(p.stem for p in PLANS.glob("*.yaml"))


@pytest.mark.parametrize("base", [BASE_CPU, BASE_GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", NAMES)
def test_every_arm_is_a_config_with_equal_prompts_per_step(name, base):
    plan, processes = load_plan(name), 8 if base == BASE_GPU else 1
    configs = [TrainConfig(**plan.settings(arm, load_base(base), processes)) for arm in plan.arms]
    assert {c.prompts_per_step * processes for c in configs} == {load_base(base)["prompts_per_step"]}
    assert len({fingerprint(plan.settings(arm, load_base(base), processes)) for arm in plan.arms}) == len(plan.arms)


def test_an_unknown_plan_or_arm_ends_with_code_2_and_the_nearest_name(capsys):
    assert main(["matched-budgt"]) == 2
    assert "did you mean matched-budget?" in capsys.readouterr().err
    assert main(["controls", "--arms", "bets"]) == 2
    assert "no arm 'bets'" in capsys.readouterr().err


def test_micro_batches_divide_the_step_and_processes_divide_the_prompts():
    plan = Plan("x", "?", "a", {"a": {"num_generations": 6}})
    base = {"prompts_per_step": 8, "per_device_train_batch_size": 32}
    assert plan.settings("a", base)["per_device_train_batch_size"] == 24
    assert plan.settings("a", base)["gradient_accumulation_steps"] == 2
    with pytest.raises(ConfigError, match="8 prompts do not divide over 3 processes"):
        plan.settings("a", base, processes=3)


def store(folder: Path, runs: list[dict]) -> Path:
    """The records of a plan's folder, as a run would have left them."""
    for i, run in enumerate(runs):
        write_json(record_of(folder, f"run{i}"), {k: v for k, v in run.items() if k not in ("arm", "seed")})
        point(folder, run["arm"], run["seed"], f"run{i}")
    return folder


def evaluated(seed: int, arm: str, points: list[tuple[int, float]], copy_rate: float) -> dict:
    return {
        "arm": arm,
        "seed": seed,
        "evaluations": [
            {"step": t, "accuracy": a, "samples": 100, "format": None, "reward": a, "decoded_tokens": t}
            for t, a in points
        ],
        "series": {
            "frac_reward_zero_std": [0.5, 0.25],
            "refinement/copy_rate": [copy_rate] * 2,
            "step_time": [2.0, 4.0],
        },
        "answer_equals_draft": None,
        "totals": {
            "decoded_tokens": points[-1][0],
            "rollouts": 720.0,
            "core_seconds": 360.0,
            "peak_memory_gib": 1.0,
        },
    }


def test_the_summary_is_the_arithmetic_it_says(tmp_path):
    plan = Plan("x", "?", "grpo", {"grpo": {}, "igrpo": {}, "later": {}})
    runs = [
        evaluated(0, "grpo", [(0, 0.1), (100, 0.5)], 0.0),
        evaluated(1, "grpo", [(0, 0.1), (100, 0.3)], 0.0),
        evaluated(0, "igrpo", [(0, 0.1), (200, 0.9)], 0.5),
        evaluated(1, "igrpo", [(0, 0.1), (200, 0.5)], 0.7),
    ]
    summary = read_json(summarise(store(tmp_path / "x", runs), plan))
    igrpo = summary["arms"]["igrpo"]
    assert igrpo["accuracy"]["mean"] == pytest.approx(0.7)
    assert igrpo["accuracy"]["half_width"] == pytest.approx(12.706 * 0.2, rel=1e-3)  # s / sqrt(2) = 0.2
    assert igrpo["minus_baseline"]["mean"] == igrpo["reward_minus_baseline"]["mean"] == pytest.approx(0.3)
    # At 100 tokens igrpo stands half way: 0.5 and 0.3, as grpo does.
    assert igrpo["minus_baseline_at_equal_tokens"]["mean"] == pytest.approx(0.0)
    assert igrpo["zero_variance_groups"]["mean"] == pytest.approx(0.375)
    assert igrpo["copy_rate"]["mean"] == pytest.approx(0.6)
    assert igrpo["accuracy_halfway"]["mean"] == igrpo["accuracy_best"]["mean"] == pytest.approx(0.7)
    assert igrpo["seconds_per_step"]["mean"] == pytest.approx(3.0)
    assert igrpo["core_hours"]["mean"] == pytest.approx(0.1)
    assert igrpo["samples_per_core_second"]["mean"] == pytest.approx(2.0)
    assert igrpo["answer_equals_draft"] is None
    assert summary["missing_arms"] == ["later"]


def test_seeds_that_agree_by_luck_leave_the_sampling_error_of_their_answers():
    """Three seeds once came within 0.3 points of each other, on 500 answers each, and were called a difference."""
    base = [evaluated(seed, "grpo", [(0, 0.1), (100, 0.5)], 0.0) for seed in range(3)]
    arm = [evaluated(seed, "igrpo", [(0, 0.1), (100, 0.51 + seed / 1000)], 0.0) for seed in range(3)]
    figures = summarise_arm(arm, base)
    assert figures["accuracy"]["half_width"] == pytest.approx(1.96 * (0.25 / 300) ** 0.5, rel=1e-3)
    assert figures["minus_baseline"]["half_width"] == pytest.approx(1.96 * (0.5 / 300) ** 0.5, rel=1e-3)
    assert figures["reward_minus_baseline"]["half_width"] == pytest.approx(1.96 * (0.5 / 300) ** 0.5, rel=1e-3)
    assert figures["zero_variance_groups"]["half_width"] == 0.0
    # Two shares in one reward: at worst their deviations add up, 0.5 + 0.4 per answer.
    for record in arm:
        record["evaluations"][-1] |= {"format": 0.8, "reward": 1.3}
    figures = summarise_arm(arm, base)
    assert figures["format"]["half_width"] == pytest.approx(1.96 * (0.16 / 300) ** 0.5, rel=1e-3)
    assert figures["reward"]["half_width"] == pytest.approx(1.96 * (0.81 / 300) ** 0.5, rel=1e-3)
    assert summarise_arm(base, base)["minus_baseline"]["half_width"] == 0.0
    # None right of 300 is not never: half an answer more counts as right, per seed.
    for record in base:
        record["evaluations"][-1]["accuracy"] = 0.0
    least = 1.96 * (3 * share_variance(0.0, 100)) ** 0.5 / 3
    assert summarise_arm(base, [])["accuracy"]["half_width"] == pytest.approx(least, rel=1e-3) and 0.004 < least < 0.02
    assert share_variance(1.0, 100) == pytest.approx(share_variance(0.0, 100)) and share_variance(0.5, 100) == 0.0025
    assert summarise_arm(arm[:1], base[:1])["minus_baseline"]["half_width"] is None


def test_a_step_without_a_gradient_has_no_entropy_and_leaves_a_gap(tmp_path):
    """A whole step of equal rewards ended the record of a run that had trained to the end."""
    step = {"reward": 1.0, "rollout/draft_tokens": 4, "rollout/refinement_tokens": 4, "rollout/rollouts_per_prompt": 2}
    step |= {"step_time": 1.0, "peak_memory_gib": 1.0, "frac_reward_zero_std": 1.0}
    rows = [
        {"step": 0, "eval/accuracy": 0.5, "eval/reward": 0.5},
        {**step, "step": 1, "entropy": 0.5},
        {**step, "step": 2},
    ]
    rows += [{"step": 2, "eval/accuracy": 0.75, "eval/reward": 1.25, "eval/rewards/format": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"eval_samples": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "num_generations": 2}))
    (tmp_path / "core_seconds").write_text("3.0")
    record = {"arm": "grpo", "seed": 0}
    record |= json.loads(json.dumps(make_record(tmp_path, "x", {"seed": 0}), allow_nan=False))
    assert record["series"]["entropy"] == [0.5, None] and "kl" not in record["series"]
    arm = summarise_arm([record], [])
    assert arm["entropy_last"]["mean"] == 0.5 and arm["format"]["mean"] == 0.5 and arm["copy_rate"] is None
    assert as_run(record).series("entropy") == [(1, 0.5)]


def test_accuracy_between_evaluations_is_linear():
    run = evaluated(0, "a", [(0, 0.2), (100, 0.4), (300, 0.8)], 0.0)
    assert accuracy_at(run, 200) == pytest.approx(0.6)
    assert accuracy_at(run, 999) == pytest.approx(0.8)
    assert at_equal_tokens(run, evaluated(0, "b", [(0, 0.2), (100, 0.1)], 0.0)) == pytest.approx(0.3)


def test_an_interval_of_one_seed_has_no_width_and_missing_figures_are_left_out():
    assert interval([0.5]) == {"mean": 0.5, "half_width": None, "n": 1}
    assert interval([None, float("nan")]) is None
    assert interval([1.0, None])["n"] == 1
    # Tables of Student's t; beyond 9 degrees of freedom the first terms of a series stand for the table.
    assert [student_t95(n) for n in (1, 5, 9)] == [12.706, 2.571, 2.262]
    assert [round(student_t95(n), 3) for n in (10, 12, 20, 30)] == [2.228, 2.179, 2.086, 2.042]


def test_what_a_killed_part_of_a_run_has_cost_is_not_guessed(tmp_path):
    """A run whose first half was killed was once said to have cost half of what it did."""
    (tmp_path / "core_seconds").write_text("nan\n")
    assert core_seconds(tmp_path) is None
    run = evaluated(0, "a", [(0, 0.2), (100, 0.4)], 0.0)
    unknown = {**run, "seed": 1, "totals": {**run["totals"], "core_seconds": None}}
    figures = summarise_arm([run, unknown], [])
    assert figures["core_hours"] == {"mean": 0.1, "half_width": None, "n": 1} and figures["accuracy"]["n"] == 2


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory) -> Path:
    """A base recipe with a tiny random model and Hugging Face's generate: seconds per run."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "model_name_or_path": save_tiny(folder / "model"), "dataset_name": str(folder / "rows.jsonl"),
        "dataset_prompt_column": "question", "dataset_solution_column": "answer", "system_prompt": None,
        "use_vllm": False, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_completion_length": 6,
        "reward_funcs": ["tests.support.reward_functions:low_bytes"], "draft_template": " [{draft}]", "save_steps": 1,
        "prompts_per_step": 2, "per_device_train_batch_size": 8, "max_steps": 2, "eval_samples": 4,
    }  # fmt: skip
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def test_a_run_that_fails_goes_on_and_one_that_is_done_is_not_repeated(tiny_base, tmp_path, capfd):
    arguments = Namespace(
        results=tmp_path / "results", runs=tmp_path / "runs", processes=1, launch=f"{sys.executable} -m igrpo.train"
    )
    plan = Plan("tiny", "?", "igrpo", {"igrpo": {"algorithm": "igrpo", "num_drafts": 2, "num_generations": 2}})
    broken = Namespace(**{**vars(arguments), "launch": f"{sys.executable} -m igrpo.train --reward_funcs [nowhere]"})
    assert run_one(plan, "igrpo", 0, load_base(tiny_base), broken) == 2
    assert not list((tmp_path / "results").rglob("*.json"))

    assert run_one(plan, "igrpo", 0, load_base(tiny_base), arguments) == 0
    (record,) = load_records(tmp_path / "results" / "tiny")
    assert (record["arm"], record["seed"], record["settings"]["num_drafts"]) == ("igrpo", 0, 2)
    assert [e["step"] for e in record["evaluations"]] == [0, 2]
    assert record["totals"]["rollouts"] == 2 * 2 * 4
    assert 0 < record["totals"]["decoded_tokens"] <= 2 * 2 * 4 * 6
    assert record["totals"]["core_seconds"] > 1.0
    assert len(record["series"]["reward"]) == 2 and 0.0 <= record["answer_equals_draft"] <= 1.0
    kept = {path.name for path in (tmp_path / "runs").rglob("checkpoint-2/**/*")}
    assert "model.safetensors" in kept and not any(name.startswith("optimizer") for name in kept)

    never = Namespace(**{**vars(arguments), "launch": "false"})
    assert run_one(plan, "igrpo", 0, load_base(tiny_base), never) == 0  # the record is there
    other = Plan("other", "?", "same", {"same": plan.arms["igrpo"]})
    assert run_one(other, "same", 0, load_base(tiny_base), never) == 0  # another plan, the same run
    assert load_records(tmp_path / "results" / "other") == [record | {"arm": "same"}]
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 1


def test_ctrl_c_lets_the_run_save_and_the_same_command_goes_on(tiny_base, tmp_path):
    """The run was once killed half-way through its save, and what it had cost was forgotten."""
    where = ["--seeds", "0", "--arms", "grpo", "--base", str(tiny_base)]
    where += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = [sys.executable, "-m", "experiments", "matched-budget", *where]
    slow = f"{sys.executable} -m igrpo.train --max_steps 400 --save_steps 0"
    process = subprocess.Popen([*command, "--launch", slow], start_new_session=True, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size for p in tmp_path.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    assert process.wait(timeout=60) == 130
    (saved,) = tmp_path.glob("runs/*/checkpoint-*")
    assert (saved / "state" / "loop.pt").is_file()
    spent = float((saved.parent / "core_seconds").read_text())
    assert spent > 1.0
    step = int(saved.name.partition("-")[2])
    again = f"{sys.executable} -m igrpo.train --max_steps {step + 1}"
    assert subprocess.run([*command, "--launch", again], cwd=ROOT).returncode == 0
    (record,) = load_records(tmp_path / "results" / "matched-budget")
    assert record["series"]["step"] == list(range(1, step + 2)) and record["totals"]["core_seconds"] > spent


def test_checkpoints_of_a_plan_are_evaluated_with_a_second_stage(tiny_base, tmp_path, capsys):
    where = ["--seeds", "0", "--arms", "igrpo", "--base", str(tiny_base)]
    where += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert test_time.main(["matched-budget", *where]) == 2
    assert "no finished run of igrpo, seed 0: python -m experiments matched-budget first" in capsys.readouterr().err

    assert main(["matched-budget", *where]) == 0
    assert (tmp_path / "results" / "matched-budget" / "outcome.svg").is_file()
    assert test_time.main(["matched-budget", *where, "--problems", "3"]) == 0
    record = json.loads((tmp_path / "results" / "matched-budget" / "test-time" / "igrpo-seed0.json").read_text())
    assert len(record["modes"]) == 4 and "single shot" in record["modes"]
    assert record["command"].endswith("--seeds 0 --problems 3")
    assert all(mode["problems"] == 3 and 0.0 <= mode["accuracy"] <= 1.0 for mode in record["modes"].values())
    written = page(tmp_path / "results")
    assert "| igrpo | 1 | 3 |" in written and "ORACLE best of 4 drafts" in written
    where[where.index("--runs") + 1] = str(tmp_path / "gone")  # what is recorded needs no run folder
    assert test_time.main(["matched-budget", *where, "--problems", "3"]) == 0


def test_single_shots_are_sampled_at_their_arms_temperature():
    plan, args = load_plan("lab-fed"), test_time.parse(["lab-fed", "--single_shot"])
    settings = plan.settings("grpo", load_base(None, plan))
    command = test_time.evaluation(Path("run"), Path("out"), settings, args)
    assert command[command.index("--temperature") + 1] == "0.8"
    greedy = test_time.parse(["lab-fed", "--single_shot", "--temperature", "0"])
    command = test_time.evaluation(Path("run"), Path("out"), settings, greedy)
    assert command[command.index("--temperature") + 1] == "0"
    with pytest.raises(SystemExit):
        test_time.parse(["lab-fed", "--temperature", "0"])


def test_pass_at_k_stands_beside_its_baseline_seed_by_seed(tmp_path):
    for arm, seed, passes in (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.6), ("b", 1, 0.9), ("b", 2, 0.9)):
        mode = {"accuracy": 0.1, "problems": 3, "pass_at_k": {"1": 0.1, "16": passes}}
        record = {"arm": arm, "seed": seed, "command": f"x --arms {arm} --seeds {seed} --single_shot"}
        write_json(tmp_path / f"{arm}-seed{seed}.json", record | {"modes": {"single shot": mode}})
    lines = test_time.pass_table(tmp_path, Plan("x", "?", "a", {"a": {}, "b": {}, "c": {}}))
    assert "(`x --single_shot`)" in lines[0] and lines[2].endswith("| pass@1 | pass@16 | pass@16 minus baseline |")
    assert lines[-1].startswith("| b | 3 | 3 | 10.0 ± 21.6 | 80.0 ±") and " | 15.0 ± 63.5 |" in lines[-1]
    assert lines[-2].endswith(" | 0.0 ± 0.0 |"), "the baseline against itself"
    assert test_time.pass_table(tmp_path / "nowhere", Plan("x", "?", "a", {"a": {}})) == []


def test_tasks_are_measured_before_anything_is_trained(tiny_base, tmp_path):
    (tmp_path / "tasks.yaml").write_text(
        "sums: {dataset_name: reasoning_gym:chain_sum, dataset_kwargs: {max_terms: 2}}\n"
    )
    (tmp_path / "gsm8k").mkdir()
    lines = [json.dumps({"question": f"{i} + 1?", "answer": f"#### {i + 1}"}) for i in range(5)]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(lines))
    model = yaml.safe_load(tiny_base.read_text())["model_name_or_path"]
    where = ["--model", model, "--base", tiny_base, "--tasks", tmp_path / "tasks.yaml", "--data_dir", tmp_path]
    output = tmp_path / "results" / starting_points.RECORD.name
    assert starting_points.main([*map(str, where), "--with_draft", "--problems", "3", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["command"] == "python -m experiments.starting_points --with_draft --problems 3 --data_dir DIR"
    assert list(record["tasks"]) == ["sums", "GSM8K"] and str(tmp_path) not in record["command"]
    assert all(found["problems"] == 3 and found["value"] == 0.0 for found in record["tasks"].values())
    # None of three: where 63 of 100 problems were right, three in a row would be wrong one time in twenty.
    assert "| sums | `reasoning_gym:chain_sum` | 0.0 | 0.0–63.2 | 0.00 (0.0–63.2) | 3 |" in page(output.parent)
    graded = ["--score", "reasoning_gym_score", "--problems", "3", "--output", output]
    assert starting_points.main([*map(str, [*where[:6], "--with_draft", *graded])]) == 0
    found = json.loads(output.read_text())["tasks"]["sums"]
    assert 0.0 <= found["score"] < 1.0 and 0.0 <= found["with_draft"]["score"] < 1.0
    assert f"| {found['score']:.2f} | 0.00 (0.0–63.2) | {found['with_draft']['score']:.2f} | 3 |" in page(output.parent)
    record["tasks"]["sums"]["value"] = 0.3
    assert "| **sums** |" in starting_points.table(record)[2]


def test_a_plan_is_drawn_with_its_seeds_and_without_what_a_run_does_not_have(tmp_path):
    plan, runs = Plan("x", "?", "grpo", {"grpo": {}, "igrpo": {}, "later": {}}), []
    for seed, arm in ((0, "grpo"), (1, "grpo"), (0, "igrpo")):
        run = evaluated(seed, arm, [(0, 0.1), (100, 0.5)], 0.0) | {"settings": {}}
        run["series"] |= {"step": [1, 2]}
        if arm == "grpo":
            del run["series"]["refinement/copy_rate"]
        runs.append(run)
    outcome, course = draw_plan(store(tmp_path / "x", runs), plan)
    assert "grpo (2)" in outcome.read_text() and "igrpo (1)" in outcome.read_text()
    assert "later" not in outcome.read_text()
    assert "copied from the draft" in course.read_text() and "entropy" not in course.read_text()
    first = outcome.read_bytes()
    draw_plan(tmp_path / "x", plan)
    assert outcome.read_bytes() == first


def test_an_arm_is_compared_with_the_arm_that_its_plan_names(tmp_path):
    """The second stage over DAPO answers to DAPO, not to GRPO."""
    plan = Plan("x", "?", "grpo", {"grpo": {}, "dapo": {}, "i_dapo": {}}, {"i_dapo": "dapo"})
    ends = (("grpo", 0.9), ("dapo", 0.5), ("i_dapo", 0.6))
    runs = [evaluated(0, arm, [(0, 0.1), (100, end)], 0.0) for arm, end in ends]
    arms = read_json(summarise(store(tmp_path / "x", runs), plan))["arms"]
    assert [arms[arm]["against"] for arm in plan.arms] == ["grpo", "grpo", "dapo"]
    assert arms["dapo"]["minus_baseline"]["mean"] == pytest.approx(-0.4)
    assert arms["i_dapo"]["minus_baseline"]["mean"] == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", ["baseline: dapoo", "baseline: grpo\nbaselines: {grpo: dapoo}"])
def test_a_baseline_that_is_no_arm_is_refused(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.plan.PLANS", tmp_path)
    (tmp_path / "p.yaml").write_text(f"question: Q?\n{wrong}\narms:\n  grpo: {{algorithm: grpo}}\n")
    with pytest.raises(ConfigError, match="'dapoo' of its baselines is no arm; arms: grpo"):
        load_plan("p")
