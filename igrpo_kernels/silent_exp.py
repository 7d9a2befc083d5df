"""exp, square and product under the convention of `objective.py` that 0 · inf = 0."""

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


def silent_square(x: Tensor) -> Tensor:
    """x², whose gradient keeps 0 · inf = 0, so that a dropped row of probability 0 stays silent."""
    return _Square.apply(x)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((grad == 0) & x.isinf(), 0.0, 2.0 * grad * x)


def silent_times(a: Tensor, x: Tensor) -> Tensor:
    """a·x for a constant a, with 0 · inf = 0 in value, and in the gradient where a is infinite and the row dropped."""
    return _Times.apply(a, x)


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return (a * x).masked_fill((a == 0) & x.isinf(), 0.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        (a,) = ctx.saved_tensors
        return None, torch.where((grad == 0) & a.isinf(), 0.0, grad * a)
