"""exp under the convention of `objective.py` that 0 · inf = 0."""

import torch
from torch import Tensor


def silent_exp(x: Tensor) -> Tensor:
    """exp whose gradient keeps 0 · exp(large) = 0, so a clipped or dropped row with an infinite ratio stays silent."""
    return _Exp.apply(x)


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.where((grad == 0) & y.isinf(), 0.0, grad * y)
