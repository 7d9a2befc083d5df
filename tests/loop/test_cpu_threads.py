"""Waiting OpenMP threads give their cores away, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from igrpo.config import TrainConfig
from igrpo.cpu_threads import SPINS, shared_cores
from igrpo.engines.serve import server_environment

TRAIN = """
import os, sys
from igrpo.train import main
assert main(["--config", "/no/such/recipe.yaml"]) == 2
assert "torch" not in sys.modules  # the OpenMP library reads its variables when torch loads it
print(os.environ.get("GOMP_SPINCOUNT"))
"""


def ask_train(**variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | variables
    done = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_run_sets_it_before_torch_is_there_and_leaves_the_users_choice():
    assert ask_train() == SPINS
    assert ask_train(GOMP_SPINCOUNT="7") == "7"
    assert ask_train(OMP_WAIT_POLICY="active") == "None"


def test_a_server_on_a_cpu_gets_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    config = TrainConfig(model_name_or_path="m", dataset_name="d")
    assert server_environment(config, "secret", on_cpu=True).items() >= shared_cores({}).items()
    assert "GOMP_SPINCOUNT" not in server_environment(config, "secret", on_cpu=False)
