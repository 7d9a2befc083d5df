"""The command line and the environment of a vLLM server, whoever starts it: the trainer, or ``igrpo.serve``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igrpo.engines.arguments import adapter_arguments, as_words
from igrpo.engines.config import EngineConfig
from igrpo.engines.servers.auth import SECRET_VARIABLE
from igrpo.engines.servers.openmp import shared_cores

SERVED_NAME = "policy"
CPU_BATCHED_TOKENS = 2048
KEEP_ALIVE_SECONDS = 60
"""Until the server closes an idle connection."""


def server_command(
    config: EngineConfig,
    path: str,
    length: int,
    port: int,
    seed: int,
    on_cpu: bool,
    adapter: Mapping[str, Any] | None = None,
) -> list[str]:
    """The command line of one server; it holds no secret.

    Args:
        adapter: peft's description of those that it gets in place of weights.
    """
    options = {
        "model": path,
        "served-model-name": SERVED_NAME,
        "host": config.vllm_server_host,
        "port": port,
        "dtype": "bfloat16" if config.bf16 else "float32",
        "max-model-len": length,
        "max-num-seqs": config.vllm_max_num_seqs,
        "logprobs-mode": "processed_logprobs",  # after temperature: what the loss needs
        "max-logprobs": -1,  # what top-k left may be many
        "generation-config": "vllm",  # no sampling defaults from the model's files
        "seed": seed,
        "middleware": "igrpo.engines.servers.auth.RequireSecret",
        "worker-extension-cls": "igrpo.engines.servers.vllm_worker.ReadsBack",
        "weight-transfer-config": json.dumps({"backend": config.weight_backend(on_cpu)}),
    }
    flags = [
        "skip-tokenizer-init",
        "enable-prefix-caching",
        "disable-uvicorn-access-log",
        "enable-prompt-tokens-details",
    ]
    if config.model_revision:
        options["revision"] = config.model_revision
    if config.vllm_quantization:
        options["quantization"] = config.vllm_quantization
    if config.trust_remote_code:
        flags.append("trust-remote-code")
    if on_cpu:
        # A seeded request whose prompt is read in chunks breaks the CPU backend, so prompts are read whole. The block
        # size is the smallest it takes: prefixes are cached in steps of it.
        options |= {
            "block-size": 32,
            "max-num-batched-tokens": max(length, CPU_BATCHED_TOKENS),
            "distributed-executor-backend": "uni",  # the worker inside the engine's process: a third less to start
        }
        flags += ["enforce-eager", "no-enable-chunked-prefill"]
    else:
        options |= {
            "gpu-memory-utilization": config.vllm_gpu_memory_utilization,
            "tensor-parallel-size": config.vllm_tensor_parallel_size,
        }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    words += [f"--{flag}" for flag in flags]
    more = as_words(config.vllm_engine_args | (adapter_arguments(adapter) if adapter else {}))
    # Not the `vllm` script: the one in the CPU build looks up a distribution of another name and fails.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *more]


def server_environment(config: EngineConfig, secret: str, on_cpu: bool, devices: str | None = None) -> dict[str, str]:
    """What a server needs besides this process's environment; ``devices`` are the GPUs it may use."""
    root = str(Path(__file__).resolve().parents[3])
    environment = {
        SECRET_VARIABLE: secret,
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_SERVER_DEV_MODE": "1",  # the endpoints for weights, pausing and aborting; closed by our middleware
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if on_cpu else "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if config.sends_adapter else "0",  # one endpoint more
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    if config.weight_backend(on_cpu) == "ipc":
        # CUDA handles travel pickled; only who knows the secret can send one.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if on_cpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get(
            "VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.vllm_cpu_kvcache_gib)))
        )
        environment |= shared_cores(os.environ)
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    return environment
