"""`impl="torch"`: the definition of truth, in plain PyTorch, on any device.

    z        = softcap·tanh(scale·x/softcap) / T          (LogitTransform; fp32, or fp64 for fp64 input)
    logp_v   = z_v - logsumexp(z)
    l        = logp[target]                                dl/dz_v = [v = target] - p_v
    H        = -sum_v p_v · logp_v   (0 where p_v = 0)     dH/dz_v = -p_v · (logp_v + H)

The materialised operations leave the derivatives to autograd; the fused linear one writes them out, because it
recomputes its logits chunk by chunk.
"""

import contextlib

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch, compute_dtype
from igrpo_kernels.distillation import Teacher
from igrpo_kernels.first_order import first_order_only
from igrpo_kernels.objective import grpo_objective, shapes_the_loss
from igrpo_kernels.sampling_mask import KeptSets
from igrpo_kernels.types import LOG_P_FLOOR, GRPOLossConfig, LogitTransform
from igrpo_kernels.vocab_parallel import VocabShard, whole_vocabulary

# Logits per chunk of the fused linear operation: 2^25 = 128 MiB in fp32, e.g. 220 tokens at V = 152k.
CHUNK_LOGITS = 2**25

LossRows = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def grpo_loss(
    logits: Tensor,  # (B, T, V) or (n, V)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    *,
    shard: VocabShard | None = None,
    kept: KeptSets | None = None,
    teacher: Teacher | None = None,
) -> LossRows:
    """Loss (), logps (n,), entropy (n,), metrics."""
    logps, entropy, *columns = selective_log_softmax(
        logits,
        batch.index.view(batch.shape),
        config.logit_transform._replace(temperatures=batch.temperatures),
        return_entropy=True,
        row_mask=batch.mask.view(batch.shape),
        entropy_gradient=config.needs_entropy_gradient,
        shard=shard,
        kept=kept,
        columns=None if teacher is None else teacher.ids,
    )
    logps, entropy = logps.reshape(-1), entropy.reshape(-1)
    return _loss_rows(logps, entropy, columns, batch, config, num_items_in_batch, teacher)


def _loss_rows(
    logps: Tensor,  # (n,)
    entropy: Tensor,  # (n,)
    columns: list[Tensor],  # (n, k) log-probs at the teacher's ids, or none
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    teacher: Teacher | None,
) -> LossRows:
    found = grpo_objective(logps, entropy, batch, config, num_items_in_batch)
    if teacher is not None:
        divergence = batch.masked(teacher.divergence(columns[0].double())).to(logps.dtype)
        found = teacher.add(found, divergence, batch, config, num_items_in_batch)
    return found[0], logps, entropy, found[1]


def linear_grpo_loss(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    kept: KeptSets | None = None,
    teacher: Teacher | None = None,
    *,
    fp32_logits: bool = False,
    compute_metrics: bool = True,
    shard: VocabShard | None = None,
) -> LossRows:
    """Loss (), logps (n,), entropy (n,), metrics."""
    logps, entropy, *columns = linear_selective_log_softmax(
        hidden,
        weight,
        bias,
        batch.index,
        config.logit_transform._replace(temperatures=batch.temperatures),
        return_entropy=True,
        row_mask=batch.mask if compute_metrics else shapes_the_loss(batch, config),
        fp32_logits=fp32_logits,
        shard=shard,
        kept=kept,
        columns=None if teacher is None else teacher.ids,
    )
    *rows, metrics = _loss_rows(logps, entropy, columns, batch, config, num_items_in_batch, teacher)
    return *rows, metrics if compute_metrics else {}


def transform_logits(x: Tensor, transform: LogitTransform) -> Tensor:
    """Raw logits x -> policy logits z, in x's dtype, out of place."""
    z = x if transform.logit_scale == 1.0 else x * transform.logit_scale
    if transform.final_logit_softcapping is not None:
        z = torch.tanh(z / transform.final_logit_softcapping) * transform.final_logit_softcapping
    if transform.temperatures is not None:
        return z / transform.temperatures.view(*z.shape[:-1], 1)
    return z if transform.temperature == 1.0 else z / transform.temperature


