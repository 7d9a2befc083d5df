"""Whether an engine can say what its sampler kept: without that the log-probabilities of what is left are of no use.

Asked before anything heavy is loaded: of vLLM its sources and what lies beside them, not its version.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from igrpo.engines.config import EngineConfig

OPTION = "return_sampling_mask"
"""vLLM's engine then returns it, and wants its second model runner for that."""


def why_not(config: EngineConfig, on_cpu: bool) -> str | None:
    """Why the engine of this config cannot (None: it can)."""
    if not config.use_vllm:
        return None
    if config.vllm_mode == "server":
        return "vLLM's servers do not send what they kept with their completions"
    vllm, triton = (_folder(name) for name in ("vllm", "triton"))
    if vllm is None:
        return None  # the engine says what is to be installed
    settings = vllm / "config" / "model.py"
    if not settings.is_file() or OPTION not in settings.read_text(encoding="utf-8"):
        return f"the installed vLLM has no {OPTION}, which came with 0.32"
    if on_cpu and (triton is None or not (triton / "backends" / "cpu").is_dir()):
        return "vLLM on a CPU says what it kept with Triton's CPU backend alone, which is not installed"
    return None


def _folder(package: str) -> Path | None:
    found = find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent
