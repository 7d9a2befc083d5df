"""A vLLM server for training runs on other nodes: ``python -m igrpo.serve --config recipes/x.yaml …``.

Reads the same recipe as the trainer, so that both mean the same model; a server that breaks is started again. The
trainer starts servers on its own machine by itself, with the same command.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from igrpo.config.recipe import parse_args
from igrpo.config.unused import check_hardware
from igrpo.engines.servers.auth import check_bind, secret_from_environment
from igrpo.engines.servers.launch import server_command, server_environment
from igrpo.engines.servers.supervise import Health, supervise
from igrpo.machine import this_machine
from igrpo.settings import EXIT_BAD_CONFIG, ConfigError

DEFAULT_PORT = 8000
EXIT_SERVER = 1
MAX_RESTARTS, OFTEN_SECONDS = 5, 1800.0
"""A server that ends more often than this in so many seconds would do so again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 2 a setting that cannot work, otherwise the server's."""
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        check_bind(config.vllm_server_host, config.vllm_server_allow_public)
        secret = secret_from_environment()
        from igrpo.learner.adapters import Adapters
        from igrpo.models.loading import context_limit, resolve_model, skeleton

        path = resolve_model(config.model_name_or_path)
        length = config.vllm_max_model_length or context_limit(path, config)
        if length is None:
            raise ConfigError("vllm_max_model_length: the model names no limit; write one that fits the refinements")
        adapter = Adapters(skeleton(path, config), config).described() if config.sends_adapter else None
        on_cpu = this_machine(config.use_cpu).device == "cpu"
        # The recipe is the trainer's: what it says about reaching servers is none of this one's business.
        check_hardware(replace(config, use_vllm=True, vllm_mode="colocate", vllm_enable_sleep_mode=None), on_cpu)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    os.environ.update(server_environment(config, secret, on_cpu))
    port = config.vllm_server_port or DEFAULT_PORT
    return keep_up(
        server_command(config, path, length, port, config.seed, on_cpu, adapter), config.vllm_server_host, port, secret
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
        # The trainer sees by the instance id that this is another one, and sends it the weights.
        _say(f"the server {how}; starting it again", 0)


def _say(what: str, code: int) -> int:
    print(what, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
