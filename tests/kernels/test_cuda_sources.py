"""The CUDA sources compile for every target without a warning and without a spill, and the library links.

No GPU is needed, and none is used: this says nothing about results or speed.
"""

import os
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from igrpo_kernels import available_impls, impls
from igrpo_kernels.source_hash import source_hash

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
ARCHS = ("80", "90a", "100a")
SOURCES = ("launch_bf16.cu", "launch_fp16.cu", "launch_fp32.cu")
KERNELS = {"row_stats", "row_grad", "token_loss_resident", "token_loss_cluster", "scale"}
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


def compile_report(source: Path, target: Path) -> subprocess.CompletedProcess:
    """nvcc's answer for all architectures: warnings and spills are errors, resources are printed."""
    archs = [flag for a in ARCHS for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    strict = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    command = [NVCC, "-std=c++20", "-O3", "--threads", "2", *strict, *archs, "-c", str(source), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def kernel_resources(log: str) -> list[tuple[str, str, int, int]]:
    """(kernel, arch, registers, spilled bytes) of every kernel in ptxas's report."""
    pattern = r"Compiling entry function '\w*?\d([a-z_]+)_kernel\w*' for 'sm_(\w+)'(.*?)Used (\d+) registers"
    found = []
    for name, arch, middle, registers in re.findall(pattern, log, re.DOTALL):
        stack, spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", middle).groups()
        found.append((name, arch, int(registers), int(stack) + int(spilled)))
    return found


@needs_nvcc
@pytest.mark.timeout(1800)  # 40 s on two idle cores
def test_every_kernel_compiles_without_warnings_or_spills(tmp_path):
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [pool.submit(compile_report, ROOT / "csrc" / "cuda" / s, tmp_path / f"{s}.o") for s in SOURCES]
    for source, done in zip(SOURCES, (job.result() for job in jobs), strict=True):
        assert done.returncode == 0, f"{source}:\n{done.stderr[-4000:]}"
        resources = kernel_resources(done.stderr + done.stdout)
        assert {name for name, *_ in resources} == KERNELS
        assert {arch for _, arch, *_ in resources} == set(ARCHS)
        for name, arch, registers, spilled in resources:
            assert spilled == 0, f"{source}: {name} spills {spilled} bytes on sm_{arch}"
            # What __launch_bounds__ leaves: 256 threads once per multiprocessor or twice, or 512 twice.
            assert registers <= {"token_loss_resident": 255, "token_loss_cluster": 128}.get(name, 64)


@needs_nvcc
def test_the_report_would_show_a_spill(tmp_path):
    """The check above must be able to fail."""
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spill_kernel(float* x) {\n"
        "  float v[64];\n#pragma unroll\n  for (int i = 0; i < 64; ++i) v[i] = x[i * 97 + threadIdx.x];\n"
        "  __syncthreads();\n#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) x[i * 31 + threadIdx.x] = v[63 - i] * v[i];\n"
        "}\n"
    )
    done = compile_report(source, tmp_path / "spill.o")
    assert done.returncode != 0 and "spill" in done.stderr


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler")
def test_the_binding_compiles_against_this_torch(tmp_path):
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fvisibility=hidden"]
    for source in ("bindings_cuda.cpp", "launch.cpp"):
        command = [os.environ.get("CXX", "c++"), *flags, "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        command += ['-DIGRPO_SOURCE_HASH="x"', "-isystem", str(include), "-c", str(ROOT / "csrc" / "cuda" / source)]
        done = subprocess.run([*command, "-o", str(tmp_path / "x.o")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]


def test_sources_are_listed_and_kernels_are_torch_free(monkeypatch):
    """No glob decides what is built; only the bindings know torch."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    plan = runpy.run_path(str(ROOT / "setup.py"))
    listed = {*plan["CPU_SOURCES"], *plan["CUDA_SOURCES"]}
    csrc = ROOT / "csrc"
    found = {str(p.relative_to(csrc)) for suffix in ("*.cpp", "*.cu") for p in csrc.rglob(suffix)}
    assert found - listed <= {"cpu/rows_avx2.cpp", "cpu/rows_avx512.cpp"}  # x86-64 only
    assert listed <= found
    for path in csrc.rglob("*.*"):
        if "torch/" in path.read_text(encoding="utf-8"):
            assert path.name in {"bindings.cpp", "bindings_cuda.cpp", "operators.h", "checks.h"}, path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_each_library_is_tied_to_its_own_sources(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = {name: source_hash(name, tmp_path / "csrc") for name in ("_C_cpu", "_C_cuda")}
    (tmp_path / "csrc" / "cuda" / "launch.cpp").write_text("// changed\n")
    after = {name: source_hash(name, tmp_path / "csrc") for name in before}
    assert after["_C_cpu"] == before["_C_cpu"] and after["_C_cuda"] != before["_C_cuda"]
    (tmp_path / "csrc" / "params.h").write_text("// changed\n")
    assert all(source_hash(name, tmp_path / "csrc") != after[name] for name in after)
    assert source_hash("_C_cpu", tmp_path / "nowhere") is None


@needs_nvcc
def test_architectures_that_nvcc_does_not_know_are_left_out(monkeypatch, capsys, tmp_path):
    """Before 12.8 it has no 100a; one that is broken, or older than all of them, stops this library alone."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("IGRPO_CUDA_ARCHS", "80 999a 90a")
    plan = runpy.run_path(str(ROOT / "setup.py"))
    assert plan["known_archs"](NVCC) == ["80", "90a"]
    assert "no kernels for sm_999a" in capsys.readouterr().err
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho 'no licence' >&2\nexit 1\n")
    broken.chmod(0o755)
    for nvcc in (broken, tmp_path / "gone"):
        with pytest.raises(plan["NotBuilt"], match="nvcc compiles for none of 80 999a 90a"):
            plan["known_archs"](str(nvcc))


@pytest.mark.applies(not torch.cuda.is_available(), otherwise="there is a CUDA device")
def test_without_a_device_the_reason_is_given():
    assert "CUDA" in available_impls()["cuda"]
    with pytest.raises(RuntimeError, match=r"impl='cuda' is not available: .*CUDA"):
        impls.resolve_impl("cuda", "cuda")
