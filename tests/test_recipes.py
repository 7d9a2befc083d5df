"""Every recipe parses, the paper's hold its values, and the scripts that launch them are sound shell."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from igrpo.config.recipe import parse_args

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SCRIPTS = [*(ROOT / "recipes" / "nodes").glob("*.sh"), *(ROOT / "recipes" / "slurm").glob("*.sbatch")]
# The paper's table of hyper-parameters; the 14B runs differ in the batch per device alone.
TABLE = {
    "bf16": True, "attn_implementation": "flash_attention_2", "use_vllm": True, "vllm_gpu_memory_utilization": 0.85,
    "gradient_accumulation_steps": 8, "gradient_checkpointing": True, "learning_rate": 1e-6,
    "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 0.1,
    "num_train_epochs": 1, "max_completion_length": 4096, "num_generations": 4, "temperature": 0.7,
    "reward_funcs": ["accuracy", "format"], "reward_weights": [1.0, 1.0], "beta": 0.0, "num_drafts": 4,
    "algorithm": "igrpo", "loss_type": "grpo", "draft_selection": "best", "draft_policy_lag": 0,
    "early_stop_drafts": False,
}  # fmt: skip
PAPER = {
    "openmath-nemotron-7b": ("nvidia/OpenMath-Nemotron-7B", 16, 8),
    "openmath-nemotron-14b": ("nvidia/OpenMath-Nemotron-14B", 4, 32),
    "nemotron-h-8b": ("nvidia/Nemotron-H-8B-Base-8K", 16, 8),
    "deepseek-r1-distill-7b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 16, 8),
    "deepseek-r1-distill-14b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", 4, 32),
    "openreasoning-nemotron-7b": ("nvidia/OpenReasoning-Nemotron-7B", 16, 8),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    config = parse_args(["--config", str(path)])
    assert Path(config.output_dir).name == path.stem


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_runs_hold_its_values(name):
    path = ROOT / "recipes" / f"{name}.yaml"
    config = parse_args(["--config", str(path)])
    model, batch, gpus = PAPER[name]
    assert (config.model_name_or_path, config.per_device_train_batch_size) == (model, batch)
    assert {key: getattr(config, key) for key in TABLE} == TABLE
    assert config.completions_per_step * gpus == 1024
    # The table itself stands there in the keys it was printed with.
    assert yaml.safe_load(path.read_text())["warmup_ratio"] == 0.1
    assert "Left open by the paper" in path.read_text()


def test_the_distilled_models_template_leaves_thinking_to_the_completion():
    config = parse_args(["--config", str(ROOT / "recipes" / "deepseek-r1-distill-7b.yaml")])
    template = ImmutableSandboxedEnvironment().from_string(config.chat_template)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q\n<draft><think>t</think></draft>"}]
    text = template.render(messages=messages, bos_token="<B>", add_generation_prompt=True)
    assert text == "<B>S<｜User｜>Q\n<draft><think>t</think></draft><｜Assistant｜>"


def test_dapo_is_whole():
    config = parse_args(["--config", str(ROOT / "recipes" / "dapo.yaml")])
    assert (config.epsilon, config.epsilon_high, config.loss_type) == (0.2, 0.28, "dapo")
    assert config.zero_variance == "resample" and "soft_overlong_punishment" in config.reward_funcs
    assert config.beta == 0.0 and not config.mask_truncated_completions
    wrapped = ["--config", str(ROOT / "recipes" / "dapo.yaml"), "--algorithm", "igrpo", "--num_generations", "4"]
    assert parse_args(wrapped).drafts_per_prompt == 4


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_shell_and_say_how_they_are_used(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(ROOT)}
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "usage:" in done.stderr
    environment.pop("IGRPO_SERVER_SECRET", None)
    if path.suffix == ".sh":
        done = subprocess.run(["bash", str(path), "r", "a"], capture_output=True, text=True, env=environment)
        assert done.returncode != 0 and "IGRPO_SERVER_SECRET" in done.stderr


def test_a_slurm_job_whose_time_is_up_stops_by_file(tmp_path):
    """A signal through srun and torchrun would leave the trainer 30 seconds, less than a step of the paper's runs."""
    programs, run = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    run.mkdir()
    for name, text in {
        "scontrol": "printf 'one\\ntwo\\n'",
        "srun": f"""case "$*" in
            *hostname*) echo 10.0.0.1 ;;
            *generate.sh*) exec sleep 60 ;;
            *) touch {run}/learning; for i in $(seq 600); do [ -e {run}/stop ] && exit 130; sleep 0.1; done ;;
        esac""",
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "one,two"}
    command = ["bash", "recipes/slurm/train.sbatch", "recipes/openmath-nemotron-7b.yaml", "--output_dir", str(run)]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (run / "learning").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.terminate()
        assert job.wait(timeout=30) == 130 and (run / "stop").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def test_every_full_size_recipe_bounds_its_micro_batches():
    """Without a budget sixteen of the longest completions are one micro-batch of 87,000 tokens and more."""
    configs = [parse_args(["--config", str(path)]) for path in RECIPES]
    large = [c for c in configs if any(size in c.model_name_or_path for size in ("7B", "8B", "14B"))]
    assert len(large) == 7
    assert {c.model_name_or_path: c.token_budget for c in large if c.token_budget != 16384} == {}