def selective_log_softmax(
    logits: Tensor,  # (..., V), any strides
    index: Tensor,  # (...)
    transform: LogitTransform,
    *,
    return_entropy: bool,
    row_mask: Tensor | None = None,  # (...) bool; masked rows: output 0, gradient exactly 0
    entropy_gradient: bool = True,
    shard: VocabShard | None = None,
    kept: KeptSets | None = None,  # the softmax is over these
    columns: Tensor | None = None,  # (n, k) int64
) -> tuple[Tensor | None, ...]:
    """logps (...) and entropy (...) or None, fp32 or fp64; with `columns` also the log-probs there (n, k). An index
    outside the vocabulary makes its row's logp NaN."""
    logits = whole_vocabulary(logits, -1, shard)
    x = logits.to(compute_dtype(logits.dtype))
    if row_mask is not None:  # on the logits, so that NaN in a masked row cannot reach any gradient
        x = torch.where(row_mask[..., None], x, 0.0)
    if kept is None:
        z = transform_logits(x, transform)
    else:
        inside = kept.mask.table(x.shape[-1]).view(x.shape)
        inside = inside if row_mask is None else inside | ~row_mask[..., None]
        z = transform_logits(torch.where(inside, x, 0.0), transform).masked_fill(~inside, -torch.inf)
    log_p = torch.log_softmax(z, dim=-1)
    in_vocab = index.clamp(0, logits.shape[-1] - 1)
    logps = log_p.gather(-1, in_vocab[..., None]).squeeze(-1)
    logps = torch.where(index == in_vocab, logps, torch.nan)
    if kept is not None:
        logps = torch.where(kept.places.view(index.shape) < 0, torch.nan, logps)
    entropy = None
    if return_entropy:
        with contextlib.nullcontext() if entropy_gradient else torch.no_grad():
            # Where p = 0, log p is -inf; as a factor it must be 0, or 0·inf would make value and gradient NaN.
            entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    if row_mask is not None:
        logps = torch.where(row_mask, logps, 0.0)
        entropy = None if entropy is None else torch.where(row_mask, entropy, 0.0)
    if columns is not None:
        return logps, entropy, log_p.reshape(-1, log_p.shape[-1]).gather(-1, columns)
    return logps, entropy


def linear_selective_log_softmax(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    index: Tensor,  # (n,)
    transform: LogitTransform,
    *,
    return_entropy: bool,
    row_mask: Tensor | None = None,  # (n,) bool; masked rows: no work, output 0, gradient exactly 0
    fp32_logits: bool = False,
    shard: VocabShard | None = None,
    kept: KeptSets | None = None,  # the softmax is over these
    columns: Tensor | None = None,  # (n, k) int64
) -> tuple[Tensor | None, ...]:
    """logps (n,) and entropy (n,) or None of `hidden @ weight.T + bias`, fp32 or fp64, without those logits; with
    `columns` also the log-probs there (n, k)."""
    weight = whole_vocabulary(weight, 0, shard)
    bias = None if bias is None else whole_vocabulary(bias, 0, shard)
    matmul_dtype = _matmul_dtype(hidden)
    if fp32_logits:
        matmul_dtype = compute_dtype(matmul_dtype)
    shared, temperatures = transform._replace(temperatures=None), transform.temperatures
    return LinearSelectiveLogSoftmax.apply(
        hidden, weight, bias, index, row_mask, shared, temperatures, return_entropy, matmul_dtype, kept, columns
    )


def linear_topk_log_softmax(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    k: int,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor]:
    """The k largest log-probs of each row, and before them their ids: (n, k) each, int64 and fp32 or fp64."""
    head = _LmHead(hidden, weight, bias, transform, _matmul_dtype(hidden), None)
    ids = torch.zeros(len(hidden), k, dtype=torch.int64, device=hidden.device)
    logps = torch.zeros(len(hidden), k, dtype=head.dtype, device=hidden.device)
    for chunk in _chunks(None, hidden, weight):
        z = head.transformed(head.logits(chunk), chunk)
        largest, ids[chunk] = z.topk(k, -1)
        logps[chunk] = largest - z.logsumexp(-1, keepdim=True)
    return ids, logps


class LinearSelectiveLogSoftmax(torch.autograd.Function):
    """Walks chunks of tokens: logits of one chunk -> row statistics; backward recomputes them -> dX, dW, db.

    The matmuls run in the autocast dtype if autocast is on, else in hidden's dtype; the chunk's mathematics and the
    accumulation of dW and db in fp32 (fp64 for fp64 hidden). dX is stored in hidden's dtype, dW in weight's.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, index, row_mask, transform, temperatures, return_entropy, dtype, kept, columns
    ):
        ctx.set_materialize_grads(False)  # an unused output must cost nothing in backward
        ctx.transform, ctx.matmul_dtype, ctx.kept = transform, dtype, kept
        head = _LmHead(hidden, weight, bias, transform._replace(temperatures=temperatures), dtype, kept)
        logps = hidden.new_zeros(hidden.shape[0], dtype=head.dtype)
        entropy, log_norm = torch.zeros_like(logps) if return_entropy else None, torch.zeros_like(logps)
        at_columns = None if columns is None else logps.new_zeros(columns.shape)
        for chunk in _chunks(row_mask, hidden, weight):
            z = head.transformed(head.logits(chunk), chunk)
            log_norm[chunk] = log_z = z.logsumexp(-1)
            in_vocab = index[chunk].clamp(0, weight.shape[0] - 1)
            target = z.gather(-1, in_vocab[:, None]).squeeze(-1) - log_z
            logps[chunk] = torch.where(head.chosen(index, chunk, in_vocab), target, torch.nan)
            if columns is not None:
                at_columns[chunk] = z.gather(-1, columns[chunk]) - log_z[:, None]
            if return_entropy:
                log_p = z.sub_(log_z[:, None])
                entropy[chunk] = -log_p.exp().mul_(log_p.clamp_(min=LOG_P_FLOOR)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, index, row_mask, temperatures, log_norm, entropy, columns)
        return (logps, entropy) if columns is None else (logps, entropy, at_columns)

    @staticmethod
    @first_order_only
    def backward(ctx, grad_logps: Tensor | None, grad_entropy: Tensor | None, grad_columns: Tensor | None = None):
        hidden, weight, bias, index, row_mask, temperatures, log_norm, entropy, columns = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        transform = ctx.transform._replace(temperatures=temperatures)
        head = _LmHead(hidden, weight, bias, transform, ctx.matmul_dtype, ctx.kept)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=head.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=head.dtype) if needs_bias else None
        of_columns = None if grad_columns is None else (columns, grad_columns)
        given = None if grad_columns is None else (grad_columns != 0).any(-1)
        active = _rows_with_gradient(log_norm, row_mask, grad_logps, grad_entropy, given)
        for chunk in _chunks(active, hidden, weight):
            grad_x = _grad_logits(head, chunk, index, log_norm, entropy, grad_logps, grad_entropy, of_columns)
            with torch.autocast(hidden.device.type, enabled=False):
                if needs_weight:
                    grad_weight.addmm_(grad_x.t(), hidden[chunk].to(head.dtype))
                if needs_bias:
                    grad_bias += grad_x.sum(0)
                if needs_hidden:
                    grad_hidden[chunk] = (grad_x.to(ctx.matmul_dtype) @ head.weight).to(hidden.dtype)
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None, None, None


class _LmHead:
    """The projection with its dtypes settled once: matmul in `matmul_dtype`, result in the compute dtype."""

    def __init__(
        self, hidden, weight, bias, transform: LogitTransform, matmul_dtype: torch.dtype, kept: KeptSets | None
    ):
        self.hidden, self.transform, self.matmul_dtype, self.kept = hidden, transform, matmul_dtype, kept
        self.weight = weight.to(matmul_dtype)  # a copy only when the dtypes differ
        self.bias = None if bias is None else bias.to(matmul_dtype)
        self.dtype = compute_dtype(hidden.dtype)

    def logits(self, chunk: Tensor) -> Tensor:
        """Raw logits x (m, V) of the rows in `chunk` (m,), compute dtype."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            x = torch.nn.functional.linear(self.hidden[chunk].to(self.matmul_dtype), self.weight, self.bias)
        return x.to(self.dtype) if self.kept is None else x.to(self.dtype).masked_fill_(self.outside(chunk), 0.0)

    def transformed(self, x: Tensor, chunk: Tensor) -> Tensor:
        """Policy logits z of `logits`, -inf outside of the kept sets; may reuse x."""
        z = transform_logits(x, self.transform.at(chunk))
        return z if self.kept is None else z.masked_fill(self.outside(chunk), -torch.inf)

    def outside(self, chunk: Tensor) -> Tensor:
        """Bool (m, V): what was not kept."""
        return ~self.kept.mask.select(chunk).table(self.weight.shape[0])

    def chosen(self, index: Tensor, chunk: Tensor, in_vocab: Tensor) -> Tensor:
        """Bool (m,): tokens that are in the vocabulary and were kept."""
        known = index[chunk] == in_vocab
        return known if self.kept is None else known & (self.kept.places[chunk] >= 0)


