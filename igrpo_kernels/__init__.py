"""Fused GRPO losses: one call from logits (or hidden states) to loss, gradient, log-probabilities and metrics.

Letters used in every shape: ``B`` sequences, ``T`` completion tokens, ``V`` vocabulary, ``H`` hidden size,
``S`` packed sequences, ``n`` packed tokens.
"""

from igrpo_kernels.grpo_loss import grpo_loss, linear_grpo_loss
from igrpo_kernels.impls import available_impls
from igrpo_kernels.logprobs import linear_selective_log_softmax, linear_topk_log_softmax, selective_log_softmax
from igrpo_kernels.sampling_mask import SamplingMask
from igrpo_kernels.types import GRPOLossConfig, GRPOLossOutput

__all__ = [
    "GRPOLossConfig",
    "GRPOLossOutput",
    "SamplingMask",
    "available_impls",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "linear_topk_log_softmax",
    "selective_log_softmax",
]
