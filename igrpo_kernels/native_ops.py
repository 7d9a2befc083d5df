"""The compiled operators (`torch.ops.igrpo`, csrc/): loading, fake kernels, and calls in this package's terms.

Shared by impl="cpu" and impl="cuda": one set of schemas, one implementation per device.
"""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.objective import objective_and_row_gradients, reduce_loss, rows, sampler_ratio
from igrpo_kernels.source_hash import source_hash
from igrpo_kernels.types import CLIPPED_LOSS_TYPES, GRPOLossConfig, LogitTransform

_BUILD = "`pip install --no-deps --no-build-isolation -e .` in the source folder builds it"
_HASH_OPERATOR = {"_C_cpu": "source_hash", "_C_cuda": "cuda_source_hash"}
_POLICY = {"cispo": 1, "sapo": 2} | dict.fromkeys(CLIPPED_LOSS_TYPES, 0)


class RowStats(NamedTuple):
    """What the statistics kernel reduces n rows to; all fp32, 0 on masked rows."""

    logps: Tensor
    """(n,) log p[index]; NaN where the index lies outside the vocabulary."""

    entropy: Tensor
    """(n,) nats."""

    norm: Tensor
    """(2, n): max z, and log sum exp(z - max z)."""


@functools.cache
def missing_library(name: str) -> str | None:
    """Loads igrpo_kernels/<name>.so once; None when its operators are there, else why not and what to do."""
    path = Path(__file__).parent / f"{name}.so"
    if not path.is_file():
        return f"{path.name} is not built (no compiler, or IGRPO_SKIP_EXT=1); {_BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load ({error.__cause__ or error}); {_BUILD} again for this torch"
    sources, built = source_hash(name), getattr(torch.ops.igrpo, _HASH_OPERATOR[name])()
    if sources is not None and sources != built:
        return f"{path.name} was built from other sources than the ones in csrc/; {_BUILD} again"
    if name == "_C_cpu":
        _register_fake_kernels()
    return None


def as_rows(logits: Tensor) -> Tensor:
    """(..., V) of any strides -> (outer, inner, V) with contiguous columns: a view unless the strides forbid one."""
    if logits.dim() != 3:
        logits = logits.reshape(1, -1, logits.shape[-1])
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def row_stats(logits: Tensor, index: Tensor, mask: Tensor | None, transform: LogitTransform) -> RowStats:
    """Statistics of the rows of `logits` (outer, inner, V); index and mask (n,). Masked rows are not read."""
    return RowStats(*torch.ops.igrpo.row_stats(logits, index, mask, *_numbers(transform)))


def row_grad(
    logits: Tensor,  # (outer, inner, V)
    index: Tensor,  # (n,)
    mask: Tensor | None,  # (n,) bool
    stats: RowStats,
    grad_logps: Tensor,  # (n,) fp32
    grad_entropy: Tensor | None,  # (n,) fp32
    transform: LogitTransform,
    *,
    inplace: bool,
) -> Tensor:
    """dloss/dlogits in logits' shape and dtype, in logits' own storage if `inplace`."""
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    arguments = (logits, index, mask, *stats, grad_logps.contiguous(), grad_entropy, *_numbers(transform))
    if not inplace:
        return torch.ops.igrpo.row_grad(*arguments)
    torch.ops.igrpo.row_grad_(*arguments)
    return logits


def token_loss(
    logits: Tensor,  # (outer, inner, V)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps (n,), entropy (n,), the dloss/dlogps (n,) it applied, and dloss/dlogits, in one pass over the logits."""
    old, sampler = batch.old_per_token_logps, None
    if old is not None:
        sampler = sampler_ratio(old, batch, config)
        sampler = None if sampler is None else rows(sampler, batch, config).contiguous()
    arguments = (
        logits,
        batch.index,
        batch.mask,
        batch.advantages.contiguous(),
        loss_weights(batch, config, num_items_in_batch),
        old,
        batch.ref_per_token_logps if config.beta != 0.0 else None,
        sampler,
        _entropy_weights(batch, config),
        objective_numbers(config),
        *_numbers(config.logit_transform),
    )
    if not inplace:
        return torch.ops.igrpo.token_loss(*arguments)
    return *torch.ops.igrpo.token_loss_(*arguments), logits


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor (), for a factor that is nearly always 1: then the memory is not touched."""
    if grad.dtype == torch.float64:
        grad.mul_(factor)
    elif grad.device.type != "cpu":  # looking at the factor here would be a sync; the kernel looks
        torch.ops.igrpo.scale_(grad if grad.dim() == 3 else grad.view(1, -1, grad.shape[-1]), factor.float())
    elif factor.item() != 1.0:
        grad.mul_(factor)


def is_token_level(batch: TokenBatch, config: GRPOLossConfig) -> bool:
    """Whether a row's gradient depends on no other row's log-probability: then it is known within the row."""
    return locality(batch, config) == "token"


def locality(batch: TokenBatch, config: GRPOLossConfig) -> str:
    """Which rows must be measured before a row's gradient is known: its own ("token"), its "sequence", the "batch"."""
    if config.top_entropy_quantile < 1.0:
        return "batch"
    ratio_follows_logps = batch.old_per_token_logps is None and batch.sampling_per_token_logps is not None
    if (
        config.importance_sampling_level == "sequence"
        or config.loss_type == "vespo"
        or config.off_policy_mask_threshold is not None
        or (ratio_follows_logps and config.importance_sampling_mode is not None)
    ):
        return "sequence"
    return "token"


def loss_weights(batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None) -> Tensor:
    """dloss / d(loss of each token) (n,), constants of the batch: the derivative of the one definition of the sum."""
    with torch.enable_grad():
        probe = torch.zeros_like(batch.advantages).requires_grad_()
        return torch.autograd.grad(reduce_loss(probe, batch, config, num_items_in_batch), probe)[0].contiguous()


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


def _entropy_weights(batch: TokenBatch, config: GRPOLossConfig) -> Tensor | None:
    """dloss/dentropy (n,) of a token-level loss: it depends on no log-probability, so zeros serve as well."""
    if not config.needs_entropy_gradient:
        return None
    zeros = torch.zeros_like(batch.advantages)
    return objective_and_row_gradients(zeros, zeros, batch, config)[3].contiguous()


def _numbers(transform: LogitTransform) -> tuple[float, float, float]:
    return transform.logit_scale, transform.final_logit_softcapping or 0.0, transform.temperature


def _register_fake_kernels() -> None:
    def stats(logits, *_):
        n = logits.shape[0] * logits.shape[1]
        return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n)))

    def loss_rows(logits, *_):
        n = logits.shape[0] * logits.shape[1]
        return tuple(logits.new_empty((n,), dtype=torch.float32) for _ in range(3))

    def gradient(logits, *_):
        return logits.new_empty(logits.shape)

    torch.library.register_fake("igrpo::row_stats", stats)
    torch.library.register_fake("igrpo::row_grad", gradient)
    torch.library.register_fake("igrpo::row_grad_", lambda *_: None)
    torch.library.register_fake("igrpo::token_loss", lambda logits, *_: (*loss_rows(logits), gradient(logits)))
    torch.library.register_fake("igrpo::token_loss_", loss_rows)
    torch.library.register_fake("igrpo::scale_", lambda *_: None)
