"""Rehearsals: the tracer against what is known to the byte, and a whole learner on eight GPUs that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.applies(
    not any((Path(torch.__file__).parent / "lib").glob("libtorch_cuda.*")), otherwise="for torch's CPU build"
)
SIZES = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 4096, "tie_word_embeddings": False,
}  # fmt: skip
RECIPE = {
    "dataset_name": "d", "bf16": True, "token_budget": 4096, "max_completion_length": 512, "num_generations": 4,
    "gradient_checkpointing": True, "learning_rate": 1e-6,
}  # fmt: skip
CHILD = """
import json, sys
from igrpo.plan import fake_gpu_library
fake_gpu_library.load()
from tests.plan import trace_checks
sys.exit(trace_checks.run(sys.argv[1], json.loads(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """What ``trace_checks.py`` found, in a process that believes in GPUs."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SIZES))
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"model_name_or_path": str(folder)}))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(recipe), json.dumps(SIZES)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    marked = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(marked.removeprefix("FOUND ")), done.stdout


def test_an_allocation_counts_while_it_lives_and_under_the_name_of_its_line(traced):
    found, _ = traced
    assert found["allocation"] == {
        "peak": 6 * 2**20,
        "held": 2 * 2**20,
        "alive": {"mine": 4 * 2**20, "kept": 2 * 2**20},
    }
    assert found["backward"] == 4 * 2**20 + 2 * 512, (
        "the weight, both factors' gradients, their sum; a loss and its own"
    )
    assert found["resized"] == [2**20, 0, 2**20]


def test_a_wait_is_one_whatever_asked_for_the_value(traced):
    found, _ = traced
    assert found["waits"] == {
        "a number read (.item, float, bool)": 2, "nonzero": 1, "tolist": 1, "torch.cuda.synchronize": 1,
        "a copy from the computer's memory to the GPU": 1, "a copy from the GPU to the computer's memory": 1,
    }  # fmt: skip
    assert [line.partition(":")[0] for line in found["line"]] == ["igrpo/learner/metrics.py"]


def test_a_collective_counts_with_its_bytes(traced):
    found, _ = traced
    assert found["collectives"] == {"allreduce": [1, 2**20], "allgather_base": [2, 2 * 2**22]}


def test_the_memory_plan_is_within_a_tenth_of_the_rehearsal(traced):
    found, _ = traced
    assert len(found["planned"]) == 7
    assert {case: ratio for case, ratio in found["planned"].items() if not 0.9 < ratio < 1.1} == {}


def test_eight_gpus_are_rehearsed_on_none(traced):
    _, said = traced
    assert "8 x 74.5 GiB, 2 micro-batches per step and process, the largest of 40" in said
    for part in ("loading", "micro-batches", "clip and optimiser", "weight push", "x allgather_base", "GiB are left"):
        assert part in said


def test_the_host_waits_once_per_optimiser_step_and_not_within_it(traced):
    _, said = traced
    assert "micro-batches: the host waits 0 times" in said
    assert "clip and optimiser: the host waits 1 times" in said
    assert "weight push: the host waits 0 times" in said


def test_a_rehearsal_leaves_torch_as_it_is_and_wants_its_cpu_build(tmp_path):
    """gpu_check imports it beside a real learner, whose gradients a kernel for fake GPUs would have replaced."""
    code = (
        "import torch, igrpo.plan.rehearsal\n"
        "assert not torch._C._dispatch_has_kernel_for_dispatch_key('aten::silu_backward', 'CUDA')"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    built_for_cuda = tmp_path / "torch"
    (built_for_cuda / "lib").mkdir(parents=True)
    (built_for_cuda / "__init__.py").write_text("")
    (built_for_cuda / "lib" / "libtorch_cuda.so").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from igrpo.plan import fake_gpu_library as f; f.load()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ConfigError: rehearse: this torch was built for CUDA" in done.stderr
