"""Every Triton kernel compiles for A100, H100/H200 and B200 on a machine without a GPU, without spilling a register;
and nothing that changes between training steps compiles anything."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow  # all wait for the compilations that `reports` starts


CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="module")
def reports():
    """Capability -> what `triton_compile_report.py` prints, two processes at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = {capability: pool.submit(report, capability) for capability in CAPABILITIES}
        yield lambda capability: running[capability].result()


def report(capability: int) -> dict:
    """A process of its own, since it replaces Triton's driver."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton_compile_report", str(capability), "--count"]
    run = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills(reports, capability, record_property):
    kernels = reports(capability)["kernels"]
    record_property("kernels", kernels)
    assert {kernel["name"] for kernel in kernels} == {
        "row_statistics_kernel",
        "row_gradient_kernel",
        "token_loss_kernel",
        "scale_kernel",
        "batch_kernel",
        "row_weights_kernel",
        "objective_kernel",
        "finish_kernel",
        "top_entropy_kernel",
        "covariance_kernel",
    }
    for kernel in kernels:
        print(kernel)
        assert kernel["stack"] == 0 and kernel["local"] == 0, f"registers spill: {kernel}"
        assert kernel["reg"] * 32 * kernel["warps"] <= 32768, f"fewer than two blocks fit an SM: {kernel}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_wide_rows_move_sixteen_bytes_at_a_time(reports, capability):
    """V = 16,384 and 1,024 are multiples of 8; V = 1,021 is not and must still compile."""
    narrow = ("objective_kernel", "top_entropy_kernel", "covariance_kernel")  # a number per row, not its logits
    full = [x for x in reports(capability)["kernels"] if x["warps"] == 8 and x["name"] not in narrow]
    assert full and all(kernel["wide_loads"] for kernel in full)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_that_changes_between_steps_compiles(reports, capability):
    """Completion lengths, batch sizes, views, temperatures, epsilons, beta, entropy_coef: run-time arguments."""
    assert reports(capability)["compiled_first"] > 0
    assert reports(capability)["compiled_later"] == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rows_are_on_grid_x(reports, capability):
    """Peers put the length on grid.y, which ends at 65,535."""
    assert reports(capability)["largest_grid"] >= 70_000
    assert reports(capability)["grids_beyond_x"] == []


def test_launches_of_a_call():
    """Eight, metrics included; more where PyTorch checks temperatures or reads a teacher."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.launches"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    launches = json.loads(run.stdout)
    record = Path(__file__).parents[2] / "benchmarks" / "launches.json"
    assert launches == json.loads(record.read_text(encoding="utf-8")), "python -m tests.kernels.launches, and keep it"
    launches = {name: count for name, count in launches.items() if "temperatures" not in name}
    two_ranks = "KL-Cov of the top entropies"  # the one case of nine
    assert {name for name, count in launches.items() if count > 8} == {two_ranks, f"{two_ranks}, packed"}
    assert len(launches) > 30 and max(launches.values()) <= 9 and min(launches.values()) >= 3
