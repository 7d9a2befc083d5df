"""Operations from hidden states, which never materialise the logits."""

import pytest

from benchmarks.providers_linear import OURS, RIVALS


@pytest.mark.case("linear_selective_log_softmax")
def bench_log_probs_without_gradient(compare, shape, variant):
    compare("linear_selective_log_softmax", shape, variant, ("fwd",), OURS + RIVALS)


@pytest.mark.case("linear_selective_log_softmax")
def bench_log_probs_with_gradient(compare, shape, variant):
    compare("linear_selective_log_softmax", shape, variant, ("bwd", "fwd+bwd"), OURS + RIVALS)


@pytest.mark.case("linear_grpo_loss")
def bench_loss(compare, shape, variant):
    compare("linear_grpo_loss", shape, variant, ("fwd", "bwd", "fwd+bwd"), OURS + RIVALS)
