"""A vLLM server for training runs on other nodes: ``python -m igrpo.engines.serve --config recipes/x.yaml …``.

Reads the same recipe as the trainer, so that both mean the same model; a server that breaks is started again. The
trainer starts servers on its own machine by itself, with the command made here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from igrpo.config.recipe import parse_args
from igrpo.config.train_config import TrainConfig
from igrpo.config.unused import check_hardware
from igrpo.engines.servers.auth import SECRET_VARIABLE, check_bind, secret_from_environment
from igrpo.engines.servers.openmp import shared_cores
from igrpo.engines.servers.supervise import Health, supervise
from igrpo.machine import this_machine
from igrpo.settings import ConfigError

DEFAULT_PORT = 8000
SERVED_NAME = "policy"
CPU_BATCHED_TOKENS = 2048
EXIT_BAD_CONFIG, EXIT_SERVER = 2, 1
KEEP_ALIVE_SECONDS = 60
"""Until the server closes an idle connection."""
MAX_RESTARTS, OFTEN_SECONDS = 5, 1800.0
"""A server that ends more often than this in so many seconds would do so again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 2 a setting that cannot work, otherwise the server's."""
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        check_bind(config.vllm_server_host, config.vllm_server_allow_public)
        secret = secret_from_environment()
        from igrpo.models.loading import context_limit, resolve_model

        path = resolve_model(config.model_name_or_path)
        length = config.vllm_max_model_length or context_limit(path, config)
        if length is None:
            raise ConfigError("vllm_max_model_length: the model names no limit; write one that fits the refinements")
        on_cpu = this_machine(config.use_cpu).device == "cpu"
        # The recipe is the trainer's: what it says about reaching servers is none of this one's business.
        check_hardware(replace(config, use_vllm=True, vllm_mode="colocate"), on_cpu)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    os.environ.update(server_environment(config, secret, on_cpu))
    port = config.vllm_server_port or DEFAULT_PORT
    return keep_up(
        server_command(config, path, length, port, config.seed, on_cpu), config.vllm_server_host, port, secret
    )


def keep_up(command: Sequence[str], host: str, port: int, secret: str) -> int:
    """Runs the server, and starts it again when it ends or hangs after it came up; the exit code of the last one."""
    ends: list[float] = []
    while True:
        end = supervise(command, None, Health(host, port, secret))
        if end.asked:
            return end.code
        how = f"did not answer any more ({end.hung})" if end.hung else f"ended with code {end.code}"
        if not end.came_up:
            return _say(f"the server {how} before it came up; what it said stands above", end.code or EXIT_SERVER)
        ends = [*(moment for moment in ends if time.monotonic() - moment < OFTEN_SECONDS), time.monotonic()]
        if len(ends) > MAX_RESTARTS:
            often = f"for the {len(ends)}th time in {OFTEN_SECONDS / 60:g} minutes"
            return _say(f"the server {how}, {often}; starting it again would not help", end.code or EXIT_SERVER)
        # The trainer sees by the boot number that this is another one, and sends it the weights.
        _say(f"the server {how}; starting it again", 0)


def _say(what: str, code: int) -> int:
    print(what, file=sys.stderr, flush=True)
    return code


def server_command(config: TrainConfig, path: str, length: int, port: int, seed: int, on_cpu: bool) -> list[str]:
    """The command line of one server; it holds no secret."""
    options = {
        "model": path,
        "served-model-name": SERVED_NAME,
        "host": config.vllm_server_host,
        "port": port,
        "dtype": "bfloat16" if config.bf16 else "float32",
        "max-model-len": length,
        "max-num-seqs": config.vllm_max_num_seqs,
        "logprobs-mode": "processed_logprobs",  # after temperature: what the loss needs
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
    # Not the `vllm` script: the one in the CPU build looks up a distribution of another name and fails.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *(f"--{flag}" for flag in flags)]


def server_environment(config: TrainConfig, secret: str, on_cpu: bool, devices: str | None = None) -> dict[str, str]:
    """What a server needs besides this process's environment; ``devices`` are the GPUs it may use."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        SECRET_VARIABLE: secret,
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_SERVER_DEV_MODE": "1",  # the endpoints for weights, pausing and aborting; closed by our middleware
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if on_cpu else "1",
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


if __name__ == "__main__":
    sys.exit(main())
