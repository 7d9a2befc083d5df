"""The sampler in the objective's kernels: `objective.sampler_ratio` and `rejection.py`."""

from collections.abc import Mapping

import triton
import triton.language as tl

from igrpo_kernels.rejection import LOG_RATIO_LIMIT, criteria
from igrpo_kernels.triton_grpo_loss import MASK, NO_SAMPLER
from igrpo_kernels.triton_math import sampler_correction
from igrpo_kernels.types import GRPOLossConfig

SEQ_MASK = tl.constexpr(3)  # beside NO_SAMPLER, TRUNCATE and MASK: seq-mask-tis

_SIDES = {"token": ("k1_low", "k1", "k2", "k3"), "seq_sum": ("k1_low", "k1", "k2", "k3"),
          "seq_mean": ("k1_low", "k1", "k2", "k3"), "seq_max": ("k2", "k3")}  # fmt: skip
BOUNDS = tuple(f"{over}_{side}" for over, sides in _SIDES.items() for side in sides)
OF_TOKEN, OF_SUM, OF_MEAN, OF_MAX = (tl.constexpr(4 * i) for i in range(4))  # where those of each begin
_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)


def rejection_bounds(config: GRPOLossConfig) -> Mapping[str, float]:
    """BOUNDS by name; infinite where nothing is rejected by it."""
    bounds = {name: float("-inf" if name.endswith("low") else "inf") for name in BOUNDS}
    if config.rollout_rs is not None:
        for statistic, over, low, high in criteria(config.rollout_rs, config.rollout_rs_threshold):
            name = f"{over}_{statistic}" if over == "token" else f"seq_{over}_{statistic}"
            bounds |= {name: high} | ({f"{name}_low": low} if statistic == "k1" else {})
    return bounds


@triton.jit
def log_sampler_ratio(old, sampling, DTYPE: tl.constexpr):
    """log pi_old - log pi_sampler, finite: 0 where unknown (NaN)."""
    LARGEST: tl.constexpr = 3.4028234663852886e38 if DTYPE is tl.float32 else 1.7976931348623157e308
    x = old - sampling
    return tl.where(x != x, 0.0, tl.minimum(tl.maximum(x, -LARGEST), LARGEST))


@triton.jit
def common_ratio(log_sum, length, low, high, SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr):
    """What a sequence's rows share of the sampler's ratio: all of it; seq-mask-tis: 1 where they count, else 0."""
    ratio = tl.full((), 1.0, log_sum.dtype)
    if SAMPLER == SEQ_MASK:
        mean = tl.exp(log_sum / length)
        ratio = tl.where((mean < low) | (mean > high), 0.0, ratio)
    elif SAMPLER_OF_SEQUENCE:
        ratio = sampler_correction(log_sum, low, high, SAMPLER == MASK)
    return ratio


@triton.jit
def row_ratio(common, old, sampling, low, high, SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr):
    """The sampler's ratio of rows."""
    ratio = tl.zeros_like(old) + common
    if SAMPLER == SEQ_MASK:
        ratio = tl.where(ratio == 0.0, 0.0, sampler_correction(old - sampling, 0.0, float("inf"), False))
    elif SAMPLER != NO_SAMPLER and not SAMPLER_OF_SEQUENCE:
        ratio = sampler_correction(old - sampling, low, high, SAMPLER == MASK)
    return ratio


@triton.jit
def statistics(old, sampling):
    """k1, k2 and k3 of rows."""
    u = old - sampling
    u = tl.where(u != u, 0.0, tl.minimum(tl.maximum(u, -_LIMIT), _LIMIT))
    return -u, 0.5 * u * u, tl.exp(u) - 1.0 - u


@triton.jit
def within(k1, k2, k3, bounds, FIRST: tl.constexpr):
    """Whether no bound is passed."""
    return (k1 >= bounds[FIRST]) & (k1 <= bounds[FIRST + 1]) & (k2 <= bounds[FIRST + 2]) & (k3 <= bounds[FIRST + 3])


@triton.jit
def row_stays(of_sequence, old, sampling, bounds):
    """Bool of rows: what all options keep."""
    k1, k2, k3 = statistics(old, sampling)
    return within(k1, k2, k3, bounds, OF_TOKEN) & (tl.zeros_like(old) + of_sequence != 0.0)


@triton.jit
def sequence_stays(mask_ptr, old_ptr, sampling_ptr, begin, end, length, bounds, BLOCK: tl.constexpr):
    """(): 1 where the options of sequences keep it, else 0."""
    DTYPE: tl.constexpr = old_ptr.dtype.element_ty
    zeros = tl.zeros((BLOCK,), tl.float64)
    sum1, sum2, sum3 = zeros, zeros, zeros
    largest2, largest3 = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = (row < end) & (tl.load(mask_ptr + row, mask=row < end, other=0) != 0)
        old = tl.load(old_ptr + row, mask=active, other=0.0)
        k1, k2, k3 = statistics(old, tl.load(sampling_ptr + row, mask=active, other=0.0))
        sum1, sum2, sum3 = sum1 + k1.to(tl.float64), sum2 + k2.to(tl.float64), sum3 + k3.to(tl.float64)
        largest2, largest3 = tl.maximum(largest2, k2), tl.maximum(largest3, k3)
    k1, k2, k3 = tl.sum(sum1, axis=0).to(DTYPE), tl.sum(sum2, axis=0).to(DTYPE), tl.sum(sum3, axis=0).to(DTYPE)
    stays = within(k1, k2, k3, bounds, OF_SUM) & within(k1 / length, k2 / length, k3 / length, bounds, OF_MEAN)
    stays &= (tl.max(largest2, axis=0) <= bounds[OF_MAX]) & (tl.max(largest3, axis=0) <= bounds[OF_MAX + 1])
    return tl.where(stays, 1.0, 0.0)
