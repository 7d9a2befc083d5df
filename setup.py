"""Builds igrpo_kernels/_C_cpu.so, and _C_cuda.so where that makes sense. Everything else is in pyproject.toml.

    IGRPO_REQUIRE_EXT=1  a library that cannot be built stops the installation (`make setup` says so)
    IGRPO_SKIP_EXT=1     build neither: a working pure-Python install (impl="torch", "triton")
    IGRPO_BUILD_CUDA=1   build the CUDA library with nvcc even though this torch has no CUDA (0: never)
    IGRPO_CUDA_ARCHS     default "80 90a 100a"; what nvcc does not know is left out
    CXX                  default "c++"

The libraries are optional parts: without torch, a compiler or nvcc, or where one of them fails, the package is
installed without, and says at the first call what is slower and how to mend it. Both use LibTorch's stable ABI: no
Python headers, one binary for every torch >= 2.11. So the headers of any torch serve, and those of the environment that
is installed into are found from inside pip's isolated build too, where torch itself cannot be imported.
"""

import importlib.machinery
import importlib.util
import os
import platform
import re
import runpy
import shutil
import site
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1; Python 3.11's venv holds 65.5
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        raise SystemExit(
            "error: this setuptools is too old to make a wheel by itself; `pip install wheel` or leave out "
            "--no-build-isolation"
        ) from None

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86_64 = platform.machine() in ("x86_64", "AMD64")
# The oldest torch the binaries must load under, as LibTorch encodes it: 2.11.
OLDEST_TORCH = (2, 11)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# No errno, no traps: otherwise every comparison and conversion is compiled as if a signal could follow it.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=switch", "-Wno-psabi",
             "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # fmt: skip
CPU_SOURCES = {  # source -> its own flags
    "bindings.cpp": [],
    "cpu/dispatch.cpp": [],
    "cpu/rows_portable.cpp": [],
}
if X86_64:
    CXX_FLAGS.append("-DIGRPO_X86_64")
    CPU_SOURCES |= {
        "cpu/rows_avx2.cpp": ["-mavx2", "-mfma"],
        "cpu/rows_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma",
                                "-mprefer-vector-width=512"],
    }  # fmt: skip
CUDA_FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden",
              "-Xptxas", "-warn-spills,-warn-lmem-usage"]  # fmt: skip
CXX = os.environ.get("CXX") or "c++"
CUDA_ARCHS = os.environ.get("IGRPO_CUDA_ARCHS", "80 90a 100a").split()
CUDA_SOURCES = {
    "cuda/launch_bf16.cu": [],
    "cuda/launch_fp16.cu": [],
    "cuda/launch_fp32.cu": [],
    "cuda/launch.cpp": [],
    "cuda/bindings_cuda.cpp": ["-DUSE_CUDA"],
}

WAY_OUT = "Without IGRPO_REQUIRE_EXT=1 the package is installed without it; IGRPO_SKIP_EXT=1 does not try."
LEFT_OUT = (
    "The package works without it, slower: impl='auto' then uses Triton on a GPU and PyTorch on a CPU. "
    "IGRPO_REQUIRE_EXT=1 stops instead."
)


class NotBuilt(Exception):
    """Why a library cannot be built here, in words a user can act on."""


class BuildKernels(build_ext):
    """Compiles each source with its own flags; what cannot be built is left out, and says why."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"  # not a Python module: no ABI tag

    def build_extension(self, ext: Extension) -> None:
        out, work = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp).resolve() / ext.name
        out.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        try:
            commands, link = ext.plan(work)
            if commands:
                compile_and_link(commands, link, out)
        except NotBuilt as reason:
            out.unlink(missing_ok=True)  # of an earlier build in this folder: it would be packed
            if switched_on("IGRPO_REQUIRE_EXT"):
                raise SystemExit(f"error: {ext.name} cannot be built.\n{reason}\n{WAY_OUT}") from None
            sys.stderr.write(f"warning: {ext.name} is left out: {reason}\n{LEFT_OUT}\n")


class Wheel(bdist_wheel):
    """Tagged for what it holds: no Python ABI, and no platform where nothing was compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag = super().get_tag()[2]
        built = any(Path(self.distribution.get_command_obj("build").build_lib, "igrpo_kernels").glob("_C_*.so"))
        return "py3", "none", platform_tag if built else "any"


class Library(Extension):
    """One shared library; `plan` answers with its compile commands and its link command (without the output).

    No commands: nobody wants it here. Raises NotBuilt where it is wanted and cannot be had.
    """

    def __init__(self, name: str, sources: dict[str, list[str]], plan) -> None:
        super().__init__(name, [f"csrc/{source}" for source in sources], optional=True)
        self.plan = lambda work: plan(sources, work)


def compile_and_link(commands: list[list[str]], link: list[str], out: Path) -> None:
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        list(pool.map(run, commands))
    # Replaced in one step: a process that has the old library open keeps it.
    staging = out.with_suffix(".so.tmp")
    run([*link, "-o", str(staging)])
    os.replace(staging, out)


