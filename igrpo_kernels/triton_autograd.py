"""The two bridges from the operators to autograd: log-probabilities whose gradient is computed in backward, and losses
whose gradient was computed together with their value."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igrpo_kernels import triton_ops as ops
from igrpo_kernels.batch import compute_dtype


class SelectiveLogSoftmax(torch.autograd.Function):
    """Statistics kernel forward, gradient kernel backward. State: the logits and four numbers per row."""

    @staticmethod
    def forward(ctx, logits, index, row_mask, transform, return_entropy, inplace):
        ctx.set_materialize_grads(False)  # an unused output must cost nothing in backward
        ctx.transform, ctx.inplace = transform, inplace
        logps, entropy, row_max, log_sum = ops.row_statistics(logits, index, row_mask, *transform, return_entropy)
        ctx.save_for_backward(logits, index, row_mask, row_max, log_sum, entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor | None, grad_entropy: Tensor | None):
        logits, *state = ctx.saved_tensors
        if grad_logps is None and grad_entropy is None:
            return None, None, None, None, None, None
        arguments = (*state, grad_logps, grad_entropy, *ctx.transform)
        if ctx.inplace:
            grad = logits.detach()
            ops.row_gradient_(grad, *arguments)
        else:
            grad = ops.row_gradient(logits, *arguments)
        return grad, None, None, None, None, None


class LossWithGradients(torch.autograd.Function):
    """Attaches gradients computed in forward; backward scales them in place by the upstream scalar, on the device."""

    @staticmethod
    def forward(ctx, value: Tensor, count: int, *leaves_and_gradients: Tensor | None) -> Tensor:
        """value (), then `count` differentiable inputs, then as many gradients for an upstream gradient of 1."""
        leaves, gradients = leaves_and_gradients[:count], leaves_and_gradients[count:]
        ctx.save_for_backward(*gradients)  # autograd then refuses a gradient that somebody has overwritten
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
        ctx.handed_out = False
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        if ctx.handed_out:
            raise RuntimeError(
                "impl='triton' computes the gradient of a loss once, in forward, and a first backward has already "
                "taken it; compute the loss again instead of a second backward with retain_graph=True"
            )
        gradients = ctx.saved_tensors
        ctx.handed_out = True
        for gradient in gradients:
            if gradient is not None:
                matrix = gradient if gradient.dim() > 1 else gradient[None]
                ops.scale_(matrix, upstream.to(compute_dtype(gradient.dtype)))
        typed = [None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, *typed, *(None for _ in typed)
