"""Started servers get GPUs that do not learn; engines that no push would reach are refused in a sentence."""

from __future__ import annotations

import pytest

from igrpo import train, training_run
from igrpo.config.train_config import TrainConfig
from igrpo.engines.layout import beside_the_learner, named_devices, visible_gpus, with_own_gpus
from igrpo.plan.command import main as plan
from igrpo.settings import ConfigError

FOUR = ["0", "1", "2", "3"]
NAMED = ["GPU-1a2b", "GPU-3c4d", "MIG-5e6f"]
SHARE = {"vllm_weight_transfer": "file"}
IPC = {"vllm_weight_transfer": "ipc"}


def config(**settings) -> TrainConfig:
    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "vllm_mode": "server"}
    return TrainConfig(**given | settings)


@pytest.mark.parametrize(
    ("gpus", "local", "settings", "devices"),
    [
        (FOUR, 1, {}, "1"),
        (FOUR, 2, {"vllm_num_servers": 2}, "2,3"),
        (FOUR, 2, {"vllm_tensor_parallel_size": 2}, "2,3"),
        (["4", "6"], 1, {}, "6"),  # those of CUDA_VISIBLE_DEVICES
        (NAMED, 2, {}, "MIG-5e6f"),
        (FOUR[:1], 1, {"vllm_server_devices": "7"}, "7"),  # which the learner does not see
        (NAMED[:1], 1, {"vllm_server_devices": "GPU-3c4d"}, "GPU-3c4d"),
        (FOUR, 3, SHARE, "3"),
        (FOUR, 4, SHARE, None),
        (FOUR, 4, SHARE | {"vllm_server_devices": "0"}, "0"),
        (FOUR, 1, IPC, None),
        (FOUR, 1, IPC | {"vllm_server_devices": "0"}, "0"),
        (FOUR, 4, {"vllm_server_base_url": "http://127.0.0.1:8000"}, None),
        (FOUR, 4, {"vllm_mode": "colocate"}, None),
        (FOUR, 4, {"use_vllm": False}, None),
        ([], 4, {}, None),  # on the CPU
    ],
)
def test_servers_get_gpus_that_do_not_learn(gpus, local, settings, devices):
    assert beside_the_learner(config(**settings), gpus, local, local).vllm_server_devices == devices


@pytest.mark.parametrize(
    ("gpus", "local", "settings", "says"),
    [
        (FOUR[:1], 1, {}, "of the 1 that the trainer sees 0 are free"),
        (FOUR, 4, {}, "of the 4 that the trainer sees 0 are free"),
        (FOUR, 2, {"vllm_num_servers": 3}, "take 3 GPUs that no learner process uses"),
        (FOUR, 5, {}, "0 are free"),
        (FOUR, 2, {"vllm_server_devices": "1"}, "1 belongs to a learner process"),
        (FOUR, 2, {"vllm_server_devices": "01"}, "01 belongs to a learner process"),
        (["4", "6"], 1, {"vllm_server_devices": " 4"}, "4 belongs to a learner process"),
        (NAMED, 2, {"vllm_server_devices": "GPU-3c"}, "GPU-3c belongs to a learner process"),  # cut short
        (NAMED, 1, {"vllm_server_devices": "2"}, "2 belongs"),  # may be any of them
        (FOUR, 1, {"vllm_server_devices": "2,2", "vllm_num_servers": 2}, "names '2' where another GPU is wanted"),
        (FOUR, 1, {"vllm_server_devices": "2,", "vllm_num_servers": 2}, "names 'nothing'"),
        (FOUR, 1, {"vllm_server_devices": "2,3"}, "names 2 GPUs; 1 servers with vllm_tensor_parallel_size: 1 take 1"),
        (FOUR, 2, IPC, "ipc has one learner process, and 2 were started"),
        (FOUR, 2, IPC | {"vllm_server_base_url": "http://127.0.0.1:8000"}, "ipc has one learner process"),
        (FOUR, 1, IPC | {"vllm_server_devices": "1"}, "on the learner's own GPU only (0)"),
        (FOUR, 1, IPC | {"vllm_tensor_parallel_size": 2}, "on the learner's own GPU only (0)"),
        (FOUR, 1, {"vllm_mode": "colocate", "vllm_tensor_parallel_size": 2}, "write vllm_mode: server, or 1"),
    ],
)
def test_what_no_push_would_reach_is_refused(gpus, local, settings, says):
    with pytest.raises(ConfigError) as refused:
        beside_the_learner(config(**settings), gpus, local, local)
    key, _, _ = str(refused.value).partition(":")
    assert says in str(refused.value) and hasattr(config(), key.split()[0])


def test_an_evaluation_has_no_learner_and_gives_every_server_its_own():
    two = config(vllm_num_servers=2)
    assert with_own_gpus(two, FOUR).vllm_server_devices == "0,1"
    named = config(vllm_num_servers=2, vllm_server_devices="0, 3")
    assert named_devices(with_own_gpus(named, FOUR)) == ["0", "3"]
    for alone, gpus in ((two, FOUR[:1]), (two, []), (config(vllm_mode="colocate"), FOUR)):
        assert with_own_gpus(alone, gpus) is alone


def test_on_the_cpu_no_gpu_is_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_gpus(use_cpu=True) == []


def test_a_run_is_refused_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(training_run, "visible_gpus", lambda use_cpu: ["0"])
    out = tmp_path / "run"
    settings = {"model_name_or_path": "no/model", "dataset_name": "no/data", "output_dir": out, "vllm_mode": "server"}
    assert train.main([word for key, value in settings.items() for word in (f"--{key}", str(value))]) == 2
    assert capsys.readouterr().err.startswith("error: vllm_server_devices: the servers take 1 GPU that no learner")
    assert not out.exists()


def test_the_planner_refuses_it_too(capsys):
    words = ["recipes/openmath-nemotron-7b.yaml", "--hardware", "8xA100-80G", "--vllm_tensor_parallel_size", "2"]
    assert plan(words) == 2 and "write vllm_mode: server" in capsys.readouterr().err
    assert plan([*words, "--generation", "4"]) == 0
