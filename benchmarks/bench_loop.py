"""The training loop: learner steps beside TRL's, and on a large GPU the paper's 7B step."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from benchmarks import learner_step, rollouts

TIMED_STEPS = 4


def bench_learner_step(session, record_rows, benchmark, tmp_path):
    case = {"toy": learner_step.TOY, "cpu": learner_step.SMALL, "cuda": learner_step.GPU_SMALL}[session.kind]
    steps = 1 if session.kind == "toy" else TIMED_STEPS
    benchmark.group = f"learner step, {case.name}"
    turns = benchmark.pedantic(learner_step.run, args=(case, tmp_path / "model", steps), rounds=1)
    rows = learner_step.rows(case, turns, "beside TRL")
    record_rows(benchmark, rows)
    assert all(not row["note"] for row in rows), [(row["provider"], row["note"]) for row in rows]
    ratios = learner_step.beside_trl(rows)
    if ratios is not None and session.kind != "toy":
        speed, memory = ratios
        assert speed >= learner_step.LEAST_SPEED_UP, f"only {speed:.2f} times as fast as TRL"
        assert memory > 1, f"peak memory {1 / memory:.2f} times TRL's"


@pytest.mark.parametrize("mode", ["packed", "packed, shared prefix"])
def bench_seven_billion_parameters(session, record_rows, benchmark, mode):
    """Random weights of Qwen2.5-7B's shape, 16 completions with the paper's lengths. Elsewhere a toy walks the path.

    AdamW where the device holds its two moments beside weights and gradients in fp32; else Adafactor, which needs none.
    """
    if session.kind == "cpu":
        pytest.skip("needs a CUDA device with 120 GiB; --toy walks the same path with a tiny model")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if session.kind == "cuda" else 0
    if session.kind == "cuda" and memory < 120:
        pytest.skip(f"needs 120 GiB: 7.6 billion weights and gradients in fp32; this device has {memory:.0f}")
    case = replace(learner_step.PAPER_7B if session.kind == "cuda" else learner_step.TOY, checkpointing=True)
    if memory < 165:
        case = replace(case, name=f"{case.name}, Adafactor", overrides={"optim": "adafactor"})
    benchmark.group = f"learner step, {case.name}"
    turns = benchmark.pedantic(learner_step.run_alone, args=(case, mode, 2), rounds=1)
    record_rows(benchmark, learner_step.rows(case, turns, "alone"))


@pytest.mark.timeout(1800)
def bench_schedules(session, record_rows, benchmark):
    """GRPO with 8 completions per prompt, and iGRPO with 4 + 4: real vLLM, a tiny model on any machine."""
    if session.kind == "toy":
        pytest.skip("several engines, minutes: tests/test_benchmarks.py has its arithmetic")
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed (pip install -e '.[gpu]')")
    benchmark.group = "rollout schedules"
    record_rows(benchmark, benchmark.pedantic(rollouts.measure, args=(rollouts.Sizes(),), rounds=1))
