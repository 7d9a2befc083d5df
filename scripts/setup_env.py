"""Makes .venv complete: creates it, installs a pinned list and this project, and notes when it is whole.

Standard library only; run by `make` with the system's Python. DEVICE=cpu or gpu chooses the list; otherwise a machine
with an NVIDIA driver gets requirements/gpu.txt and any other requirements/cpu.txt, with a build of torch for the CPU
where one can be had. A set-up that was interrupted leaves no note, and then the folder is built again from nothing: a
half-installed package can look installed. Everything that can go wrong is told in one sentence; pip's own words are in
.venv/setup.log.

    python scripts/setup_env.py             sets up
    python scripts/setup_env.py --plan      says what it would choose, and does nothing
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from find_gpu import Choice, choose_device
from pip_progress import PipFailed, run_pip

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
NOTE = VENV / "complete"
LISTS = ROOT / "requirements"
OLDEST, NEWEST = (3, 11), (3, 13)
BREAKS_TRANSFORMERS = ("torchvision", "torchaudio", "torchcodec")
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_GB = {"cpu": 5, "cuda libraries": 9, "gpu": 14}


class SetupError(Exception):
    """One sentence: what stopped the set-up and what to do."""


def main() -> int:
    fitting_python()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` and schedulers: the same as Ctrl-C
    try:
        if sys.argv[1:] == ["--plan"]:
            print(wanted(noted()).sentence)
            return 0
        with only_one():
            set_up()
    except (SetupError, PipFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nthe set-up was interrupted; make begins it anew", file=sys.stderr)
        return 130
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = f"the disk of {ROOT} is full; free some room" if full else f"{error}; mend that"
        print(f"error: {way_out} and run make again", file=sys.stderr)
        return 1
    return 0


def fitting_python() -> None:
    """Goes on with another Python of this machine where this one is too old or too new."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        other = shutil.which(f"python3.{minor}")
        if other and subprocess.run([other, "-c", ""], capture_output=True).returncode == 0:  # a shim may lead nowhere
            os.execv(other, [other, *sys.argv])
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"error: Python {found} does not fit and there is no other; install 3.11, 3.12 or 3.13, or name it: "
             "make PYTHON=/path/to/python3.12")  # fmt: skip


@contextlib.contextmanager
def only_one():
    """Two makes at once would each take the other's folder for an unfinished one."""
    handle = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another make is setting up .venv; waiting for it", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # some network file systems lock no folders
        pass
    try:
        yield
    finally:
        os.close(handle)


def set_up() -> None:
    before = noted()
    choice = wanted(before)
    note = fingerprint(choice)
    if before is not None and {**before, "asked": choice.asked} == note:
        if before != note:
            write(note)
        return
    if VENV.is_symlink():
        raise SetupError(f"{VENV} is a link to an environment that is out of date; set that one up, or remove the link")
    need_compilers()
    rebuilt = VENV.exists() and (before is None or any(before[key] != note[key] for key in ("device", "python")))
    if rebuilt:
        was = "an unfinished .venv" if before is None else f".venv ({before['python']}, {before['device']})"
        print(f"{was} is built again", flush=True)
        shutil.rmtree(VENV)
    print(f"{'updating' if VENV.exists() else 'setting up'} .venv: {choice.sentence}", flush=True)
    create(choice)
    NOTE.unlink(missing_ok=True)
    start = time.monotonic()
    install(choice)
    check(choice)
    write(note)
    print(f".venv is complete ({round(time.monotonic() - start)} s)", flush=True)


def write(note: dict) -> None:
    staging = NOTE.with_suffix(".tmp")
    staging.write_text(json.dumps(note, indent=1), encoding="utf-8")
    os.replace(staging, NOTE)


def wanted(before: dict | None) -> Choice:
    """DEVICE, or what .venv was made for, or what this machine has."""
    asked = os.environ.get("DEVICE", "")
    if not asked and before and (before["asked"] or before["device"] == "gpu"):
        return Choice(before["device"], "as before", asked=before["asked"])
    try:
        return choose_device(asked)
    except ValueError as error:
        raise SetupError(str(error)) from None


def noted() -> dict | None:
    """What the complete .venv was made from; None where there is none, or only a part of one."""
    if not NOTE.is_file():
        return None
    try:
        return json.loads(NOTE.read_text(encoding="utf-8"))
    except ValueError:  # written before there was a choice
        return {"device": "cpu", "asked": False, "python": python(), "inputs": ""}


