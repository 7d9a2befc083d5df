"""Two gloo processes do what one does, replicated (DDP) or sharded (FSDP2): same losses, gradient norms and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM

from igrpo.learner import placements
from igrpo.learner.placements import Fsdp2, Whole
from igrpo.settings import ConfigError
from tests.support.train_on_ranks import CASES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[dict, dict, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = []
    for count in (1, 2):
        (folder / str(count)).mkdir()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
            "-m", "tests.support.train_on_ranks", str(folder / str(count) / "out.pt"),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        processes.append(torch.load(folder / str(count) / "out.pt", weights_only=True))
    assert [made["processes"] for made in processes] == [1, 2]
    return *processes, folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(launched, case):
    one, two = launched[0]["results"][case], launched[1]["results"][case]
    # bf16: a sharded model computes norms and residuals in bf16 too, so only the size of things can be compared.
    rel, weight_abs = (0.05, 0.05) if "bf16" in case else (1e-4, 1e-5)
    for a, b in zip(one["figures"], two["figures"], strict=True):
        assert a["grad_norm"] > 1e-3
        assert a == pytest.approx(b, rel=rel, abs=0.05 if "bf16" in case else 1e-6)
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        assert ".lora_" not in name and "base_layer" not in name
        torch.testing.assert_close(two["weights"][name], weight, rtol=rel, atol=weight_abs, msg=name)
    assert two["score"] == pytest.approx(one["score"], abs=0.2 if "bf16" in case else 1e-3)


def test_the_head_is_gathered_once_per_step(launched):
    """Two layers and the embedding, each gathered forward and backward in every micro-batch; the head once."""
    gathers = launched[1]["gathers"]
    assert gathers > 1 + 2 * 3 and (gathers - 1) % (2 * 3) == 0


def test_a_sharded_checkpoint_is_a_model_anyone_can_load(launched):
    for count in (1, 2):
        AutoModelForCausalLM.from_pretrained(launched[2] / str(count) / "sharded")
    merged = AutoModelForCausalLM.from_pretrained(launched[2] / "2" / "sharded, adapters, kl")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (launched[2] / "2" / "sharded, adapters, kl" / "adapter" / "adapter_config.json").is_file()


def test_launch_settings_that_cannot_work_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert placements.launched(2) is Fsdp2 and placements.launched(1) is Whole
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ConfigError, match=r"fsdp_cpu_ram_efficient_loading.*write false"):
        placements.launched(1)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_reads_its_recipes(name):
    loaded = load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    assert loaded.num_processes == 8 and loaded.mixed_precision == "bf16"
    if name == "fsdp2":
        assert loaded.distributed_type == "FSDP"
        known = {f.option_strings[0].removeprefix("--") for f in launch_command_parser()._actions if f.option_strings}
        assert set(loaded.fsdp_config) <= known  # a key that accelerate does not know would be ignored
        assert loaded.fsdp_config["fsdp_version"] == 2 and not loaded.fsdp_config["fsdp_cpu_ram_efficient_loading"]