def _grad_logits(
    head: _LmHead,
    chunk: Tensor,  # (m,) row numbers
    index: Tensor,  # (n,), as the rest
    log_norm: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    of_columns: tuple[Tensor, Tensor] | None,  # (n, k) ids, and the gradients c of the log-probs there
) -> Tensor:
    """dloss/dx (m, V): dz_v = g_l·([v = target] - p_v) - g_H·p_v·(logp_v + H) + sum_j c_j·([v = id_j] - p_v), then back
    through the transform."""
    transform = head.transform.at(chunk)
    slope = transform.logit_scale / transform.spread(2)  # dz/dx without soft-capping, () or (m, 1)
    x = head.logits(chunk)
    log_p = head.transformed(x, chunk).sub_(log_norm[chunk][:, None])  # may reuse x, unless x is needed below
    p = log_p.exp()
    if of_columns is not None:
        ids, c = (y[chunk] for y in of_columns)
        drawn = p.mul(-c.sum(-1, keepdim=True)).scatter_add_(1, ids, c).mul_(slope)
    if grad_entropy is None:
        grad = p.neg_()
    else:
        weight = grad_entropy[chunk][:, None] * slope
        grad = log_p.clamp_(min=LOG_P_FLOOR).add_(entropy[chunk][:, None]).mul_(-weight).mul_(p)
    if grad_logps is not None:
        target = index[chunk]
        in_vocab = target.clamp(0, p.shape[1] - 1)
        # NaN: a bad target poisons its row
        chosen = head.chosen(index, chunk, in_vocab)[:, None]
        g = torch.where(chosen, grad_logps[chunk][:, None] * slope, torch.nan)
        grad = grad.mul_(g) if grad_entropy is None else grad.addcmul_(p, g, value=-1.0)
        grad.scatter_add_(1, in_vocab[:, None], g)  # one column per row: no two adds meet
    elif grad_entropy is None:
        grad.zero_()
    if of_columns is not None:
        grad += drawn
    if transform.final_logit_softcapping is not None:
        grad *= 1.0 - torch.tanh(x * (transform.logit_scale / transform.final_logit_softcapping)).square_()
    return grad


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Autocast's dtype when it is on (it leaves fp64 alone), else hidden's own."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _rows_with_gradient(log_norm: Tensor, row_mask: Tensor | None, *grads: Tensor | None) -> Tensor:
    """Bool (n,): rows whose gradient is not exactly zero. Clipped and A = 0 tokens need no recomputation."""
    active = torch.zeros_like(log_norm, dtype=torch.bool)
    for grad in grads:
        active = active if grad is None else active | (grad != 0)  # NaN != 0: a poisoned row stays poisoned
    return active if row_mask is None else active & row_mask


def _chunks(row_mask: Tensor | None, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Row numbers that need work, split so that a chunk's logits hold at most CHUNK_LOGITS values (one row if more).

    Finding the unmasked rows is the one host sync of the fused linear path; it saves their share of every GEMM.
    """
    rows = torch.arange(hidden.shape[0], device=hidden.device) if row_mask is None else row_mask.nonzero().squeeze(-1)
    return rows.split(max(CHUNK_LOGITS // max(weight.shape[0], 1), 1)) if rows.numel() else ()
