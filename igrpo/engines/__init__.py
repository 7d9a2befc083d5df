"""Engines that sample: one protocol (`base.py`), vLLM in this process (`vllm_engine.py`) or in servers
(`servers/`), Hugging Face generate (`hf_engine.py`)."""

from collections.abc import Sequence

from igrpo.config.train_config import TrainConfig
from igrpo.config.unused import unused
from igrpo.engines.base import Engine, EngineError, Request, Result, Sampling, WeightSource
from igrpo.machine import this_machine

__all__ = ["Engine", "EngineError", "Request", "Result", "Sampling", "WeightSource", "start_engine"]


def start_engine(
    path: str, config: TrainConfig, max_model_length: int, stop_token_ids: Sequence[int], seed: int
) -> Engine:
    """The engine the config asks for; imports only the library it needs.

    Raises:
        ConfigError: the config asks for hardware that is not here.
    """
    list(unused(config, this_machine(config.use_cpu).device == "cpu"))
    if config.use_vllm and config.vllm_mode == "server":
        from igrpo.engines.servers.engine import ServerEngine

        return ServerEngine(path, config, max_model_length, stop_token_ids, seed)
    if config.use_vllm:
        from igrpo.engines.vllm_engine import VLLMEngine

        return VLLMEngine(path, config, max_model_length, stop_token_ids, seed)
    from igrpo.engines.hf_engine import HFEngine

    return HFEngine(path, config, max_model_length, stop_token_ids, seed)
