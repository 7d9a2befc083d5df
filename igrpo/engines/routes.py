"""Which experts an engine sent tokens to: whether it can say so, and what vLLM says."""

from __future__ import annotations

from typing import Any

from igrpo.data_types import Routes
from igrpo.engines.config import EngineConfig


def why_not(config: EngineConfig, on_cpu: bool) -> str | None:
    """Why the engine of this config cannot (None: it can). Asked before anything heavy is loaded."""
    if not config.use_vllm:
        return None
    if config.vllm_mode == "server":
        return "they are not read from what vLLM's servers answer"
    if on_cpu:
        return "vLLM says it with its second model runner alone, which was never tried on a CPU (it takes Triton there)"
    if config.sends_adapter:
        return "it was never tried beside lora_sync: adapter"
    return None


def read_routes(experts: Any) -> Routes:
    """
    Args:
        experts: vLLM's array [tokens, layers, k] of small integers.
    """
    return Routes(experts.astype("int16").tobytes(), *experts.shape[1:])


def second_runner(routes: bool) -> str:
    """What to say where vLLM does not take the model runner that says what it kept, or with ``routes`` its experts."""
    keys, off = "top_p, min_p: vLLM says what they keep", "a top_k, such as 64, beside them"
    if routes:
        keys, off = "router_replay: vLLM says which experts it chose", "router_replay: false"
    return (
        f"{keys} with its second model runner alone, and takes its first; export VLLM_USE_V2_MODEL_RUNNER=1, or write "
        f"{off}"
    )
