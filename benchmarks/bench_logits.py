"""Operations on materialised logits."""

import pytest

from benchmarks.contenders_logits import OURS, RIVALS


@pytest.mark.contest("selective_log_softmax")
def bench_log_probs_without_gradient(hold, shape, variant):
    hold("selective_log_softmax", shape, variant, ("fwd",), OURS + RIVALS)


@pytest.mark.contest("selective_log_softmax")
def bench_log_probs_with_gradient(hold, shape, variant):
    hold("selective_log_softmax", shape, variant, ("bwd", "fwd+bwd"), OURS + RIVALS)


@pytest.mark.contest("grpo_loss")
def bench_loss(hold, shape, variant):
    hold("grpo_loss", shape, variant, ("fwd", "bwd", "fwd+bwd"), OURS + RIVALS)
