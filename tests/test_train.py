"""The whole program as a user runs it: real processes, a tiny random model, vLLM and the Hugging Face engine."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import asleep
from tests.support.callers import HOSTILE, save_caller
from tests.support.training import (
    GSM8K,
    LOW_BYTES,
    ROOT,
    TORCHRUN,
    kill,
    records,
    run,
    same_weights,
    steps,
    untimed,
    words,
)


def test_the_whole_loop_with_vllm_and_an_exact_resume(model, questions, tmp_path):
    """Drafts, selection, refinements, update, push, checkpoint; then 3 steps = 2 steps + resume 1, bit for bit."""
    whole = tmp_path / "whole"
    # vLLM reports log-probabilities that differ in the last bits from one process to the next, samples that do not; so
    # the sampler's ratio must stay out of the gradient for the weights to come out equal.
    settings = {"eval_samples": 4, "vllm_importance_sampling_correction": False}
    output = run(words(model, questions, whole, **settings))
    assert "memory plan" in output and "KV cache" in output
    assert "bare-prompt accuracy:" in output and "before" in output and "after" in output
    logged = steps(whole)
    assert [r["step"] for r in logged] == [1, 2, 3]
    for r in logged:
        # The engine samples from the weights of this very step: version and log-probabilities agree.
        assert r["sync/version"] == r["step"] and r["sync/tensors_compared"] > 0
        assert r["sync/probe_logp_gap"] < 1e-4
        assert r["sampling/sampling_logp_difference/max"] < 1e-3
        assert r["rollout/rollouts_per_prompt"] == 7.0 and r["grad_norm"] > 0.0
        assert r["rollout/prefix_cache_hit"] >= 0.0
    groups = records(whole, "completions.jsonl")
    assert len(groups) == 3 * 2
    for g in groups:
        rewards = [d["reward"] for d in g["drafts"]]
        assert len(rewards) == 3 and g["chosen"] == rewards.index(max(rewards))
        assert len(g["refinements"]) == 4 and abs(sum(r["advantage"] for r in g["refinements"])) < 1e-6

    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    for name in ("metrics.jsonl", "completions.jsonl", "config.yaml"):
        shutil.copy(whole / name, resumed / name)
    again = words(model, questions, resumed, resume_from_checkpoint="last", **settings)
    # An engine that sleeps changes nothing, and only ever one of the two is at work.
    said = run(again, launcher=("-m", "tests.support.asleep")).splitlines()
    told = [line.removeprefix(asleep.TOLD) for line in said if line.startswith(asleep.TOLD)]
    pushed = ["learner score", "wake weights", "reload_weights", "wake kv_cache", "engine score"]
    assert [who for who, _ in itertools.groupby(told)] == [
        "sleep 2", "learner load", *pushed,  # the trial's
        "sleep 2", *pushed, "engine submit", "sleep 2", "learner train_on", *pushed,
        "sleep 2", "learner save", *pushed, "engine submit",
    ]  # fmt: skip
    assert [r["step"] for r in steps(resumed)] == [1, 2, 3]
    assert untimed(steps(resumed)[-1]) == pytest.approx(untimed(logged[-1]), rel=1e-4, abs=1e-6)
    assert records(resumed, "completions.jsonl") == groups
    same_weights(whole / "checkpoint-3", resumed / "checkpoint-3")

    before = {path.name: path.read_bytes() for path in resumed.iterdir() if path.is_file()}
    back = {"resume_from_checkpoint": resumed / "checkpoint-2", "seed": 43}
    refused = run(words(model, questions, resumed, **settings, **back), code=2)
    assert "error: resume_from_checkpoint: the checkpoint was trained with seed=" in refused
    assert before == {path.name: path.read_bytes() for path in resumed.iterdir() if path.is_file()}


def test_a_held_out_question_that_is_too_long_is_left_out_and_anyone_can_load_the_checkpoint(model, tmp_path):
    """Such a question once ended the run at its first evaluation, after everything had been loaded."""
    rows = [{"question": "Q" * (400 if i == 9 else 5), "answer": "1"} for i in range(10)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"eval_samples": 4, "vllm_max_model_length": 100, "max_steps": 1, "use_vllm": False}
    settings |= {
        "reward_funcs": "[tests.support.reward_functions:starts_low]",
        "train_on_drafts": True,
        "refine_only": "dead",
    }
    settings |= {"distillation_weight": 0.5, "distillation_topk": 20}
    output = run(words(model, str(data), tmp_path / "run", **settings))
    (step,) = steps(tmp_path / "run")
    assert step["self_distillation/success_group_fraction"] > 0 < step["self_distillation/distillation_loss"]
    assert "warning: 1 of 4 held-out questions are too long for a context of 100 tokens and are left out" in output
    assert "(3 held-out problems)" in output
    folder = tmp_path / "run" / "checkpoint-1"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("abc", return_tensors="pt").input_ids
    start = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(loaded(ids).logits, start(ids).logits)
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_killed_at_any_moment_and_resumed_bit_for_bit(model, questions, tmp_path):
    """kill -9 while steps and saves go on: the resumed run ends as the one that was never killed, in every bit."""
    settings = {"use_vllm": False, "save_steps": 1, "max_steps": 12, "save_total_limit": 2, "top_p": 0.9}
    run(words(model, questions, tmp_path / "whole", **settings))
    arguments = words(model, questions, tmp_path / "killed", **settings)
    kill(arguments, tmp_path / "killed", after=3)
    assert not (tmp_path / "killed" / "checkpoint-12").exists()
    output = run([*arguments, "--resume_from_checkpoint", "last"])
    assert "resuming after step" in output
    whole, killed = steps(tmp_path / "whole"), steps(tmp_path / "killed")
    assert [r["step"] for r in killed] == list(range(1, 13))
    assert [untimed(r) for r in killed] == [untimed(r) for r in whole]
    names = ("completions.jsonl", "checkpoint-12/model.safetensors")
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "killed" / n).read_bytes() for n in names)
    # Optimiser, schedule, random numbers, and where in the data the run is.
    states = [sorted((tmp_path / side / "checkpoint-12" / "state").iterdir()) for side in ("whole", "killed")]
    assert len(states[0]) == len(states[1]) >= 5
    for a, b in zip(*states, strict=True):
        assert a.name == b.name and _equal(_load(a), _load(b)), a.name


def _load(path: Path) -> object:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def started(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """The program, once it has done two steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on_and_no_run_comes_between(model, questions, tmp_path):
    arguments = words(model, questions, tmp_path / "run", use_vllm=False, max_steps=200, save_steps=0)
    process = started([sys.executable, "-m", "igrpo.train", *arguments], tmp_path / "run")
    refused = run(arguments, code=2)
    assert f"output_dir: {tmp_path}/run is in use by process {process.pid} on " in refused
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume_from_checkpoint last" in output and "Traceback" not in output
    last = steps(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / f"checkpoint-{last}" / "state" / "loop.pt").is_file()


