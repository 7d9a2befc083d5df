"""Engines that sample: one protocol (`base.py`), vLLM in this process (`vllm_engine.py`) or in servers
(`servers/`), Hugging Face generate (`hf_engine.py`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from igrpo.engines.base import Engine, EngineError, Request, Result, Sampling, WeightSource
from igrpo.engines.config import EngineConfig

__all__ = ["Engine", "EngineError", "Request", "Result", "Sampling", "WeightSource", "start_engine"]


def start_engine(
    path: str,
    config: EngineConfig,
    max_model_length: int,
    stop_token_ids: Sequence[int],
    seed: int,
    masks: bool = False,
    adapter: Mapping[str, Any] | None = None,
    routes: bool = False,
    top_k: int = 0,
) -> Engine:
    """The engine the config asks for; imports only the library it needs.

    Args:
        masks: say what top-p, top-k and min-p kept (``Result.kept``); ``masks.why_not`` tells whether it can.
        adapter: peft's description of the adapter that pushes will bring, in place of weights.
        routes: say which experts tokens were sent to (``Result.routes``); ``routes.why_not`` tells whether it can.
        top_k: of training, whose log-probabilities tell what was kept.
    """
    given = (path, config, max_model_length, stop_token_ids, seed)
    if config.uses_servers:
        from igrpo.engines.servers.engine import ServerEngine

        return ServerEngine(*given, masks, adapter)
    if config.use_vllm and adapter is not None:
        from igrpo.engines.vllm_adapters import AdapterVLLMEngine

        return AdapterVLLMEngine(*given, masks, top_k=top_k, adapter=adapter)
    if config.use_vllm:
        from igrpo.engines.vllm_engine import VLLMEngine

        return VLLMEngine(*given, masks, routes, top_k)
    from igrpo.engines.hf_engine import HFEngine

    return HFEngine(*given, masks, adapter, routes)
