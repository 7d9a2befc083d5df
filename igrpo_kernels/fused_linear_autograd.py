"""The fused linear functions as autograd nodes, and as operators that torch.compile takes whole.

Rows are compacted, so shapes inside depend on values: a graph cannot hold them. While one is being traced each function
is a single `torch.library` operator with a fake kernel; otherwise it is called as it is. The operators return empty
tensors for gradients that nobody wanted, since an operator cannot return None.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from igrpo_kernels import fused_linear
from igrpo_kernels.batch import TokenBatch, compute_dtype
from igrpo_kernels.first_order import first_order_only
from igrpo_kernels.fused_loss import LossRows, with_gradients
from igrpo_kernels.impls import IMPLS
from igrpo_kernels.lm_head import HeadPlan
from igrpo_kernels.loss_checks import NAMES
from igrpo_kernels.objective import may_contribute, shapes_the_loss
from igrpo_kernels.row_kernels import RowKernels
from igrpo_kernels.side_stream import may_ask
from igrpo_kernels.types import GRPOLossConfig, LogitTransform, RowStats
from igrpo_kernels.vocab_parallel import VocabShard


def linear_grpo_loss(
    kernels: RowKernels,
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    *,
    fp32_logits: bool = False,
    compute_metrics: bool = True,
    shard: VocabShard | None = None,
) -> LossRows:
    """Loss (), logps (n,), entropy (n,), metrics."""
    leaves = [hidden, weight, bias]
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in leaves]
    tracing = torch.compiler.is_compiling()
    measured = contributes = reported = None  # every row: nothing that the device must be asked for
    if batch.lengths_on_host is None and (hidden.device.type == "cpu" or not batch.whole or not compute_metrics):
        measured = batch.mask if compute_metrics else shapes_the_loss(batch, config)
        contributes = may_contribute(batch, config)
        reported = measured & ~contributes
    # A graph's operator asks for itself.
    if measured is not None and not tracing and not may_ask(hidden):
        measured, contributes, reported = batch.mask, batch.mask, None
    one_pass = kernels.fits_one_pass(batch, config)
    plan = _plan(hidden, weight, fp32_logits, shard)
    # A graph's own autograd goes through the objective. So does fp16: it lives on a loss scale, which comes with
    # backward, and a gradient made before that would have lost its small values.
    if not any(needs) or (tracing and not one_pass) or plan.matmul_dtype == torch.float16:
        transform = config.logit_transform._replace(temperatures=batch.temperatures)
        logps, entropy, *divergence = linear_selective_log_softmax(
            kernels, hidden, weight, bias, batch.index, transform,
            return_entropy=True, row_mask=measured, fp32_logits=fp32_logits, shard=shard,
        )  # fmt: skip
        used = entropy if config.needs_entropy_gradient else entropy.detach()
        loss, metrics = kernels.objective(logps, used, batch, config, num_items_in_batch, *divergence)
        return loss, logps, entropy, metrics if compute_metrics else {}
    with torch.no_grad():
        detached = [None if x is None else x.detach() for x in leaves]
        if not one_pass:
            (loss, metrics), logps, entropy, *gradients = fused_linear.coupled_loss(
                kernels, *detached, batch, config, num_items_in_batch, contributes, reported, needs, plan, shard
            )
        else:
            inputs = kernels.coefficient_inputs(batch, config, num_items_in_batch)
            if tracing:
                rows = (list(inputs), contributes, reported)
                logps, entropy, *gradients = linear_token_loss(
                    kernels.name, *detached, *rows, *_config_arguments(config), needs, *plan
                )
                gradients = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
            else:
                arguments = (inputs, contributes, reported, config, needs, plan)
                logps, entropy, *gradients = fused_linear.token_level_loss(kernels, *detached, *arguments)
            loss, metrics = kernels.objective(logps, entropy, batch, config, num_items_in_batch)
    loss = with_gradients(kernels, loss, leaves, gradients)
    return loss, logps, entropy, metrics if compute_metrics else {}


def linear_selective_log_softmax(
    kernels: RowKernels,
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
) -> tuple[Tensor | None, ...]:
    """logps (n,) and entropy (n,) or None of `hidden @ weight.T + bias`, without those logits; of `DistilledRows` also
    the divergence (n,)."""
    plan = _plan(hidden, weight, fp32_logits, shard)
    shared, temperatures = transform._replace(temperatures=None), transform.temperatures
    logps, entropy, *divergence = LinearSelectiveLogSoftmax.apply(
        kernels, hidden, weight, bias, index.contiguous(), row_mask, shared, temperatures, return_entropy, plan, shard
    )
    return logps, entropy if return_entropy else None, *divergence


def _plan(hidden: Tensor, weight: Tensor, fp32_logits: bool, shard: VocabShard | None) -> HeadPlan:
    columns = weight.shape[0] if shard is None else max(shard.sizes)
    return HeadPlan.of(hidden, weight, columns, fp32_logits, weight.requires_grad and torch.is_grad_enabled())


class LinearSelectiveLogSoftmax(torch.autograd.Function):
    """Statistics of each chunk forward; backward makes the chunk's logits again and turns them into gradients."""

    @staticmethod
    def forward(
        ctx, kernels, hidden, weight, bias, index, row_mask, transform, temperatures, return_entropy, plan, shard
    ):
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.transform, ctx.plan, ctx.shard = kernels, transform, plan, shard
        transform = transform._replace(temperatures=temperatures)
        rows = (hidden.detach(), weight.detach(), None if bias is None else bias.detach(), index, row_mask)
        if torch.compiler.is_compiling():
            stats = RowStats(*linear_log_probs(kernels.name, *rows, *transform, return_entropy, *plan))
        else:
            keep = any(ctx.needs_input_grad)
            stats, ctx.kept = fused_linear.log_probs(kernels, *rows, transform, return_entropy, plan, shard, keep)
        ctx.save_for_backward(hidden, weight, bias, index, row_mask, temperatures, *stats.known)
        return stats.logps, stats.entropy, *stats.of_teacher

    @staticmethod
    @first_order_only
    def backward(ctx, grad_logps: Tensor | None, grad_entropy: Tensor | None, *grad_divergence: Tensor | None):
        hidden, weight, bias, index, row_mask, temperatures, *stats = ctx.saved_tensors
        transform = ctx.transform._replace(temperatures=temperatures)
        needs, rows = list(ctx.needs_input_grad[1:4]), (hidden, weight, bias, index, row_mask)
        if torch.compiler.is_compiling():
            gradients = linear_log_probs_backward(
                ctx.kernels.name, *rows, *stats, grad_logps, grad_entropy, *transform, needs, *ctx.plan
            )
            gradients = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
        else:
            kept, ctx.kept = ctx.kept, None  # a second backward computes them
            gradients = fused_linear.log_probs_backward(
                ctx.kernels, *rows, RowStats(*stats), grad_logps, grad_entropy, transform, needs,
                ctx.plan, ctx.shard, kept, *grad_divergence,
            )  # fmt: skip
        typed = [None if g is None else g.to(x.dtype) for g, x in zip(gradients, rows[:3], strict=True)]
        return None, *typed, None, None, None, None, None, None, None


