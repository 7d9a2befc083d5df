"""What `igrpo/engines` uses of vLLM is in the installed one's sources; what is taken away there is missed by name."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from igrpo.engines.arguments import KEYS, OWN, check_arguments
from scripts import vllm_contract

PACKAGES = Path(importlib.util.find_spec("vllm").origin).parents[1]


class Drifted(vllm_contract.Sources):
    """The installed sources with words replaced."""

    def __init__(self, changes):
        super().__init__(PACKAGES)
        self.changes = changes

    @cache  # noqa: B019
    def text(self, file):
        text = super().text(file)
        for old, new in self.changes.items():
            text = text.replace(old, new)
        return text


def test_all_that_the_engines_use_is_there():
    installed = vllm_contract.Sources(PACKAGES)
    assert list(vllm_contract.missing(installed)) == []
    free = installed.members("vllm.engine.arg_utils.EngineArgs").keys() - {*KEYS, *OWN}
    check_arguments(
        {name: 1 for name in free if name.islower() and not name.startswith("_")}
    )  # none is short for others


def test_each_kind_of_drift_is_missed_by_name():
    changes = {
        "class RequestOutputKind": "class OutputKind",
        "skip_tokenizer_init": "no_tokenizer",
        "weights_iterator": "weights",
        "VLLM_SERVER_DEV_MODE": "VLLM_DEV_MODE",
        '"/weight_info"': '"/weights"',
        "cache_salt": "salt",
        "reset_running_requests": "reset_running",
        "enable_sleep_mode": "enable_sleep",
        'tag="kv_cache"': 'tag="cache"',
        "def add_lora": "def load_lora",
        "class NCCLTrainerInitInfo": "class TrainerInfo",
        "def update_weight_version": "def set_version",
        "routed_experts": "experts",
        "[seq_len,layer_num,topk]": "[layer_num,seq_len,topk]",
    }
    found = set(vllm_contract.missing(Drifted(changes)))
    assert {
        ("imported names", "vllm.sampling_params.RequestOutputKind"),
        ("imported names", "vllm.distributed.weight_transfer.nccl_engine.NCCLTrainerInitInfo"),
        ("arguments of calls", "LLM(skip_tokenizer_init=)"),
        ("arguments of calls", "LLM(enable_sleep_mode=)"),
        ("sleep", 'vllm/v1/worker/gpu_worker.py: tag="kv_cache"'),
        ("adapters", "vllm.v1.engine.llm_engine.LLMEngine.add_lora"),
        ("weight versions", "vllm.LLM.update_weight_version"),
        ("chosen experts", "vllm.outputs.CompletionOutput.routed_experts"),
        ("chosen experts", f"vllm/outputs.py: {vllm_contract.WORDS['chosen experts'][1][0]}"),
        ("flags", "--skip-tokenizer-init"),
        ("members", "vllm.v1.worker.gpu_model_runner.GPUModelRunner.reload_weights(weights_iterator=)"),
        ("members", "vllm.LLM.reset_prefix_cache(reset_running_requests=)"),
        ("environment", "VLLM_SERVER_DEV_MODE"),
        ("endpoints", "/weight_info"),
        ("messages", "CompletionRequest.cache_salt"),
        ("messages", "/reset_prefix_cache: reset_running_requests"),
    } <= found
    assert {kind for kind, _ in found} <= set(vllm_contract.NOTICED_BY)


def test_the_tests_that_would_notice_exist():
    root = Path(vllm_contract.ROOT)
    for place in vllm_contract.NOTICED_BY.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (root / file).read_text() if name else (root / file).is_file(), place
