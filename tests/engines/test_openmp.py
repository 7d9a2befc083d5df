"""Waiting OpenMP threads give their cores away, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from igrpo.config.train_config import TrainConfig
from igrpo.engines.servers.launch import server_environment
from igrpo.engines.servers.openmp import SPINS, shared_cores

TRAIN = """
import os, sys
from igrpo.train import main
# A tracker that is not installed ends the run after the settings are read and before anything heavy is imported.
words = ["--model_name_or_path", "m", "--dataset_name", "d", "--report_to", "swanlab", "--vllm_mode", sys.argv[1]]
assert main(words) == 2
assert "torch" not in sys.modules  # the OpenMP library reads its variables when torch loads it
print(os.environ.get("GOMP_SPINCOUNT"))
"""


def ask_train(mode: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | variables
    command = [sys.executable, "-c", TRAIN, mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_run_beside_servers_sets_it_before_torch_is_there_and_leaves_the_users_choice():
    assert ask_train("server") == SPINS
    assert ask_train("colocate") == "None"
    assert ask_train("server", GOMP_SPINCOUNT="7") == "7"
    assert ask_train("server", OMP_WAIT_POLICY="active") == "None"


def test_a_server_on_a_cpu_gets_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    config = TrainConfig(model_name_or_path="m", dataset_name="d")
    assert server_environment(config, "secret", on_cpu=True).items() >= shared_cores({}).items()
    assert "GOMP_SPINCOUNT" not in server_environment(config, "secret", on_cpu=False)


@pytest.mark.parametrize(("sync", "opens"), [("merged", "0"), ("adapter", "1")])
def test_what_the_shell_says_of_adapters_does_not_reach_a_server(monkeypatch, sync, opens):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    config = TrainConfig(model_name_or_path="m", dataset_name="d", use_peft=True, lora_sync=sync)
    assert server_environment(config, "secret", on_cpu=True)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == opens
