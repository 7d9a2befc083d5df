"""Operations from hidden states, which never materialise the logits."""

import pytest

from benchmarks.contenders_linear import OURS, RIVALS


@pytest.mark.contest("linear_selective_log_softmax")
def bench_log_probs_without_gradient(hold, shape, variant):
    hold("linear_selective_log_softmax", shape, variant, ("fwd",), OURS + RIVALS)


@pytest.mark.contest("linear_selective_log_softmax")
def bench_log_probs_with_gradient(hold, shape, variant):
    hold("linear_selective_log_softmax", shape, variant, ("bwd", "fwd+bwd"), OURS + RIVALS)


@pytest.mark.contest("linear_grpo_loss")
def bench_loss(hold, shape, variant):
    hold("linear_grpo_loss", shape, variant, ("fwd", "bwd", "fwd+bwd"), OURS + RIVALS)