# ---- the operators


@torch.library.custom_op("igrpo_kernels::linear_token_loss", mutates_args=())
def linear_token_loss(
    kernels: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Sequence[Tensor | None],
    contributes: Tensor | None,
    reported: Tensor | None,
    config_names: str,
    config_numbers: Sequence[float],
    needs: Sequence[bool],
    matmul_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`fused_linear.token_level_loss`."""
    config, plan = _config(config_names, config_numbers), HeadPlan(matmul_dtype, logits_dtype, chunk_rows)
    rows = (hidden, weight, bias, tuple(inputs), contributes, reported)
    logps, entropy, *gradients = fused_linear.token_level_loss(
        IMPLS[kernels].kernels(), *rows, config, list(needs), plan
    )
    return logps, entropy, *_no_none(gradients, hidden)


@linear_token_loss.register_fake
def _(kernels, hidden, weight, bias, inputs, contributes, reported, names, numbers, needs, *_):
    dtype, n = compute_dtype(hidden.dtype), hidden.shape[0]
    rows = [hidden.new_empty(n, dtype=dtype) for _ in range(2)]
    return *rows, *_gradients_like(hidden, weight, bias, needs)


@torch.library.custom_op("igrpo_kernels::linear_log_probs", mutates_args=())
def linear_log_probs(
    kernels: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    row_mask: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    temperatures: Tensor | None,
    with_entropy: bool,
    matmul_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fused_linear.log_probs`."""
    transform = LogitTransform(scale, softcap, temperature, temperatures)
    plan = HeadPlan(matmul_dtype, logits_dtype, chunk_rows)
    rows = (hidden, weight, bias, index, row_mask)
    stats, _ = fused_linear.log_probs(IMPLS[kernels].kernels(), *rows, transform, with_entropy, plan)
    return tuple(x.clone() for x in stats.known)  # results share no memory, and two may be views of one tensor


@linear_log_probs.register_fake
def _(kernels, hidden, *_):
    dtype = compute_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4))


