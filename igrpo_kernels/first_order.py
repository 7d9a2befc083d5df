"""Backward passes that know first derivatives only, and say so when asked for more."""

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable


def first_order_only(backward: Callable) -> Callable:
    """A `backward` of an autograd Function that raises RuntimeError under `create_graph=True`.

    torch's own `once_differentiable` raises only where the upstream gradient is differentiable. It is a constant for
    `autograd.grad(loss, logits, create_graph=True)`, and a gradient penalty would then lose its second term in silence.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True asks for second derivatives, which the fused losses and log-probabilities do not "
                "have; leave create_graph out, or use grpo_loss or selective_log_softmax with impl='torch'"
            )
        return once(ctx, *grads)

    return checked
