"""Operations on materialised logits."""

import pytest

from benchmarks.providers_logits import OURS, RIVALS


@pytest.mark.case("selective_log_softmax")
def bench_log_probs_without_gradient(compare, shape, variant):
    compare("selective_log_softmax", shape, variant, ("fwd",), OURS + RIVALS)


@pytest.mark.case("selective_log_softmax")
def bench_log_probs_with_gradient(compare, shape, variant):
    compare("selective_log_softmax", shape, variant, ("bwd", "fwd+bwd"), OURS + RIVALS)


@pytest.mark.case("grpo_loss")
def bench_loss(compare, shape, variant):
    compare("grpo_loss", shape, variant, ("fwd", "bwd", "fwd+bwd"), OURS + RIVALS)
