"""DeepSpeed ZeRO-3: where it is installed, two gloo processes do what one does without it; its settings anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import DeepSpeedPlugin
from accelerate.commands.config.config_args import load_config_from_file

from igrpo.config.train_config import TrainConfig
from igrpo.learner import placements
from igrpo.learner.placements import Zero3, zero3
from igrpo.settings import ConfigError
from tests.support.train_on_ranks import ZERO3

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[dict, dict, Path]:
    folder = tmp_path_factory.mktemp("zero3")
    # By default DeepSpeed leaves small weights whole, and of a tiny model that is all of them.
    divide_all = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "deepspeed.json").write_text(json.dumps(divide_all))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "deepspeed.json"),
    }  # fmt: skip
    results = []
    for count in (1, 2):
        (folder / str(count)).mkdir()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
            "-m", "tests.support.train_on_ranks", str(folder / str(count) / "out.pt"), "ZERO3",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        results.append(torch.load(folder / str(count) / "out.pt", weights_only=True)["results"])
    return results[0], results[1], folder


@pytest.mark.needs_package("deepspeed")
@pytest.mark.timeout(1800)  # DeepSpeed compiles its shared-memory communication on first use
@pytest.mark.parametrize("case", ZERO3)
def test_two_processes_equal_one_without_deepspeed(launched, case):
    one, two = launched[0][case], launched[1][case]
    rel, weight_abs = (0.05, 0.05) if "bf16" in case else (1e-4, 1e-4)
    for a, b in zip(one["figures"], two["figures"], strict=True):
        assert a["grad_norm"] > 1e-3
        assert a == pytest.approx(b, rel=rel, abs=0.05 if "bf16" in case else 1e-6)
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=rel, atol=weight_abs, msg=name)
    assert two["score"] == pytest.approx(one["score"], abs=0.2 if "bf16" in case else 1e-3)


def test_launch_settings_that_cannot_work_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero3.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"deepspeed package is not installed.*fsdp2\.yaml"):
        placements.launched(2)
    monkeypatch.setattr(zero3.importlib.util, "find_spec", lambda name: object())
    assert placements.launched(1) is placements.launched(2) is Zero3
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", "true")
    with pytest.raises(ConfigError, match=r"zero3_init_flag.*write false"):
        placements.launched(2)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(ConfigError, match=r"zero_stage: 2.*write 3"):
        placements.launched(2)


def test_accelerates_plugin_becomes_settings_without_auto(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false")
    config = TrainConfig(model_name_or_path="m", dataset_name="d", max_grad_norm=0.5, bf16=True)
    made = zero3.settings(DeepSpeedPlugin().deepspeed_config, config)
    assert made["zero_optimization"]["stage"] == 3 and made["gradient_clipping"] == 0.5 and made["bf16"]["enabled"]
    assert made["train_micro_batch_size_per_gpu"] == made["gradient_accumulation_steps"] == 1
    assert "train_batch_size" not in made and "auto" not in json.dumps(made, default=str)


def test_accelerate_reads_the_recipe():
    loaded = load_config_from_file(str(ROOT / "recipes" / "accelerate" / "zero3.yaml"))
    assert loaded.distributed_type == "DEEPSPEED" and loaded.num_processes == 8 and loaded.mixed_precision == "bf16"
    assert loaded.deepspeed_config["zero_stage"] == 3 and not loaded.deepspeed_config["zero3_init_flag"]
