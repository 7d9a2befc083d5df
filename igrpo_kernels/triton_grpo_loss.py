"""Token-level GRPO losses in one launch: statistics, the row's coefficient, and dlogits, without leaving the kernel.

A token's loss depends on the logits only through its own log-probability l and entropy H, so the coefficient dloss/dl
is known as soon as the row has been read once; a second walk over the row, from its end back so that the part still in
L2 comes first, writes dlogits. At most 6 B per bf16 logit in one launch; a row whose coefficient is exactly 0 (clipped,
A = 0) is read once and zero-filled (4 B), a masked row is never read (2 B). The loss itself and the metrics are
(n,)-sized work left to `triton_objective.py`; everything that does not depend on the logits (reduction weights,
sequence-level sampler ratios) arrives as one number per row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from igrpo_kernels.batch import compute_dtype
from igrpo_kernels.triton_launch import RowStrides, on_device, tile_for, transform_factors, vector_length
from igrpo_kernels.triton_math import (
    kl_and_slope,
    policy_slopes,
    row_pointer,
    row_statistics,
    sampler_correction,
    target_log_prob,
    tempered,
    times,
    write_gradient,
)
from igrpo_kernels.types import GRPOLossConfig, LogitTransform

NO_SAMPLER, TRUNCATE, MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class LossScalars(NamedTuple):
    """Run-time numbers of the configuration, as the kernel takes them; absent bounds are infinite."""

    clip_low: float
    clip_high: float
    delta: float
    dual_clip: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    sampler_low: float
    sampler_high: float
    beta: float
    kl_tau: float
    dro_beta: float

    @classmethod
    def of(cls, config: GRPOLossConfig) -> "LossScalars":
        """The numbers of a configuration."""

        def bound(x: float | None, absent: float) -> float:
            return absent if x is None else float(x)

        return cls(
            float(config.clip_low),
            float(config.clip_high),
            bound(config.delta, torch.inf),
            bound(config.dual_clip, torch.inf),
            float(config.sapo_temperature_pos),
            float(config.sapo_temperature_neg),
            bound(config.importance_sampling_clip_min, -torch.inf),
            bound(config.importance_sampling_clip_max, torch.inf),
            float(config.beta),
            float(config.kl_tau),
            float(config.dro_beta or 0.0),
        )


class LossKind(NamedTuple):
    """Compile-time choices of the configuration: which equations, never which numbers."""

    term: str  # name of the policy term in `losses.py`
    sampler: int  # NO_SAMPLER, TRUNCATE or MASK: token-level correction inside the kernel
    kl: int  # 0, or the k of k1, k2, k3
    bias_corrected_kl: int  # 0 or 1
    pulls: int  # 0 or 1: kl_tau

    @classmethod
    def of(cls, config: GRPOLossConfig) -> "LossKind":
        """The equations of a configuration."""
        sampler, mode = NO_SAMPLER, config.importance_sampling_mode
        if mode is not None and mode.startswith("token"):  # a sequence's ratio arrives as a number per row
            sampler = {"token_truncate": TRUNCATE, "token_mask": MASK}[mode]
        kl = int(config.kl_estimator[1]) if config.beta != 0.0 else 0
        return cls(
            config.loss.term.name, sampler.value, kl, int(config.use_bias_correction_kl), int(config.kl_tau != 0.0)
        )


class CoefficientInputs(NamedTuple):
    """What the kernel knows about each row besides its logits. (n,) each, None = absent."""

    index: Tensor  # int64
    mask: Tensor  # bool
    advantages: Tensor
    loss_weight: Tensor  # dloss/d(token loss): the reduction's weight
    old_per_token_logps: Tensor | None  # None = the current policy
    ref_per_token_logps: Tensor | None
    sampling_per_token_logps: Tensor | None  # for the token-level correction and kl_tau only
    policy_weight: Tensor | None  # sampler ratio that is no token's own, and 0 where the row is rejected
    grad_entropy: Tensor | None  # (): dloss/dentropy, the same for every unmasked row
    nll_weights: Tensor | None
    temperatures: Tensor | None


_POINTERS = [
    "logits_ptr",
    "grad_ptr",
    "logps_ptr",
    "entropy_ptr",
    "index_ptr",
    "mask_ptr",
    "advantages_ptr",
    "loss_weight_ptr",
    "old_ptr",
    "ref_ptr",
    "sampling_ptr",
    "policy_weight_ptr",
    "grad_entropy_ptr",
    "nll_weights_ptr",
    "temperatures_ptr",
]
_RUN_TIME = [
    "V",
    "tokens",
    "stride_batch",
    "stride_token",
    "grad_stride_batch",
    "grad_stride_token",
    "inner",
    "outer",
    *LossScalars._fields,
]


@triton.jit
def token_slopes(
    logp, advantage, old, ref, w, policy_weight, clip_low, clip_high, delta, dual_clip, sapo_temperature_pos,
    sapo_temperature_neg, beta, TERM: tl.constexpr, KL: tl.constexpr, BIAS_CORRECTED: tl.constexpr,
):  # fmt: skip
    """d(token loss)/dw, and the part of d(token loss)/dlogp that does not go through the ratio."""
    ratio_slope, direct = policy_slopes(
        logp, old, w, advantage, clip_low, clip_high, delta, dual_clip, sapo_temperature_pos, sapo_temperature_neg, TERM
    )
    ratio_slope = times(policy_weight, ratio_slope)
    direct = times(policy_weight, direct)
    if KL != 0:
        kl, kl_slope = kl_and_slope(ref - logp, KL)
        if BIAS_CORRECTED:
            ratio_slope += beta * kl
            kl_slope = times(kl_slope, w)
        direct += beta * kl_slope
    return ratio_slope, direct


@triton.jit
def token_coefficient(
    logp,  # of the token
    advantage,
    old,
    ref,
    sampling,
    policy_weight,
    clip_low,
    clip_high,
    delta,
    dual_clip,
    sapo_temperature_pos,
    sapo_temperature_neg,
    sampler_low,
    sampler_high,
    beta,
    kl_tau,
    dro_beta,
    TERM: tl.constexpr,
    SAMPLER: tl.constexpr,
    KL: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
    PULLS: tl.constexpr,
):
    """d(token loss)/dlogp; the equations of `objective.py` in the same order, differentiated by hand."""
    w = tl.exp(logp - old)
    if SAMPLER != NO_SAMPLER:
        policy_weight = times(
            policy_weight, sampler_correction(old - sampling, sampler_low, sampler_high, SAMPLER == MASK)
        )
    ratio_slope, direct = token_slopes(
        logp, advantage, old, ref, w, policy_weight, clip_low, clip_high, delta, dual_clip, sapo_temperature_pos,
        sapo_temperature_neg, beta, TERM, KL, BIAS_CORRECTED,
    )  # fmt: skip
    if TERM == "dro":
        direct += times(policy_weight, dro_beta * (logp - old))
    if PULLS:  # to the sampler, where it is known
        direct += tl.where(sampling != sampling, 0.0, 2.0 * kl_tau * (logp - sampling))
    # A NaN shows: tl.minimum and tl.maximum would drop it.
    return tl.where(w != w, w, times(ratio_slope, w) + direct)


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_POINTERS)
def token_loss_kernel(
    # data: (rows, V) logits and grad, which may be the same; the rest one value per row
    logits_ptr,
    grad_ptr,
    logps_ptr,
    entropy_ptr,
    index_ptr,
    mask_ptr,
    advantages_ptr,
    loss_weight_ptr,
    old_ptr,
    ref_ptr,
    sampling_ptr,
    policy_weight_ptr,
    grad_entropy_ptr,
    nll_weights_ptr,
    temperatures_ptr,
    # shape and strides
    V: tl.int32,
    tokens: tl.int64,
    stride_batch: tl.int64,
    stride_token: tl.int64,
    grad_stride_batch: tl.int64,
    grad_stride_token: tl.int64,
    # transform
    inner: tl.float64,
    outer: tl.float64,
    # loss
    clip_low: tl.float64,
    clip_high: tl.float64,
    delta: tl.float64,
    dual_clip: tl.float64,
    sapo_temperature_pos: tl.float64,
    sapo_temperature_neg: tl.float64,
    sampler_low: tl.float64,
    sampler_high: tl.float64,
    beta: tl.float64,
    kl_tau: tl.float64,
    dro_beta: tl.float64,
    # constants
    TERM: tl.constexpr,
    SAMPLER: tl.constexpr,
    KL: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr,
    PULLS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    VEC: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    NEAR: tl.constexpr,
):
    DTYPE: tl.constexpr = logps_ptr.dtype.element_ty
    V = V // VEC * VEC
    row = tl.program_id(0).to(tl.int64)
    inner, outer = tempered(inner, outer, temperatures_ptr, row, DTYPE, SOFTCAP)
    row_ptr = row_pointer(logits_ptr, row, tokens, stride_batch, stride_token, VEC)
    grad_row_ptr = row_pointer(grad_ptr, row, tokens, grad_stride_batch, grad_stride_token, VEC)
    active = tl.load(mask_ptr + row) != 0
    target = tl.load(index_ptr + row)
    columns = tl.where(active, V, 0)  # a masked row is not read

    row_max, s, e = row_statistics(row_ptr, columns, inner, outer, DTYPE, SOFTCAP, TILE, LANES, NEAR)
    s = tl.where(active, s, 1.0)
    log_sum = tl.log(s)
    entropy = log_sum - e / s
    # Read before any store: in place, the target's column is about to be overwritten by another thread.
    logp = target_log_prob(row_ptr, target, columns, inner, outer, row_max, log_sum, DTYPE, SOFTCAP)
    tl.debug_barrier()
    tl.store(logps_ptr + row, tl.where(active, logp, 0.0))
    tl.store(entropy_ptr + row, tl.where(active, entropy, 0.0))
    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + row)
    ref = tl.zeros_like(logp)
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + row)
    sampling = tl.zeros_like(logp)
    if sampling_ptr is not None:
        sampling = tl.load(sampling_ptr + row)
    policy_weight = tl.full((), 1.0, DTYPE)
    if policy_weight_ptr is not None:
        policy_weight = tl.load(policy_weight_ptr + row)
    grad_entropy = tl.zeros_like(logp)
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr)
    grad_logp = token_coefficient(
        logp,
        tl.load(advantages_ptr + row),
        old,
        ref,
        sampling,
        policy_weight,
        tl.full((), clip_low, DTYPE),
        tl.full((), clip_high, DTYPE),
        tl.full((), delta, DTYPE),
        tl.full((), dual_clip, DTYPE),
        tl.full((), sapo_temperature_pos, DTYPE),
        tl.full((), sapo_temperature_neg, DTYPE),
        tl.full((), sampler_low, DTYPE),
        tl.full((), sampler_high, DTYPE),
        tl.full((), beta, DTYPE),
        tl.full((), kl_tau, DTYPE),
        tl.full((), dro_beta, DTYPE),
        TERM,
        SAMPLER,
        KL,
        BIAS_CORRECTED,
        PULLS,
    )
    loss_weight = tl.load(loss_weight_ptr + row)
    grad_logp = tl.where(loss_weight == 0.0, 0.0, grad_logp * loss_weight)
    if nll_weights_ptr is not None:
        grad_logp -= tl.load(nll_weights_ptr + row)
    grad_logp = tl.where((target >= 0) & (target < V), grad_logp, float("nan"))
    wanted = (active != 0) & ((grad_logp != 0.0) | (grad_entropy != 0.0))
    write_gradient(
        row_ptr, grad_row_ptr, target, V, inner, outer, row_max, log_sum, entropy, grad_logp, grad_entropy, wanted,
        DTYPE, grad_entropy_ptr is not None, SOFTCAP, TILE * LANES,
    )  # fmt: skip


def token_loss_fwd(
    logits: Tensor,  # (n, V) or (B, T, V), adjacent columns
    grad: Tensor,  # same shape: written; may be logits itself
    rows: CoefficientInputs,
    transform: LogitTransform,
    scalars: LossScalars,
    kind: LossKind,
) -> tuple[Tensor, Tensor]:
    """logps and entropy (n,); grad = dloss/dlogits for an upstream gradient of 1."""
    layout, grad_layout, V = RowStrides.of(logits), RowStrides.of(grad), logits.shape[-1]
    dtype = compute_dtype(logits.dtype)
    logps, entropy = (torch.empty(layout.count, dtype=dtype, device=logits.device) for _ in range(2))
    inner, outer, capped = transform_factors(transform)
    tile, lanes, near, num_warps = tile_for(V, logits.itemsize)
    if layout.count:
        with on_device(logits):
            token_loss_kernel[(layout.count,)](
                logits,
                grad,
                logps,
                entropy,
                *rows._replace(mask=rows.mask.view(torch.uint8)),
                V,
                layout.tokens,
                layout.stride_batch,
                layout.stride_token,
                grad_layout.stride_batch,
                grad_layout.stride_token,
                inner,
                outer,
                *scalars,
                TERM=kind.term,
                SAMPLER=kind.sampler,
                KL=kind.kl,
                BIAS_CORRECTED=bool(kind.bias_corrected_kl),
                PULLS=bool(kind.pulls),
                SOFTCAP=capped,
                VEC=vector_length(logits, grad),
                TILE=tile,
                LANES=lanes,
                NEAR=near,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
    return logps, entropy