@pytest.mark.parametrize("how", ["file", "signal"])
def test_two_processes_stop_after_the_same_step_and_one_goes_on(model, tmp_path, how):
    """torchrun kills its processes 30 seconds after a signal of its own; a file leaves them the time they need. What
    both had begun ahead is trained once each, also what has become too old meanwhile."""
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "What is 1 + 1?", "answer": "2"}\n' * 400)
    settings = {"use_vllm": False, "save_steps": 0, "policy_lag": 2}
    process = started(
        [*TORCHRUN, "-m", "igrpo.train", *words(model, data, tmp_path / "run", max_steps=200, **settings)],
        tmp_path / "run",
    )
    if how == "file":
        (tmp_path / "run" / "stop").touch()
    else:
        second = next(p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
        second.send_signal(signal.SIGTERM)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    last = steps(tmp_path / "run")[-1]["step"]
    assert output.count("stopping after this step") == (how == "signal") and last < 200
    assert f"stopped after step {last}; go on with --resume_from_checkpoint last" in output
    assert not (tmp_path / "run" / "stop").exists()
    begun = torch.load(tmp_path / "run" / f"checkpoint-{last}" / "state" / "loop.pt", weights_only=True)["drafts"]
    if how == "file":
        return  # the same is saved
    settings |= {"resume_from_checkpoint": "last", "max_steps": last + 4}
    run(words(model, data, tmp_path / "run", **settings))
    rows, logged = [group["row"] for group in records(tmp_path / "run", "completions.jsonl")], steps(tmp_path / "run")
    assert len(rows) == len(set(rows)) == 4 * last + 2 * 4 and rows[4 * last :] == [one["row"] for one in begun]
    assert all(0 <= r["staleness/max"] <= 2 for r in logged) and sum(r["staleness/dropped"] for r in logged) > 0


def test_a_full_disk_ends_the_run_with_a_sentence(model, questions, small_disk):
    """Room for the logs, but not for the weights and two moments of each."""
    weights = (Path(model) / "model.safetensors").stat().st_size
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - weights))
    output = run(words(model, questions, small_disk / "run", max_steps=1, use_vllm=False), code=4)
    assert "run was full after" in output and "of checkpoint 1; make room, or" in output and "Traceback" not in output
    assert "nothing was saved yet (save_steps): start the run again" in output
    assert len(steps(small_disk / "run")) == 1 and not list((small_disk / "run").glob("*checkpoint*"))


