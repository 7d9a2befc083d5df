"""The package installs from an sdist whatever the machine lacks; what is left out is said, or stops where it must."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUIET = ["--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]


def run(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("IGRPO_")}
    variables |= {"IGRPO_BUILD_CUDA": "0", "PYTHONPATH": "", **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Made from a copy of what git knows: the build leaves its traces there."""
    folder = tmp_path_factory.mktemp("sdist")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "copy" / name)
    done = run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder], folder / "copy")
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    return archive


def build_wheel(sdist: Path, folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess, Path | None]:
    command = [sys.executable, "-m", "pip", "wheel", "-v", *QUIET, "-w", folder, sdist]
    done = run(command, folder, **environment)
    return done, next(folder.glob("*.whl"), None)


def test_the_sdist_holds_what_a_build_needs_and_no_records(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    packages = {str(path.relative_to(ROOT)) for path in ROOT.glob("igrpo*/**/*.py")}
    assert names >= sources | packages | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "experiments/"))]
    assert sdist.stat().st_size < 1_500_000


def test_without_a_working_compiler_it_is_pure_python_or_stops(sdist, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no licence' >&2\nexit 1\n")
    broken.chmod(0o755)
    done, wheel = build_wheel(sdist, tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0 and wheel.name.endswith("-py3-none-any.whl")
    assert (
        "igrpo_kernels._C_cpu is left out: the compiler 'no-such-compiler' cannot be run" in done.stdout + done.stderr
    )
    names = zipfile.ZipFile(wheel).namelist()
    assert "igrpo/report/page.js" in names and not [n for n in names if n.endswith(".so") or n.startswith("csrc")]
    wheel.unlink()
    done, wheel = build_wheel(sdist, tmp_path, CXX=str(broken), IGRPO_REQUIRE_EXT="1")
    assert done.returncode != 0 and wheel is None
    assert "_C_cpu cannot be built" in done.stdout + done.stderr and "no licence" in done.stdout + done.stderr


def test_with_a_compiler_the_wheel_is_of_no_python_abi_and_computes(sdist, tmp_path):
    done, wheel = build_wheel(sdist, tmp_path, IGRPO_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stderr
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    target = tmp_path / "site"
    assert run([sys.executable, "-m", "pip", "install", *QUIET, "--target", target, wheel], tmp_path).returncode == 0
    code = (
        "import sys, torch, igrpo_kernels as k; assert sys.argv[1] in k.__file__;"
        "x = torch.randn(3, 9); a = k.selective_log_softmax(x, torch.tensor([1, 2, 3]), impl='cpu');"
        "print((a - x.log_softmax(-1)[[0, 1, 2], [1, 2, 3]]).abs().max().item() < 1e-6)"
    )
    done = run([sys.executable, "-c", code, str(target)], tmp_path, PYTHONPATH=str(target))
    assert done.stdout.strip() == "True", done.stderr
