"""What a sampler kept: whether an engine can say it, and how it is read from log-probabilities.

Without it the log-probabilities of what is left are of no use. vLLM says it with ``return_sampling_mask``. Where it
cannot, a bounded top-k is enough: its log-probabilities are those of what was left, so among the largest of them
exactly the tokens above -inf were kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from igrpo.data_types import Kept
from igrpo.engines.base import EngineError, Sampling
from igrpo.engines.config import EngineConfig
from igrpo.machine import package_folder

OPTION = "return_sampling_mask"
"""vLLM's engine then returns it, and wants its second model runner for that."""
NOTHING = -9999.0
"""What vLLM's servers write for -inf."""
LEAST_MASS = 0.9999
"""Of what was read: the probabilities of what was kept sum to 1."""


def why_not(config: EngineConfig, top_k: int, on_cpu: bool) -> str | None:
    """Why the engine of this config cannot (None: it can). Asked before anything heavy is loaded."""
    if not config.use_vllm or top_k > 0:
        return None
    if config.vllm_mode == "server":
        return "vLLM's servers do not send what they kept with their completions"
    return why_no_option(on_cpu)


def why_no_option(on_cpu: bool) -> str | None:
    """Why the vLLM of this process has no ``OPTION`` to switch on (None: it has): by its sources and what lies beside
    them, not by its version."""
    vllm, triton = package_folder("vllm"), package_folder("triton")
    if vllm is None:
        return None  # the engine says what is to be installed
    settings = vllm / "config" / "model.py"
    if not settings.is_file() or OPTION not in settings.read_text(encoding="utf-8"):
        return f"the installed vLLM has no {OPTION}, which 0.28 and later have"
    if on_cpu and (triton is None or not (triton / "backends" / "cpu").is_dir()):
        return "vLLM on a CPU says what it kept with Triton's CPU backend alone, which is not installed"
    return None


def logprobs_to_ask(sampling: Sampling) -> int:
    """How many of a token's largest log-probabilities hold all that was kept; 0: the sampled token's own will do.

    More than top-k, since vLLM keeps whatever equals the last of the k, as 16-bit logits often do.
    """
    return sampling.top_k + sampling.top_k // 4 + 16 if sampling.truncates and sampling.top_k > 0 else 0


def read_kept(steps: Iterable[Mapping[int, float]]) -> Kept:
    """
    Args:
        steps: [T] token ids -> the largest log-probabilities after top-k, top-p and min-p, in nats.

    Raises:
        EngineError: more was kept than asked for.
    """
    sets = []
    for step in steps:
        kept = [token for token, logprob in step.items() if logprob > NOTHING]
        mass = sum(math.exp(step[token]) for token in kept)
        if mass < LEAST_MASS:
            raise EngineError(
                f"position {len(sets)}: the {len(kept)} most likely tokens hold {mass:.5f} of what the sampler kept: "
                "too many equal the last of top_k; write another top_k, or bf16: false"
            )
        sets.append(kept)
    return Kept.of(sets)