def test_a_disk_that_fills_with_logs_ends_the_run_with_a_sentence(model, questions, small_disk):
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**16))
    output = run(words(model, questions, small_disk / "run", max_steps=500, save_steps=0, use_vllm=False), code=4)
    assert "error: [Errno 28]" in output and "Traceback" not in output
    assert "nothing was saved yet (save_steps): start the run again" in output
    assert steps(small_disk / "run")


def test_grpo_through_accelerate_launch(model, questions, tmp_path):
    settings = {
        "algorithm": "grpo", "use_vllm": False, "max_steps": 1, "loss_type": "dapo", "beta": 0.01,
        "attn_implementation": "flash_attention_2", "top_k": 20,
    }  # fmt: skip
    output = run(
        ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
         "igrpo/train.py", *words(model, questions, tmp_path / "run", **settings)],
        launcher=("-m", "accelerate.commands.launch"),
    )  # fmt: skip
    assert output.count("packed sequences use sdpa") == 1  # one line, though policy and reference are both loaded
    (only,) = steps(tmp_path / "run")
    assert "draft/accuracy" not in only and only["rollout/rollouts_per_prompt"] == 4.0 and "kl" in only
    assert only["sampling/kept_tokens/mean"] == 20.0 and only["sampling/sampling_logp_difference/max"] < 1e-3


SHARED = {
    "use_vllm": False, "max_steps": 2, "save_steps": 0, "token_budget": 200, "eval_samples": 5, "eval_temperature": 0.0,
    "max_completion_length": 60, **HOSTILE,
}  # fmt: skip


@pytest.fixture(scope="module")
def caller(tmp_path_factory) -> str:
    return save_caller(tmp_path_factory.mktemp("caller"))


@pytest.fixture(scope="module")
def alone(caller, questions, tmp_path_factory) -> dict:
    """What one process finds on the held-out problems before training."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert "(5 held-out problems)" in run(words(caller, questions, folder, **{**SHARED, "max_steps": 1}))
    return next(r for r in records(folder) if "eval/reward" in r)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_share_the_prompts(caller, questions, alone, tmp_path, monkeypatch, sharded):
    """With an environment in each, whose tools their completions call."""
    settings = SHARED.copy()
    if not sharded:  # the learner's collectives then run in a thread, beside the groups of the next step
        settings |= {"policy_lag": 1}
    if sharded:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` does
        monkeypatch.setenv("FSDP_VERSION", "2")
        settings |= {"use_peft": True, "beta": 0.01}
    run(
        ["--standalone", "--nproc_per_node", "2", "igrpo/train.py",
         *words(caller, questions, tmp_path / "run", **settings)],
        launcher=("-m", "torch.distributed.run"),
    )  # fmt: skip
    logged = steps(tmp_path / "run")
    assert [r["step"] for r in logged] == [1, 2]
    # Each process judges its share of the held-out problems; together that is what one process finds.
    assert next(r for r in records(tmp_path / "run") if "eval/reward" in r) == pytest.approx(alone)
    groups = records(tmp_path / "run", "completions.jsonl")
    lengths = [c["tokens"] for g in groups if g["step"] == 1 for c in g["refinements"]]  # with what tools said
    mean = logged[0]["rollout/refinement_tokens"] / len(lengths)
    assert len(lengths) == 16 and mean == logged[0]["completions/mean_length"] <= sum(lengths) / 16
    assert [g["step"] for g in groups] == [1] * 4 + [2] * 4 and len({g["row"] for g in groups}) == 8
    assert all(r["sync/probe_logp_gap"] < 1e-4 and r["learner/unique_tokens"] > 0 for r in logged)
    assert any(r["tools/turns"] > 1 for r in logged)
    assert logged[0]["sampling/sampling_logp_difference/max"] < 1e-3  # of what the policy wrote
    assert [r.get("staleness/max", 0.0) for r in logged] == [0.0, float(not sharded)]
    assert (tmp_path / "run" / "checkpoint-2" / "state" / "shards").is_dir() == sharded  # the launch was what it says
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2").state_dict()
    start = AutoModelForCausalLM.from_pretrained(caller).state_dict()
    assert trained.keys() == start.keys()
    assert not torch.equal(trained[(name := "model.layers.0.mlp.up_proj.weight")], start[name])


def test_rewards_that_hang_or_raise_do_not_stop_the_run(model, tmp_path):
    data = tmp_path / "traps.jsonl"
    data.write_text("".join(json.dumps({"prompt": "Q", "solution": str(i)}) + "\n" for i in range(10, 18)))
    traps = ("hangs_on_solution_13", "raises_on_solution_14")
    names = [LOW_BYTES, *(f"tests.support.reward_functions:{name}" for name in traps)]
    settings = {
        "reward_funcs": f"[{', '.join(names)}]", "reward_timeout": 1.0, "use_vllm": False, "max_steps": 4,
        "dataset_prompt_column": "prompt", "dataset_solution_column": "solution", "num_drafts": 2,
    }  # fmt: skip
    printed = run(words(model, str(data), tmp_path / "run", **settings))
    logged = steps(tmp_path / "run")
    assert len(logged) == 4
    raised = "reward function raises_on_solution_14 failed, completion scored 0.0: ZeroDivisionError: a user's bug"
    assert f"warning: {raised} (reward_functions.py:" in printed
    assert any(message.startswith(raised) for r in logged for message in r.get("messages", []))
    assert sum(r["warnings"] for r in logged) == 3.0 and sum(r["rewards/workers_replaced"] for r in logged) >= 1.0
    # One problem hangs, one raises; each has 2 drafts and 4 refinements, and every one of them is counted.
    total = {k: sum(r.get(k, 0.0) for r in logged) for k in {key for r in logged for key in r} if "rewards/" in k}
    assert sum(v for k, v in total.items() if k.endswith("hangs_on_solution_13/timeouts")) == 6.0
    assert sum(v for k, v in total.items() if k.endswith("raises_on_solution_14/errors")) == 6.0


def test_a_reward_that_fails_on_everything_stops_the_run(model, questions, tmp_path):
    function = "tests.support.reward_functions:lacks_a_column"
    settings = {"reward_funcs": f"[{LOW_BYTES}, {function}]", "use_vllm": False, "max_steps": 1}
    printed = run(words(model, questions, tmp_path / "run", **settings), code=5)
    (error,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "lacks_a_column failed on all" in error and "step 1: TypeError: 'NoneType' object is not" in error
    assert "reward_functions.py:" in error and 'return [float(nowhere[0]["key"])]' in error
    assert "stop_on_reward_failure: false" in error and "Traceback" not in printed
    settings |= {"stop_on_reward_failure": False, "eval_samples": 2}
    run(words(model, questions, tmp_path / "run", **settings))
    logged = records(tmp_path / "run")
    assert [r.get("rewards/lacks_a_column/errors") for r in logged if "reward" in r] == [16.0]
    assert [r["eval/rewards/lacks_a_column/errors"] for r in logged if "eval/reward" in r] == [2.0, 2.0]


MISTAKES = (
    ({"dataset_prompt_column": "prompt"}, ("prompt", "question")),
    ({"dataset_name": "nowhere.jsonl"}, ("nowhere.jsonl",)),
    ({"reward_funcs": "[acuracy]"}, ("acuracy", "accuracy")),
    ({"reward_funcs": "[tests.support.reward_functions:nothing]"}, ("nothing",)),
    ({"model_name_or_path": "./no-such-folder"}, ("model_name_or_path", "no-such-folder")),
    ({"loss_type": "vespo"}, ("vespo", "vllm_importance_sampling_mode")),
    ({"vllm_max_model_length": 12}, ("no question fits", "max_completion_length")),
    ({"eval_samples": 20}, ("eval_samples", "dataset_test_split")),
    ({"resume_from_checkpoint": "last"}, ("resume_from_checkpoint", "no checkpoint yet")),
    ({"lr_scheduler_type": "sawtooth"}, ("lr_scheduler_type",)),
    ({"use_peft": True, "lora_target_modules": "lm_head"}, ("lora_target_modules: lm_head", "tie_word_embeddings")),
    ({"use_vllm": True, "vllm_cpu_kvcache_gib": 1e6}, ("1000000", "GiB", "token_budget")),
)


@pytest.fixture(scope="module")
def answers(model, questions, tmp_path_factory) -> list[tuple[int, str, Path]]:
    """Exit code, output and folder of each mistake, of one process: most of each is importing torch."""
    folders = [tmp_path_factory.mktemp("mistake") / "run" for _ in MISTAKES]
    asked = [
        words(model, questions, folder, **{"use_vllm": False, **settings})
        for folder, (settings, _) in zip(folders, MISTAKES, strict=True)
    ]
    code = (
        "import contextlib, io, json, sys; from igrpo.train import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        " with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):\n"
        "  code = main(arguments)\n"
        " print(json.dumps([code, said.getvalue()]))"
    )
    lines = run([json.dumps(asked)], launcher=("-c", code)).splitlines()  # what libraries say comes after them
    return [(*json.loads(line), folder) for line, folder in zip(lines, folders, strict=False)]


@pytest.mark.parametrize("index", range(len(MISTAKES)), ids=[next(iter(settings)) for settings, _ in MISTAKES])
def test_mistakes_end_with_code_2_and_write_nothing(answers, index):
    code, output, folder = answers[index]
    assert code == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    for part in MISTAKES[index][1]:
        assert part in line
    assert "Traceback" not in output and not folder.exists()


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs GSM8K at ../shared/data/gsm8k beside the checkout")
def test_real_gsm8k_rows_with_vllm(model, tmp_path):
    settings = {
        "reward_funcs": f"[accuracy, format, {LOW_BYTES}]", "max_steps": 1, "max_train_samples": 16,
        "max_completion_length": 24, "bf16": True,
    }  # fmt: skip
    arguments = words(
        model, str(GSM8K), tmp_path / "run", dataset_config="null", reward_weights="[1, 1, 1]", **settings
    )
    run(["--config", "recipes/gsm8k.yaml", *arguments])
    (only,) = steps(tmp_path / "run")
    assert only["rewards/accuracy/not_judged"] == 0.0  # every `#### 72` was read as a number
    assert only["sampling/sampling_logp_difference/mean"] < 0.1
    # What was written is bf16, whatever the master weights are.
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all("####" in g["solution"] for g in records(tmp_path / "run", "completions.jsonl"))
