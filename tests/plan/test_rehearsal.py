"""Rehearsals: the tracer against what is known to the byte, and a whole learner on eight GPUs that are not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import linear_budget

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
    assert len(found["planned"]) == 23
    assert {case: ratio for case, ratio in found["planned"].items() if not 0.9 < ratio < 1.1} == {}


def test_loading_takes_to_a_gpu_what_stays_there(traced):
    found, _ = traced
    # Whole weights would be 8 or 16 times as much; small ones are rounded up to blocks of the allocator.
    assert {case: ratio for case, ratio in found["loaded"].items() if not 0.95 < ratio < 1.1} == {}


def test_eight_gpus_are_rehearsed_on_none(traced):
    _, said = traced
    assert "8 x 74.5 GiB, 2 micro-batches per step and process, the largest of 40" in said
    assert "the engine sleeps meanwhile" in said and "vllm_gpu_memory_utilization: 0.3 fits" in said
    phases = ("loading", "trying kernels", "micro-batches", "clip and optimiser", "weight push")
    for part in (*phases, "x allgather_base", "GiB are left"):
        assert part in said


def test_the_host_waits_once_per_optimiser_step_and_not_within_it(traced):
    found, said = traced
    assert len(found["waited"]) == 11 and not any(found["waited"].values())
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


def test_the_linear_loss_gives_a_gpu_two_launches_per_chunk_beside_its_products(traced):
    """Half of a chunk is turned into its gradient beside the other half's product, and the host waits for nothing."""
    found = traced[0]["linear loss"]
    work = {name: [tuple(c) for c in calls["launches"]] for name, calls in found.items()}
    product, loss = [("main", "product", n) for n in (2048, 4096)], ("side", "loss", 2048)
    chunk = [product[0], loss, product[0], loss, product[0], product[0], product[1]]  # logits, logits, dX, dX, dW
    known = ("product", "loss", "statistics", "gradient")
    for chunks, name in enumerate(("two chunks", "three chunks"), 2):
        assert [c for c in work[name] if c[1] in known] == chunk * chunks
    assert len(work["three chunks"]) - len(work["two chunks"]) == len(chunk)
    assert sum(c[1] != "product" for c in work["one chunk"]) <= linear_budget.LAUNCHES["by operators"]
    one = [c[1:] for c in work["one chunk"] if c[1] in known]
    assert one == [(what, n) for what, n in zip(
        ["product", "loss", "product", "loss", "product", "product", "product"],
        [2304, 2304, 2048, 2048, 2304, 2048, 4096], strict=True)]  # fmt: skip
    assert [c[1] for c in work["small"] if c[1] in known] == ["product", "loss", "product", "product"]
    assert [c[:2] for c in work["gspo"] if c[1] in known] == [
        ("main", "product"), ("side", "statistics"), ("main", "product"), ("side", "statistics"), ("side", "gradient"),
        ("side", "gradient"), *[("main", "product")] * 3,
    ]  # fmt: skip
    asked = {name: calls["waits"] for name, calls in found.items() if calls["waits"]}
    assert asked == {"mask": 1, "no metrics": 1}  # how many rows are left


def test_the_linear_loss_holds_one_chunk_dx_and_dw(traced):
    """In bf16 where dW is one product, which may take what the fp32 sum of several would have; then they, too, fit."""
    peaks, mib = {name: calls["peak"] / 2**20 for name, calls in traced[0]["linear loss"].items()}, 2**20
    logits, dx, dw = 4096 * 4096 * 2 / mib, 8192 * 256 * 2 / mib, 4096 * 256 * 2 / mib
    small = 0.6  # everything of (n,)
    assert logits + dx + 2 * dw < peaks["two chunks"] < logits + dx + 2 * dw + small
    assert (
        peaks["one chunk"] < (4096 + 256) / 4096 * logits + (4096 + 256) / 8192 * dx + dw + small < peaks["two chunks"]
    )
    assert peaks["three chunks"] < logits + 1.5 * dx + 2 * dw + small
