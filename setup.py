"""Builds igrpo_kernels/_C_cpu.so, and _C_cuda.so where that makes sense. Everything else is in pyproject.toml.

    IGRPO_SKIP_EXT=1     build neither: a working pure-Python install (impl="torch", "triton")
    IGRPO_BUILD_CUDA=1   build the CUDA library with nvcc even though this torch has no CUDA (0: never)
    IGRPO_CUDA_ARCHS     default "80 90a 100a"
    CXX                  default "c++"

Both libraries use LibTorch's stable ABI: no Python headers, one binary for every torch >= 2.11. Install with
`pip install --no-build-isolation -e .`; an isolated build would download another torch.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86_64 = platform.machine() in ("x86_64", "AMD64")
# The oldest torch the binaries must load under, as LibTorch encodes it: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# No errno, no traps: otherwise every comparison and conversion is compiled as if a signal could follow it.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi",
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
CUDA_ARCHS = os.environ.get("IGRPO_CUDA_ARCHS", "80 90a 100a").split()
CUDA_SOURCES = {
    "cuda/launch_bf16.cu": [],
    "cuda/launch_fp16.cu": [],
    "cuda/launch_fp32.cu": [],
    "cuda/launch.cpp": [],
    "cuda/bindings_cuda.cpp": ["-DUSE_CUDA"],
}


class BuildKernels(build_ext):
    """Compiles each source with its own flags; a failure shows the command, the compiler's words and the way out."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"  # not a Python module: no ABI tag

    def build_extension(self, ext: Extension) -> None:
        out, work = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp).resolve() / ext.name
        out.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        commands, link = ext.plan(work)
        with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
            list(pool.map(run, commands))
        # Replaced in one step: a process that has the old library open keeps it.
        staging = out.with_suffix(".so.tmp")
        run([*link, "-o", str(staging)])
        os.replace(staging, out)


class Library(Extension):
    """One shared library; `plan` answers with its compile commands and its link command (without the output)."""

    def __init__(self, name: str, sources: dict[str, list[str]], plan) -> None:
        super().__init__(name, [f"csrc/{source}" for source in sources])
        self.plan = lambda work: plan(sources, work)


def cpu_plan(sources: dict[str, list[str]], work: Path) -> tuple[list[list[str]], list[str]]:
    compiler = os.environ.get("CXX", "c++")
    includes, libraries = torch_paths()
    commands = [
        [compiler, *CXX_FLAGS, *flags, TORCH_TARGET, hash_flag("_C_cpu"), *includes, "-c", str(CSRC / source),
         "-o", str(object_file(work, source))]
        for source, flags in sources.items()
    ]  # fmt: skip
    objects = [str(object_file(work, source)) for source in sources]
    return commands, [compiler, "-shared", *objects, *libraries, "-ltorch", "-ltorch_cpu", "-lc10"]


def cuda_plan(sources: dict[str, list[str]], work: Path) -> tuple[list[list[str]], list[str]]:
    compiler, nvcc = os.environ.get("CXX", "c++"), shutil.which("nvcc")
    includes, libraries = torch_paths()
    archs = [flag for a in CUDA_ARCHS for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    commands = []
    for source, flags in sources.items():
        if source.endswith(".cu"):
            command = [nvcc, *CUDA_FLAGS, *archs]  # torch-free
        else:
            command = [compiler, *CXX_FLAGS, *flags, TORCH_TARGET, hash_flag("_C_cuda"), *includes]
        commands.append([*command, "-c", str(CSRC / source), "-o", str(object_file(work, source))])
    objects = [str(object_file(work, source)) for source in sources]
    # A CPU build of torch has no libtorch_cuda: the library then links, for inspection, but does not load.
    torch_cuda = ["-ltorch_cuda"] if any(Path(flag[2:], "libtorch_cuda.so").exists() for flag in libraries) else []
    # nvcc links: it knows where its own runtime lies.
    link = [nvcc, "-shared", "-cudart", "static", *objects, *libraries]
    return commands, [*link, "-ltorch", "-ltorch_cpu", *torch_cuda, "-lc10"]


def wants_cuda() -> bool:
    """nvcc is there, and either this torch can use the result or somebody asked for it."""
    wish = os.environ.get("IGRPO_BUILD_CUDA", "")
    if wish == "0":
        return False
    if shutil.which("nvcc") is None:
        if wish:
            fail("IGRPO_BUILD_CUDA=1, but nvcc is not on PATH")
        return False
    if wish:
        return True
    import torch

    return torch.version.cuda is not None


def torch_paths() -> tuple[list[str], list[str]]:
    """Include and library flags of the torch this environment has."""
    try:
        import torch
    except ImportError as error:
        fail(f"torch cannot be imported ({error}): install it first and use `pip install --no-build-isolation`")
    root = Path(torch.__file__).parent
    return ["-isystem", str(root / "include")], [f"-L{root / 'lib'}"]


def object_file(work: Path, source: str) -> Path:
    return work / f"{source.replace('/', '_')}.o"


def hash_flag(library: str) -> str:
    source_hash = runpy.run_path(str(ROOT / "igrpo_kernels" / "source_hash.py"))["source_hash"]
    return f'-DIGRPO_SOURCE_HASH="{source_hash(library, CSRC)}"'


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        fail(f"the compiler {command[0]!r} was not found; install one (Debian: apt install g++) or set CXX")
    if done.returncode != 0:
        fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    sys.stderr.write(done.stderr)


def fail(reason: str) -> None:
    raise SystemExit(
        f"error: building the compiled kernels failed.\n{reason}\n"
        "IGRPO_SKIP_EXT=1 installs without them: impl='auto' then uses Triton on a GPU and PyTorch on a CPU, slower."
    )


def libraries() -> list[Library]:
    if os.environ.get("IGRPO_SKIP_EXT", "0") not in ("", "0"):
        return []
    found = [Library("igrpo_kernels._C_cpu", CPU_SOURCES, cpu_plan)]
    if wants_cuda():
        found.append(Library("igrpo_kernels._C_cuda", CUDA_SOURCES, cuda_plan))
    return found


setup(ext_modules=libraries(), cmdclass={"build_ext": BuildKernels})
