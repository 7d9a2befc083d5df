"""A loss whose gradient was computed together with its value, as an autograd node."""

from types import ModuleType

import torch
from torch import Tensor

from igrpo_kernels.first_order import first_order_only


def hand_over(kernels: ModuleType, loss: Tensor, leaves: list[Tensor | None], gradients: list[Tensor | None]) -> Tensor:
    """The loss (), whose backward gives `gradients`, times the upstream gradient, to `leaves` in their dtypes."""
    return LossWithGradients.apply(kernels, loss, len(leaves), *leaves, *gradients)


class LossWithGradients(torch.autograd.Function):
    """Backward scales the gradients in place and gives them away, so that they exist once."""

    @staticmethod
    def forward(ctx, kernels, value: Tensor, count: int, *leaves_and_gradients: Tensor | None) -> Tensor:
        leaves, gradients = leaves_and_gradients[:count], leaves_and_gradients[count:]
        ctx.save_for_backward(*gradients)  # autograd then refuses a gradient that somebody has overwritten
        ctx.kernels, ctx.count = kernels, count
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
        ctx.handed_out = False
        return value.clone()

    @staticmethod
    @first_order_only
    def backward(ctx, upstream: Tensor):
        if torch.compiler.is_compiling():  # a graph keeps what it saved, so the factor makes a new tensor
            gradients = [None if g is None else (g * upstream).to(g.dtype) for g in ctx.saved_tensors]
        else:
            if ctx.handed_out:
                raise RuntimeError(
                    "this loss computed its gradient once, in forward, and a first backward has already taken it; "
                    "compute the loss again instead of a second backward with retain_graph=True, or use impl='torch'"
                )
            ctx.handed_out, gradients = True, ctx.saved_tensors
            for gradient in gradients:
                if gradient is not None:
                    ctx.kernels.scale_(gradient, upstream)
        typed = [None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, *typed, *(None for _ in typed)