def cpu_plan(sources: dict[str, list[str]], work: Path) -> tuple[list[list[str]], list[str]]:
    includes, libraries = torch_paths()
    commands = [
        [CXX, *CXX_FLAGS, *flags, TORCH_TARGET, hash_flag("_C_cpu"), *includes, "-c", str(CSRC / source),
         "-o", str(object_file(work, source))]
        for source, flags in sources.items()
    ]  # fmt: skip
    objects = [str(object_file(work, source)) for source in sources]
    return commands, [CXX, "-shared", *objects, *libraries, "-ltorch", "-ltorch_cpu", "-lc10"]


def cuda_plan(sources: dict[str, list[str]], work: Path) -> tuple[list[list[str]], list[str]]:
    nvcc = wanted_nvcc()
    if nvcc is None:
        return [], []
    includes, libraries = torch_paths()
    archs = [flag for a in known_archs(nvcc) for flag in gencode(a)]
    commands = []
    for source, flags in sources.items():
        if source.endswith(".cu"):
            command = [nvcc, *CUDA_FLAGS, *archs]  # torch-free
        else:
            command = [CXX, *CXX_FLAGS, *flags, TORCH_TARGET, hash_flag("_C_cuda"), *includes]
        commands.append([*command, "-c", str(CSRC / source), "-o", str(object_file(work, source))])
    objects = [str(object_file(work, source)) for source in sources]
    # nvcc links: it knows where its own runtime lies. libtorch, which leads to libtorch_cuda in a CUDA build of torch,
    # has no symbol of its own and must be kept all the same; so a CPU build can link what a CUDA build loads.
    link = [nvcc, "-shared", "-cudart", "static", *objects, *libraries]
    return commands, [*link, "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]


def wanted_nvcc() -> str | None:
    """nvcc, where it is there, and either this torch can use the result or somebody asked for it."""
    wish, nvcc = os.environ.get("IGRPO_BUILD_CUDA", ""), shutil.which("nvcc")
    if wish == "0":
        return None
    if nvcc is None:
        if wish:
            raise NotBuilt("IGRPO_BUILD_CUDA=1, but nvcc is not on PATH")
        return None
    return nvcc if wish or torch_version()["cuda"] is not None else None


def gencode(arch: str) -> list[str]:
    return ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]


def known_archs(nvcc: str) -> list[str]:
    """Those of IGRPO_CUDA_ARCHS that this nvcc can compile for: before 12.8 it has no 100a."""
    words = {arch: try_run([nvcc, *gencode(arch), "--dryrun", "-x", "cu", "-c", os.devnull]) for arch in CUDA_ARCHS}
    known = [arch for arch, refusal in words.items() if refusal is None]
    for arch in words.keys() - set(known):
        sys.stderr.write(f"warning: no kernels for sm_{arch}: {words[arch].splitlines()[-1]}\n")
    if not known:
        raise NotBuilt(f"nvcc compiles for none of {' '.join(CUDA_ARCHS)} (IGRPO_CUDA_ARCHS)")
    return known


def torch_folder() -> Path:
    """Of the torch in this environment, without importing it: an isolated build hides it and what it needs."""
    sites = [*site.getsitepackages(), site.getusersitepackages()]
    spec = importlib.util.find_spec("torch") or importlib.machinery.PathFinder.find_spec("torch", sites)
    if spec is None or spec.origin is None:
        raise NotBuilt(
            "there is no torch in this environment: install torch first (with an installer other than pip, which hides "
            "it from a build, also say --no-build-isolation)"
        )
    return Path(spec.origin).parent


def torch_version() -> dict:
    """The names that torch/version.py defines: __version__, cuda, ..."""
    return runpy.run_path(str(torch_folder() / "version.py"))


def torch_paths() -> tuple[list[str], list[str]]:
    """Include and library flags of the torch this environment has."""
    root, version = torch_folder(), torch_version()["__version__"]
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TORCH:
        raise NotBuilt(f"this environment has torch {version}; the compiled kernels need 2.11 or newer")
    return ["-isystem", str(root / "include")], [f"-L{root / 'lib'}"]


def object_file(work: Path, source: str) -> Path:
    return work / f"{source.replace('/', '_')}.o"


def hash_flag(library: str) -> str:
    source_hash = runpy.run_path(str(ROOT / "igrpo_kernels" / "source_hash.py"))["source_hash"]
    return f'-DIGRPO_SOURCE_HASH="{source_hash(library, CSRC)}"'


def run(command: list[str]) -> None:
    refusal = try_run(command)
    if refusal is not None:
        raise NotBuilt(refusal)


def try_run(command: list[str]) -> str | None:
    """None when the command succeeded, else it and what it said; warnings of one that succeeded are shown."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return f"the compiler {command[0]!r} cannot be run ({error}); install one (Debian: apt install g++) or set CXX"
    if done.returncode != 0:
        return f"{' '.join(command)}\n{done.stdout}{done.stderr}".rstrip()
    sys.stderr.write(done.stderr)
    return None


def switched_on(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


LIBRARIES = [Library("igrpo_kernels._C_cpu", CPU_SOURCES, cpu_plan)]
if os.environ.get("IGRPO_BUILD_CUDA") != "0":
    LIBRARIES.append(Library("igrpo_kernels._C_cuda", CUDA_SOURCES, cuda_plan))

setup(
    # Here and not in pyproject.toml: setuptools before 77 refuses the expression there, and later ones the table.
    license="Apache-2.0",
    ext_modules=[] if switched_on("IGRPO_SKIP_EXT") else LIBRARIES,
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