def fingerprint(choice: Choice) -> dict:
    """Changes when the device, the interpreter, the pinned lists, the project's metadata or its C++ sources do."""
    on_gpu = choice.device == "gpu"
    digest = hashlib.sha256(str(ROOT).encode())
    lists = [LISTS / "gpu.txt"] if on_gpu else [LISTS / "cpu.txt", LISTS / "cuda-libraries.txt"]
    for path in (*lists, ROOT / "pyproject.toml", ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.*"))):
        digest.update(path.read_bytes())
    return {"device": choice.device, "asked": choice.asked, "python": python(), "inputs": digest.hexdigest()}


def python() -> str:
    return "Python {}.{}".format(*sys.version_info[:2])


def compiler() -> str:
    return (os.environ.get("CXX") or "c++").split()[0]


def need_compilers() -> None:
    """Packages of the lists, vLLM's CPU build and Triton compile as well, at their installation or as they run."""
    if shutil.which(compiler()) is None:
        raise SetupError(f"there is no C++ compiler ({compiler()}); install one (Debian: apt install g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise SetupError(f"{python()} has no headers here; install them (Debian: apt install python3-dev)")


def create(choice: Choice) -> None:
    """The empty environment, where there is room for what comes into it."""
    if VENV.exists():
        return
    enough_room(NEEDED_GB[choice.device])
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        name = "python{}.{}-venv".format(*sys.version_info[:2])
        raise SetupError(f"{python()} here cannot make environments (no ensurepip); Debian, Ubuntu: apt install {name}")
    import venv

    try:
        venv.create(VENV, with_pip=True)
    except subprocess.CalledProcessError as error:
        raise SetupError(f"{python()} here cannot put pip into a new environment ({last_line(error.output)})") from None


def enough_room(gigabytes: int) -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < gigabytes:
        raise SetupError(f".venv needs about {gigabytes} GB and the disk of {ROOT} has {free:.1f} GB free; free some")


def install(choice: Choice) -> None:
    if choice.device == "gpu":
        # === leaves out 2.14.0+cpu, which an index with CPU builds would otherwise put before the CUDA build.
        lines = (LISTS / "gpu.txt").read_text(encoding="utf-8").replace("\ntorch==", "\ntorch===")
        run_pip(VENV, "the pinned list", "-r", written(lines))
    else:
        install_cpu()
    install_project(choice)


def written(lines: str) -> Path:
    path = VENV / "list.txt"
    path.write_text(lines, encoding="utf-8")
    return path


def install_cpu() -> None:
    lines = (LISTS / "cpu.txt").read_text(encoding="utf-8").splitlines()
    torch = next(line for line in lines if line.startswith("torch=="))
    print(f"torch: {install_torch(VENV, torch)}", flush=True)
    run_pip(VENV, "the pinned list", "-r", written("\n".join(line for line in lines if line != torch)))


def install_torch(venv: Path, torch: str) -> str:
    """The build for the CPU where one can be had, else the CUDA build with its libraries; says which, and why.

    ``torch`` is a line such as ``torch==2.13.0``; both builds have that version.
    """
    local = f"{torch}+cpu"
    try:
        run_pip(venv, local, local)
        return f"{local}, where pip finds its packages"
    except PipFailed as error:
        if not error.not_found:
            raise
    index = ("--index-url", PYTORCH_INDEX, "--timeout", "10", "--retries", "1")
    try:
        run_pip(venv, f"{local} from PyTorch's index", *index, local)
        return f"{local} from PyTorch's own index; pip's has none"
    except PipFailed as error:
        if not (error.not_found or error.unreachable):
            raise
    run_pip(venv, torch, torch)
    if not needs_cuda_libraries(venv):
        return f"{torch}, a build for the CPU"
    enough_room(NEEDED_GB["cuda libraries"] - 2)
    run_pip(venv, "its CUDA libraries", "-r", LISTS / "cuda-libraries.txt")
    return f"{torch}, the CUDA build with its libraries (4 GB more); pip finds no {local}, nor at PyTorch's own index"


def needs_cuda_libraries(venv: Path) -> bool:
    """Whether the torch that was installed names them as requirements."""
    (metadata,) = venv.glob("lib/python3*/site-packages/torch-*.dist-info/METADATA")
    return "Requires-Dist: nvidia-" in metadata.read_text(encoding="utf-8")


def install_project(choice: Choice) -> None:
    """Builds the compiled losses and makes the project importable."""
    # Isolation would download another torch to build against.
    project = ("this project, with its C++", "--no-build-isolation", "-e", ROOT)
    # A developer must see a compile that fails.
    strict = {"IGRPO_REQUIRE_EXT": os.environ.get("IGRPO_REQUIRE_EXT", "1")}
    if choice.device == "gpu":
        try:
            run_pip(VENV, *project, environment=strict | own_nvcc())
            return
        except PipFailed:
            print("csrc/cuda could not be compiled (.venv/setup.log); on the GPU the losses run in Triton", flush=True)
    run_pip(VENV, *project, environment=strict | {"IGRPO_BUILD_CUDA": os.environ.get("IGRPO_BUILD_CUDA", "0")})


def own_nvcc() -> dict[str, str]:
    """The nvcc of the list, which has the version of its torch; the machine's own may be too old or absent.

    Nothing where .venv has none.
    """
    toolkit = next(VENV.glob("lib/python3*/site-packages/nvidia/cu*"), None)
    if toolkit is None:
        return {}
    libraries = [str(toolkit / "lib"), *filter(None, [os.environ.get("LIBRARY_PATH")])]
    return {
        "PATH": os.pathsep.join([str(toolkit / "bin"), os.environ["PATH"]]),
        "LIBRARY_PATH": os.pathsep.join(libraries),
    }


def check(choice: Choice) -> None:
    """Imports what a run imports, so that a broken set-up is told here and not in the middle of one."""
    unwanted = "" if choice.device == "gpu" else ", ".join(f"find_spec({name!r})" for name in BREAKS_TRANSFORMERS)
    code = (
        "from importlib.util import find_spec\n"
        "import torch, transformers, vllm, igrpo.train, igrpo_kernels\n"
        f"assert not any([{unwanted}]), 'remove torchvision, torchaudio and torchcodec from .venv'\n"
    )
    if choice.seen:
        code += "assert torch.cuda.is_available(), f'torch {torch.__version__} does not see the GPU'\n"
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([VENV / "bin" / "python", "-W", "ignore", "-c", code], cwd=ROOT, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        with (VENV / "setup.log").open("a", encoding="utf-8") as log:
            log.write(done.stdout + done.stderr)
        raise SetupError(f"what was installed cannot be imported ({last_line(done.stderr)}); see .venv/setup.log")


def last_line(text: bytes | str | None) -> str:
    lines = (text.decode(errors="replace") if isinstance(text, bytes) else text or "").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


if __name__ == "__main__":
    sys.exit(main())
