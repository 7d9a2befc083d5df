"""The built wheel under other versions of torch: one fresh environment each, and the kernel tests against the wheel.

    make wheel && python scripts/version_matrix.py 2.11.0 2.13.0 2.14.1 2.15.0 [--triton]

An environment holds what `pip install torch==VERSION` brings (several GB where the index serves CUDA builds), is made
in a temporary folder and deleted before the next. The tests are copied, so that the wheel and not this tree is
imported; those about the sources stay behind. Prints a row of the table in docs/building.md per version.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABOUT_SOURCES = ("test_cuda_sources.py", "test_cuda_emulated.py", "test_cuda_plan.py")
HEADER = "| torch | Triton | `_C_cpu` | `_C_cuda` loads | quick kernel tests | Triton: interpreted, compiled for GPUs |"
FOUND = """
import igrpo_kernels, torch, sys
from igrpo_kernels.compiled_rows import missing_library
assert igrpo_kernels.__file__.startswith(sys.prefix), igrpo_kernels.__file__
try:
    import triton
    triton = triton.__version__
except ImportError:
    triton = "none"
cuda = torch.version.cuda and f"{missing_library('_C_cuda') or 'yes'} (CUDA {torch.version.cuda})"
print(torch.__version__, triton, missing_library("_C_cpu") or "loads", cuda or "a CPU build of torch", sep=" | ")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="of torch, as pip takes it after ==")
    parser.add_argument("--wheel", type=Path, help="default: the newest in dist/")
    parser.add_argument("--triton", action="store_true")
    options = parser.parse_args()
    wheels = sorted((ROOT / "dist").glob("igrpo-*.whl"), key=lambda path: path.stat().st_mtime)
    wheel = options.wheel or (wheels[-1] if wheels else None)
    if wheel is None or not wheel.is_file():
        print("error: there is no wheel: run make wheel first", file=sys.stderr)
        return 2
    print(HEADER, "|---|---|---|---|---|---|", sep="\n", flush=True)
    failed = False
    for version in options.versions:
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = try_version(version, wheel.resolve(), Path(folder), options.triton)
            except subprocess.CalledProcessError as error:
                print(error.stdout, error.stderr, file=sys.stderr)
                row = f"{version} | | does not install or import | | |"
        print(f"| {row} |", flush=True)
        failed |= "failed" in row or "does not" in row
    return int(failed)


def try_version(version: str, wheel: Path, folder: Path, with_triton: bool) -> str:
    """One row, without its outer bars."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # In one command: the wheel must take this torch.
    call([*pip, "--no-cache-dir", f"torch=={version}", wheel, "numpy", "pytest", "pytest-timeout"], folder)
    copy_tests(folder)
    # From their own folder: not even an empty directory of this tree is on the path.
    found = call([python, "-I", "-c", FOUND], folder).stdout.strip()
    triton = ["test_triton_suite.py", "test_triton_compile.py"]
    ignored = [f"--ignore=tests/kernels/{name}" for name in (*ABOUT_SOURCES, *triton)]
    quick = closing_line([python, "-m", "pytest", "tests/kernels", "-m", "not slow and not gpu", *ignored], folder)
    slow = [python, "-m", "pytest", *(f"tests/kernels/{name}" for name in triton)]
    return " | ".join((found, quick, closing_line(slow, folder) if with_triton else "not run"))


def copy_tests(folder: Path) -> None:
    """The tests, and of the benchmarks what compiles kernels for a GPU that is not there."""
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def call(command: list, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, env=clean(), check=True, capture_output=True, text=True)


def clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("IGRPO_")}


def closing_line(command: list, folder: Path) -> str:
    """pytest's counts; what failed is shown."""
    done = subprocess.run(command, cwd=folder, env=clean(), capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-20_000:], done.stderr[-2000:], file=sys.stderr, flush=True)
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", done.stdout.strip().splitlines()[-1])
    return ", ".join(counts) or f"failed: exit code {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