@torch.library.custom_op("igrpo_kernels::linear_log_probs_backward", mutates_args=())
def linear_log_probs_backward(
    kernels: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    row_mask: Tensor | None,
    logps: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    temperatures: Tensor | None,
    needs: Sequence[bool],
    matmul_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_linear.log_probs_backward`."""
    transform = LogitTransform(scale, softcap, temperature, temperatures)
    plan = HeadPlan(matmul_dtype, logits_dtype, chunk_rows)
    rows, stats = (hidden, weight, bias, index, row_mask), RowStats(logps, entropy, row_max, log_sum)
    gradients = fused_linear.log_probs_backward(
        IMPLS[kernels].kernels(), *rows, stats, grad_logps, grad_entropy, transform, list(needs), plan, None
    )
    return tuple(_no_none(gradients, hidden))


@linear_log_probs_backward.register_fake
def _(kernels, hidden, weight, bias, *rest):
    return tuple(_gradients_like(hidden, weight, bias, rest[12]))


def _gradients_like(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> list[Tensor]:
    dtype = compute_dtype(hidden.dtype)
    found = [hidden.new_empty(hidden.shape), weight.new_empty(weight.shape, dtype=dtype)]
    found.append(hidden.new_empty(0, dtype=dtype) if bias is None else bias.new_empty(bias.shape, dtype=dtype))
    return [x if needed else hidden.new_empty(0, dtype=dtype) for x, needed in zip(found, needs, strict=True)]


def _no_none(gradients: list[Tensor | None], hidden: Tensor) -> list[Tensor]:
    """As `_gradients_like` announces them."""
    dtype = compute_dtype(hidden.dtype)
    grad_hidden, *others = [hidden.new_empty(0, dtype=dtype) if g is None else g for g in gradients]
    return [grad_hidden, *(g.to(dtype) for g in others)]


_CONFIG_NUMBERS = tuple(f.name for f in fields(GRPOLossConfig) if f.name not in NAMES)


def _config_arguments(config: GRPOLossConfig) -> tuple[str, list[float]]:
    """A configuration as operator arguments: its names, then its numbers (NaN = None)."""
    numbers = [getattr(config, name) for name in _CONFIG_NUMBERS]
    return (
        "|".join(str(getattr(config, name) or "") for name in NAMES),
        [float("nan") if x is None else float(x) for x in numbers],
    )


def _config(names: str, numbers: Sequence[float]) -> GRPOLossConfig:
    given = {name: value or None for name, value in zip(NAMES, names.split("|"), strict=True)}
    given |= {name: None if x != x else x for name, x in zip(_CONFIG_NUMBERS, numbers, strict=True)}
    return GRPOLossConfig(**{**given, "use_bias_correction_kl": bool(given["use_bias_correction_kl"])})
