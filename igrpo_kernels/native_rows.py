"""The row kernels of `impl="cpu"` and `impl="cuda"` (csrc/), as `row_kernels.py` describes them. Compute dtype fp32."""

import math

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.objective import entropy_slope, locality, reduction_weights, rows, sampler_ratio
from igrpo_kernels.row_kernels import RowStats, addressable
from igrpo_kernels.types import CLIPPED_LOSS_TYPES, GRPOLossConfig, LogitTransform

__all__ = ["addressable", "gradient", "one_launch", "scale_", "statistics", "token_loss", "token_rows"]

_POLICY = {"cispo": 1, "sapo": 2} | dict.fromkeys(CLIPPED_LOSS_TYPES, 0)


def statistics(
    logits: Tensor, index: Tensor, mask: Tensor | None, transform: LogitTransform, with_entropy: bool = True
) -> RowStats:
    """One read of the logits; the entropy costs nothing and is always there."""
    logps, entropy, norm = torch.ops.igrpo.row_stats(_outer(logits), index, mask, *_numbers(transform))
    return RowStats(logps, entropy, *norm.unbind())


def gradient(
    logits: Tensor,
    out: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    stats: RowStats,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    transform: LogitTransform,
) -> Tensor:
    """One read of the logits, one write of their gradient; a copy more if `out` has another dtype."""
    x, norm = _outer(logits), torch.stack([stats.row_max, stats.log_sum])
    grad_logps = torch.zeros_like(stats.logps) if grad_logps is None else grad_logps.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    arguments = (x, index, mask, stats.logps, stats.entropy, norm, grad_logps, grad_entropy, *_numbers(transform))
    if out is None:
        return torch.ops.igrpo.row_grad(*arguments).view(logits.shape)
    torch.ops.igrpo.row_grad_(*arguments)
    return out if out is logits else out.copy_(logits)


def one_launch(batch: TokenBatch, config: GRPOLossConfig) -> bool:
    """Whether dloss/dl of a row follows from that row's logits and constants known beforehand."""
    sampled = config.importance_sampling_mode is not None and batch.sampling_per_token_logps is not None
    sampler_ratio_follows_logps = sampled and batch.old_per_token_logps is None
    return locality(batch, config) == "token" and not sampler_ratio_follows_logps


def token_rows(
    batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None
) -> tuple[Tensor | None, ...]:
    """index, mask, advantages, loss weights, old, ref, sampler ratio, dloss/dentropy; each (n,) or None."""
    old, sampler = batch.old_per_token_logps, None
    if old is not None:
        sampler = sampler_ratio(old, batch, config)
        sampler = None if sampler is None else rows(sampler, batch, config).contiguous()
    slope = entropy_slope(batch, config)
    return (
        batch.index,
        batch.mask,
        batch.advantages.contiguous(),
        reduction_weights(batch, config, num_items_in_batch).contiguous(),
        old,
        batch.ref_per_token_logps if config.beta != 0.0 else None,
        sampler,
        None if slope is None else torch.where(batch.mask, slope, 0.0),
    )


def token_loss(
    logits: Tensor, out: Tensor | None, token_rows: tuple[Tensor | None, ...], config: GRPOLossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pass over the logits where a row stays close to the processor, one write."""
    arguments = (_outer(logits), *token_rows, objective_numbers(config), *_numbers(config.logit_transform))
    if out is None:
        logps, entropy, slope, grad = torch.ops.igrpo.token_loss(*arguments)
        return logps, entropy, slope, grad.view(logits.shape)
    rows = torch.ops.igrpo.token_loss_(*arguments)
    return *rows, out if out is logits else out.copy_(logits)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor (), for a factor that is nearly always 1: then the memory is not touched."""
    if grad.device.type != "cpu":  # looking at the factor here would be a sync; the kernel looks
        torch.ops.igrpo.scale_(_outer(grad if grad.dim() > 1 else grad[None]), factor.float())
    elif factor.item() != 1.0:
        grad.mul_(factor)


def objective_numbers(config: GRPOLossConfig) -> list[float]:
    """ObjectiveParams of csrc/params.h, in its order."""
    return [
        _POLICY[config.loss_type],
        int(config.kl_estimator[1]),
        float(config.use_bias_correction_kl),
        config.clip_low,
        config.clip_high,
        math.inf if config.delta is None else config.delta,
        math.inf if config.dual_clip is None else config.dual_clip,
        config.beta,
        config.sapo_temperature_pos,
        config.sapo_temperature_neg,
    ]


def _outer(x: Tensor) -> Tensor:
    """(n, V) or (B, T, V) as the operators take it: (outer, inner, V)."""
    return x if x.dim() == 3 else x[None]


def _numbers(transform: LogitTransform) -> tuple[float, float, float]:
    return transform.logit_scale, transform.final_logit_softcapping or 0.0, transform.temperature
