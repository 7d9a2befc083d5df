"""The fused-linear operations of `impl="triton"`: chunks of rows, matmuls by the vendor library, kernels in between.

    logits chunk = X_c Wᵀ + b  ->  loss kernel in place: dlogits  ->  dX_c = dlogits W,  dW += dlogitsᵀ X_c

One chunk buffer (at most CHUNK_BYTES) is all that exists of size V beyond the gradients; dW and db accumulate in fp32.
FLOPs of `linear_grpo_loss` for n rows, forward and backward together, all spent in forward:

    6·n·H·V   rows whose coefficient is known when their chunk is: token-level losses, and sequence-level ones whose
              sequences fit a chunk, because chunk borders are put on sequence borders
    8·n·H·V   rows of longer sequences, and all rows under top_entropy_quantile < 1 if they need several chunks:
              statistics first, logits again afterwards
    2·n·H·V   rows that only have statistics to report: A = 0 with beta = 0 and no entropy bonus
    0         masked rows: dropped before the matmul, at the price of one host sync

A frozen weight saves 2·n·H·V. `linear_selective_log_softmax`: 2·n·H·V forward, 6·n·H·V backward (logits again), since
its upstream gradients are unknown in forward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igrpo_kernels import triton_ops as ops
from igrpo_kernels.batch import TokenBatch, compute_dtype
from igrpo_kernels.objective import grpo_objective, objective_and_row_gradients
from igrpo_kernels.reference import _matmul_dtype as matmul_dtype_of
from igrpo_kernels.triton_autograd import LossWithGradients
from igrpo_kernels.triton_grpo_loss import LossKind, LossScalars, TokenRows
from igrpo_kernels.triton_objective import coefficients_are_local, token_rows
from igrpo_kernels.types import GRPOLossConfig, LogitTransform

# 1.25 GiB, e.g. 4,352 rows of bf16 logits at V = 152k: enough for the matmuls to run at full speed.
CHUNK_BYTES = 5 * 2**28

LossRows = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


class ChunkedHead:
    """lm_head over chunks of rows, with the gradients it has been given so far."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, matmul_dtype: torch.dtype):
        self.hidden, self.matmul_dtype = hidden, matmul_dtype
        self.weight = weight.detach().to(matmul_dtype)  # a copy only when the dtypes differ
        self.bias = None if bias is None else bias.detach().to(matmul_dtype)
        self.dtype = compute_dtype(hidden.dtype)
        self.chunk_rows = max(CHUNK_BYTES // (weight.shape[0] * matmul_dtype.itemsize), 1)
        if self.chunk_rows > 256:
            self.chunk_rows = self.chunk_rows // 256 * 256
        self.buffer: Tensor | None = None
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    def expect(self, needs_hidden: bool, needs_weight: bool, needs_bias: bool) -> None:
        """Which gradients `accumulate` shall compute; the others cost nothing."""
        self.needs_weight, self.needs_bias = needs_weight, needs_bias
        self.grad_hidden = torch.zeros_like(self.hidden) if needs_hidden else None

    def logits(self, chunk: Tensor) -> Tensor:
        """Raw logits (m, V) of the rows in `chunk` (m,), in the one buffer: the next call overwrites them."""
        if self.buffer is None:
            shape = (min(self.chunk_rows, self.hidden.shape[0]), self.weight.shape[0])
            self.buffer = torch.empty(shape, dtype=self.matmul_dtype, device=self.hidden.device)
        x, out = self.rows(chunk), self.buffer[: chunk.numel()]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)

    def rows(self, chunk: Tensor) -> Tensor:
        """Hidden states (m, H) of a chunk in the matmul dtype."""
        return self.hidden[chunk].to(self.matmul_dtype)

    def accumulate(self, chunk: Tensor, grad_logits: Tensor) -> None:
        """Add what dlogits (m, V) of a chunk means for hidden states, weight and bias."""
        if self.grad_hidden is not None:
            self.grad_hidden[chunk] = torch.mm(grad_logits, self.weight).to(self.hidden.dtype)
        if self.needs_weight:
            self.grad_weight = _add_product(self.grad_weight, grad_logits.t(), self.rows(chunk), self.dtype)
        if self.needs_bias:
            column_sums = grad_logits.sum(0, dtype=self.dtype)
            self.grad_bias = column_sums if self.grad_bias is None else self.grad_bias.add_(column_sums)

    def gradients(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dX in hidden's dtype; dW and db in the compute dtype, zeros if no row contributed."""
        if self.needs_weight and self.grad_weight is None:
            self.grad_weight = torch.zeros_like(weight, dtype=self.dtype)
        if self.needs_bias and self.grad_bias is None:
            self.grad_bias = torch.zeros_like(bias, dtype=self.dtype)
        return self.grad_hidden, self.grad_weight, self.grad_bias


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b accumulated in `dtype`; `total` is overwritten. Only CUDA multiplies bf16 into fp32 directly."""
    if a.dtype == dtype:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.is_cuda:
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    return _add_product(total, a.to(dtype), b.to(dtype), dtype)


@torch.compiler.disable(reason="linear_grpo_loss compacts rows, whose number is known at run time only")
def linear_grpo_loss(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
) -> LossRows:
    """Loss (), logps (n,), entropy (n,), metrics."""
    head = ChunkedHead(hidden.detach(), weight, bias, matmul_dtype_of(hidden))
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head.expect(*needs)
        logps, entropy = _walk_rows(head, batch, config, num_items_in_batch, any(needs))
        loss, metrics = grpo_objective(logps, entropy, batch, config, num_items_in_batch)
        gradients = head.gradients(weight, bias)
        del head  # frees the chunk buffer before anything else runs
    if any(needs):
        loss = LossWithGradients.apply(loss, 3, hidden, weight, bias, *gradients)
    return loss, logps, entropy, metrics


def _walk_rows(
    head: ChunkedHead,
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """logps and entropy (n,), with the gradients left in `head`."""
    logps = torch.zeros_like(batch.advantages)
    entropy = torch.zeros_like(logps)
    local = coefficients_are_local(config, batch)
    contributes = batch.mask & _may_contribute(batch, config, local) if with_gradient else torch.zeros_like(batch.mask)
    reported = (batch.mask & ~contributes).nonzero().squeeze(-1)
    for chunk in _split(reported, head.chunk_rows):
        logps[chunk], entropy[chunk], _, _ = _statistics(head.logits(chunk), chunk, batch, config)
    if not with_gradient:
        return logps, entropy

    def coefficients(chunk: Tensor) -> tuple[Tensor, Tensor | None]:
        _, _, slope, slope_entropy = objective_and_row_gradients(logps, entropy, batch, config, num_items_in_batch)
        return slope[chunk], None if slope_entropy is None else slope_entropy[chunk]

    def finish(chunk: Tensor, logits: Tensor, row_max: Tensor, log_sum: Tensor) -> None:
        state = (batch.index[chunk], None, row_max, log_sum, entropy[chunk])
        ops.row_gradient_(logits, *state, *coefficients(chunk), *config.logit_transform)
        head.accumulate(chunk, logits)

    if local:
        rows = token_rows(batch, config, num_items_in_batch)
        for chunk in _split(contributes.nonzero().squeeze(-1), head.chunk_rows):
            logits = head.logits(chunk)
            logps[chunk], entropy[chunk] = _token_loss_(logits, rows, chunk, config)
            head.accumulate(chunk, logits)
        return logps, entropy

    whole, split = _chunks_of_sequences(contributes, batch, config, head.chunk_rows)
    for chunk in split:  # statistics of everything that cannot wait in the buffer until its coefficients are known
        logps[chunk], entropy[chunk], _, _ = _statistics(head.logits(chunk), chunk, batch, config)
    for chunk in whole:
        logits = head.logits(chunk)
        logps[chunk], entropy[chunk], *state = _statistics(logits, chunk, batch, config)
        finish(chunk, logits, *state)
    for chunk in split:
        logits = head.logits(chunk)
        _, _, *state = _statistics(logits, chunk, batch, config)
        finish(chunk, logits, *state)
    return logps, entropy


def _may_contribute(batch: TokenBatch, config: GRPOLossConfig, local: bool) -> Tensor:
    """Bool (n,): rows whose gradient is not known to be zero before the logits are. Every policy term carries A."""
    if config.beta != 0.0 or config.entropy_coef != 0.0:
        return batch.mask
    weighted = batch.masked(batch.advantages) != 0
    if local:
        return weighted
    return batch.expand(batch.segment_sum(weighted.to(batch.advantages.dtype))) > 0  # a sequence acts as one


def _chunks_of_sequences(
    contributes: Tensor, batch: TokenBatch, config: GRPOLossConfig, chunk_rows: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Row numbers in chunks of whole sequences, and in chunks of sequences longer than a chunk."""
    rows = contributes.nonzero().squeeze(-1)
    if config.top_entropy_quantile < 1.0 and rows.numel() > chunk_rows:
        return [], _split(rows, chunk_rows)  # the threshold needs every entropy first
    counts = batch.segment_sum(contributes.to(batch.advantages.dtype)).long().tolist()
    whole, split, start, end = [], [], 0, 0
    for count in counts:
        if count > chunk_rows or end - start + count > chunk_rows:
            whole += [rows[start:end]] if end > start else []
            start = end
        end += count
        if count > chunk_rows:
            split += _split(rows[start:end], chunk_rows)
            start = end
    return whole + ([rows[start:end]] if end > start else []), split


def _split(rows: Tensor, chunk_rows: int) -> list[Tensor]:
    return list(rows.split(chunk_rows)) if rows.numel() else []


def _statistics(
    logits: Tensor, chunk: Tensor, batch: TokenBatch, config: GRPOLossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ops.row_statistics(logits, batch.index[chunk], None, *config.logit_transform, True)


def _token_loss_(logits: Tensor, rows: TokenRows, chunk: Tensor, config: GRPOLossConfig) -> tuple[Tensor, Tensor]:
    """The one-launch loss on a chunk: logits become dlogits."""
    per_row = [None if x is None else x[chunk] for x in rows[:-1]]
    return ops.token_loss_(
        logits,
        *per_row,
        rows.grad_entropy,
        *config.logit_transform,
        [*LossScalars.of(config)],
        [*LossKind.of(config)],
    )


@torch.compiler.disable(reason="linear_selective_log_softmax compacts rows, whose number is known at run time only")
def linear_selective_log_softmax(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    index: Tensor,  # (n,)
    transform: LogitTransform,
    *,
    return_entropy: bool,
    row_mask: Tensor | None = None,  # (n,) bool; masked rows: no work, output 0, gradient exactly 0
) -> tuple[Tensor, Tensor | None]:
    """logps (n,) and entropy (n,) or None of `hidden @ weight.T + bias`, without those logits."""
    logps, entropy = LinearSelectiveLogSoftmax.apply(hidden, weight, bias, index, row_mask, transform, return_entropy)
    return logps, entropy if return_entropy else None


class LinearSelectiveLogSoftmax(torch.autograd.Function):
    """Statistics of each chunk forward; backward makes the chunk's logits again and turns them into gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, index, row_mask, transform, return_entropy):
        ctx.set_materialize_grads(False)
        ctx.transform, ctx.matmul_dtype = transform, matmul_dtype_of(hidden)
        n, dtype = hidden.shape[0], compute_dtype(hidden.dtype)
        logps, row_max, log_sum = (torch.zeros(n, dtype=dtype, device=hidden.device) for _ in range(3))
        entropy = torch.zeros(n if return_entropy else 0, dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, bias, ctx.matmul_dtype)
            active = torch.ones_like(index, dtype=torch.bool) if row_mask is None else row_mask
            for chunk in _split(active.nonzero().squeeze(-1), head.chunk_rows):
                logits = head.logits(chunk)
                logps[chunk], chunk_entropy, row_max[chunk], log_sum[chunk] = ops.row_statistics(
                    logits, index[chunk], None, *transform, return_entropy
                )
                if return_entropy:
                    entropy[chunk] = chunk_entropy
        ctx.save_for_backward(hidden, weight, bias, index, active, row_max, log_sum, entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, bias, index, active, row_max, log_sum, entropy = ctx.saved_tensors
        silent = torch.ones_like(active)  # rows whose gradient is exactly zero need no logits
        for grad in (grad_logps, grad_entropy):
            silent = silent if grad is None else silent & (grad == 0)
        with torch.autocast(hidden.device.type, enabled=False):
            head = ChunkedHead(hidden, weight, bias, ctx.matmul_dtype)
            head.expect(*ctx.needs_input_grad[:3])
            for chunk in _split((active & ~silent).nonzero().squeeze(-1), head.chunk_rows):
                logits = head.logits(chunk)
                per_row = [
                    None if x is None or x.numel() == 0 else x[chunk]
                    for x in (row_max, log_sum, entropy, grad_logps, grad_entropy)
                ]
                per_row[2] = entropy if per_row[2] is None else per_row[2]
                ops.row_gradient_(logits, index[chunk], None, *per_row, *ctx.transform)
                head.accumulate(chunk, logits)
            grads = head.gradients(weight, bias)
        grads = [None if g is None else g.to(x.dtype) for g, x in zip(grads, (hidden, weight, bias), strict=True)]
        return *grads, None, None, None, None
