"""What `vllm_engine_args` may hold: any argument of vLLM's engine but those that the loop relies on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from igrpo.settings import ConfigError

KEYS = {
    "model": "model_name_or_path", "revision": "model_revision", "trust_remote_code": "trust_remote_code",
    "dtype": "bf16", "quantization": "vllm_quantization", "max_model_len": "vllm_max_model_length",
    "max_num_seqs": "vllm_max_num_seqs", "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "tensor_parallel_size": "vllm_tensor_parallel_size", "enable_sleep_mode": "vllm_enable_sleep_mode", "seed": "seed",
    "enable_return_routed_experts": "router_replay", "host": "vllm_server_host", "port": "vllm_server_port",
}  # fmt: skip
"""Arguments that have a key here."""
_IDS, _WEIGHTS, _POLICY = (
    "token ids go in and out, as the model's own tokenizer gives them",
    "every push replaces the weights, which are the model's own",
    "what is sampled from must be the policy, and its log-probabilities those of the tokens",
)
_PROCESSES, _SECRETS = "no push was tried with them", "settings are written into logs; export it, as vLLM's page says"
_SERVERS = "it changes how the trainer reaches its servers"
OWN = {
    **dict.fromkeys(("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"), _IDS),
    **dict.fromkeys(("load_format", "model_loader_extra_config", "weight_transfer_config", "hf_overrides",
                     "hf_config_path", "quantization_config", "model_weights", "worker_cls",
                     "worker_extension_cls", "runner", "convert", "middleware"), _WEIGHTS),
    **dict.fromkeys(("logprobs_mode", "max_logprobs", "generation_config", "override_generation_config",
                     "logits_processors", "enable_prefix_caching", "speculative_config", "enable_lora",
                     "lora_modules", "lora_target_modules", "lora_dtype", "max_lora_rank", "max_loras",
                     "return_sampling_mask"), _POLICY),
    **dict.fromkeys(("pipeline_parallel_size", "data_parallel_size", "data_parallel_rank", "nnodes",
                     "prefill_context_parallel_size", "decode_context_parallel_size", "enable_expert_parallel",
                     "distributed_executor_backend"), _PROCESSES),
    **dict.fromkeys(("served_model_name", "config", "uds", "headless", "ssl_keyfile", "ssl_certfile"), _SERVERS),
    **dict.fromkeys(("hf_token", "api_key"), _SECRETS),
}  # fmt: skip
"""Arguments that nobody may set, and why."""


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, for which vLLM makes room."""


def adapter_arguments(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Of an engine that keeps a base and gets adapters alone.

    Args:
        adapter: what ``adapter_config.json`` says of them.
    """
    room = next(room for room in RANKS if room >= adapter["r"])
    # Layers without an adapter are left as they are: they cost nothing then.
    layers = sorted({name.rpartition(".")[2] for name in adapter["target_modules"]})
    return {"enable_lora": True, "max_lora_rank": room, "max_loras": 1, "lora_target_modules": layers}


def check_arguments(given: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: one that has a key of its own, or that would break what the loop relies on.
    """
    for name in given:
        plain = name.strip().lstrip("-").replace("-", "_").removeprefix("no_")
        if plain != name:
            raise ConfigError(f"vllm_engine_args: {name} is no name of an argument; write {plain}, as vLLM's LLM takes")
        if not name.isidentifier():
            raise ConfigError(f"vllm_engine_args: {name!r} is no name of an argument; write those of vLLM's LLM")
        if name in KEYS:
            raise ConfigError(f"vllm_engine_args: {name} has a key of its own; write {KEYS[name]}")
        known = {*KEYS, *OWN}
        if name not in known and (whole := min((one for one in known if one.startswith(name)), default="")):
            raise ConfigError(f"vllm_engine_args: {name} is short for {whole}, which a server would take; write it out")
        if name in OWN:
            raise ConfigError(f"vllm_engine_args: {name} cannot be had, as {OWN[name]}; leave it out")


def as_words(given: Mapping[str, Any]) -> Iterator[str]:
    """The arguments as a server's command line has them."""
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, list):
            yield from (f"--{flag}", *map(str, value))
        elif value is not None:
            yield from (f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value))
