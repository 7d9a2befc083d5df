"""Tests and times the GPU kernels on this machine and writes one JSON record.

    python scripts/gpu_check.py                     on a CUDA device: tests/kernels, then the figures
    python scripts/gpu_check.py --dry-run           anywhere: the same code on toy shapes under Triton's interpreter;
                                                    the record says "dry_run": true and its times mean nothing

Figures are medians over repeated calls with a cold L2, beside the floor they are measured against: a device copy for
the losses, the three bare matmuls for the fused linear. The exit status is that of the tests.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(8, 1024, 151_936), (8, 1024, 128_256), (16, 1024, 49_152)]  # (B, T, V)
LINEAR_SHAPES = [(8192, 4096, 151_936), (8192, 2048, 151_936)]  # (n, H, V)
LOSSES = {
    "token": {},
    "token, k3 and entropy bonus": {"beta": 0.04, "entropy_coef": 0.01},
    "sequence": {"importance_sampling_level": "sequence"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>-<commit>.json")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    sys.path.insert(0, str(ROOT))
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run shows what would run")
    status = 0 if arguments.skip_tests else run_tests(arguments.dry_run)
    record = {
        **environment(arguments.dry_run),
        "tests": {"command": "pytest tests/kernels", "exit_status": None if arguments.skip_tests else status},
        "figures": figures(arguments.dry_run),
    }
    name = f"{record['device'].replace(' ', '-').lower()}-{record['commit'][:10]}.json"
    output = arguments.output or ROOT / "benchmarks" / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {output}")
    return status


def run_tests(dry_run: bool) -> int:
    """Exit status of the kernel tests; the dry run collects them only."""
    command = [sys.executable, "-m", "pytest", "tests/kernels", *(["--collect-only", "-q"] if dry_run else [])]
    return subprocess.run(command, cwd=ROOT).returncode


def environment(dry_run: bool) -> dict:
    """Machine, versions and commit: what a figure needs beside it to mean something."""
    import torch
    import triton

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    cuda = torch.cuda.is_available() and not dry_run
    return {
        "dry_run": dry_run,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} interpreted",
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def figures(dry_run: bool) -> list[dict]:
    """Every figure: operation, shape, milliseconds, and the bytes or FLOPs that time bought."""
    shapes = [(2, 3, 64)] if dry_run else SHAPES
    linear_shapes = [(6, 16, 64)] if dry_run else LINEAR_SHAPES
    found = []
    for shape in shapes:
        for impl in measured_impls():
            found += logits_figures(impl, *shape)
    for shape in linear_shapes:
        for impl in measured_impls():
            found += linear_figures(impl, *shape)
    return found


def measured_impls() -> list[str]:
    """What this machine can run of the implementations made for a device."""
    from igrpo_kernels import available_impls

    states = available_impls()
    return [name for name in ("triton", "cuda") if states[name] == "available"]


def milliseconds(function: Callable[[], object]) -> float:
    """Median time of a call, cold L2; a plain wall clock where there is no device."""
    import torch

    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        from triton.testing import do_bench

        return do_bench(function, warmup=50, rep=300, return_mode="median")
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def logits_figures(impl: str, B: int, T: int, V: int) -> list[dict]:
    """Operations on materialised bf16 logits, in GB/s of the bytes each has to move."""
    import torch

    from igrpo_kernels import GRPOLossConfig, grpo_loss, selective_log_softmax

    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    logits = torch.randn(B, T, V, device=device).bfloat16()
    ids = torch.randint(V, (B, T), device=device)
    advantages = torch.randn(B, device=device)
    ref = selective_log_softmax(logits, ids, impl=impl)
    copy = torch.empty_like(logits)
    count = logits.numel()
    found = []

    def report(name: str, bytes_per_logit: int, function: Callable[[], object]) -> None:
        ms = milliseconds(function)
        found.append({
            "operation": name, "impl": impl, "shape": [B, T, V], "ms": ms, "bytes_per_logit": bytes_per_logit,
            "GB_per_s": bytes_per_logit * count / ms / 1e6, "peak_bytes": peak_bytes(function, device),
        })  # fmt: skip

    def loss(config: GRPOLossConfig, inplace: bool) -> None:
        # On-policy: no row is clipped, so none escapes its second read, not even after `inplace` changed the logits.
        leaf = logits.detach().requires_grad_()
        keywords = {"ref_per_token_logps": ref if config.beta else None}
        grpo_loss(leaf, ids, advantages, config=config, impl=impl, inplace=inplace, **keywords).loss.backward()

    report("copy", 4, lambda: copy.copy_(logits))
    copy = None  # freed, so that it does not count as the losses' memory
    report("selective_log_softmax", 2, lambda: selective_log_softmax(logits, ids, impl=impl))
    report(
        "selective_log_softmax, entropy", 2,
        lambda: selective_log_softmax(logits, ids, return_entropy=True, impl=impl),
    )  # fmt: skip
    for name, options in LOSSES.items():
        config = GRPOLossConfig(**options)
        report(f"grpo_loss {name}, new buffer", 6, lambda config=config: loss(config, False))
        report(f"grpo_loss {name}, in place", 6, lambda config=config: loss(config, True))
    return found


def linear_figures(impl: str, n: int, H: int, V: int) -> list[dict]:
    """The fused linear in bf16 beside the three bare matmuls, in TFLOP/s of 6·n·H·V."""
    import torch

    from igrpo_kernels import GRPOLossConfig, linear_grpo_loss

    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    hidden = torch.randn(1, n, H, device=device).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(V, H, device=device)).bfloat16().requires_grad_()
    ids = torch.randint(V, (1, n), device=device)
    advantages = torch.randn(1, n, device=device)
    x, w, d = hidden.detach()[0], weight.detach(), torch.empty(n, V, device=device, dtype=torch.bfloat16).zero_()
    found = []

    def report(name: str, function: Callable[[], object]) -> None:
        ms = milliseconds(function)
        found.append({
            "operation": name, "impl": impl, "shape": [n, H, V], "ms": ms, "TFLOP_per_s": 6 * n * H * V / ms / 1e9,
            "peak_bytes": peak_bytes(function, device),
        })  # fmt: skip

    def loss(config: GRPOLossConfig) -> None:
        hidden.grad = weight.grad = None
        linear_grpo_loss(hidden, weight, ids, advantages, config=config, impl=impl).loss.backward()

    report("three matmuls", lambda: (torch.mm(x, w.t(), out=d), torch.mm(d, w), torch.mm(d.t(), x)))
    d = None  # as above
    for name, options in LOSSES.items():
        if name != "sequence":  # one sequence of n tokens exceeds a chunk: 8·n·H·V, another comparison
            config = GRPOLossConfig(**{**options, "beta": 0.0})
            report(f"linear_grpo_loss {name}", lambda config=config: loss(config))
    return found


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """Device memory one call needs beyond what is allocated before it."""
    import torch

    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    sys.exit(main())
