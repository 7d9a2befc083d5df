"""Makes .venv complete: creates it, installs the pinned list and this project, and notes when it is whole.

Standard library only; run by `make` with the system's Python. A set-up that was interrupted leaves no note, and then
the folder is built again from nothing: a half-installed package can look installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
NOTE = VENV / "complete"
REQUIREMENTS = ROOT / "requirements" / "cpu.txt"
INPUTS = (REQUIREMENTS, ROOT / "pyproject.toml", ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.*")))
OLDEST, NEWEST = (3, 11), (3, 13)
BREAKS_TRANSFORMERS = ("torchvision", "torchaudio", "torchcodec")


def fingerprint() -> str:
    """Changes when the pinned list, the project's metadata, the C++ sources or the interpreter do."""
    digest = hashlib.sha256(f"{sys.version_info[:2]}{ROOT}".encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def noted() -> str | None:
    return NOTE.read_text(encoding="utf-8").strip() if NOTE.is_file() else None


def main() -> int:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"error: Python {found} does not fit; run make PYTHON=python3.11 (3.11 to 3.13)", file=sys.stderr)
        return 2
    if noted() == fingerprint():
        return 0
    if VENV.exists() and noted() is None:
        print("an unfinished .venv is built again", flush=True)
        shutil.rmtree(VENV)
    print("setting up .venv (about 4 GB; two to five minutes the first time)", flush=True)
    if not VENV.exists():
        venv.create(VENV, with_pip=True)
    NOTE.unlink(missing_ok=True)
    try:
        install()
        check()
    except subprocess.CalledProcessError as error:
        print(f"error: set-up stopped at `{' '.join(map(str, error.cmd[1:]))}`; mend that and run make again",
              file=sys.stderr)  # fmt: skip
        return 1
    staging = NOTE.with_suffix(".tmp")
    staging.write_text(fingerprint(), encoding="utf-8")
    os.replace(staging, NOTE)
    return 0


def install() -> None:
    pip = [VENV / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "-r", REQUIREMENTS], check=True, cwd=ROOT)
    # Isolation would download another torch to build against.
    required = {"IGRPO_REQUIRE_EXT": "1", **os.environ}  # a developer must see a compile that fails
    subprocess.run([*pip, "--no-build-isolation", "-e", ROOT], check=True, cwd=ROOT, env=required)


def check() -> None:
    """Imports what a run imports, so that a broken set-up is told here and not in the middle of one."""
    unwanted = ", ".join(f"find_spec({name!r})" for name in BREAKS_TRANSFORMERS)
    code = (
        "from importlib.util import find_spec\n"
        "import torch, transformers, vllm, igrpo.train, igrpo_kernels\n"
        f"assert not any([{unwanted}]), 'remove torchvision, torchaudio and torchcodec from .venv'\n"
    )
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    subprocess.run([VENV / "bin" / "python", "-W", "ignore", "-c", code], check=True, cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())
