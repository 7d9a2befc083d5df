"""Rejection of tokens and sequences that the sampler and the old policy disagree about, by verl's options.

With u = o - s of a token, held inside ±20, the statistics are

    k1 = -u        k2 = u²/2        k3 = exp(u) - 1 - u

of the token itself, or their sum, mean or largest over a sequence's tokens. A token or sequence stays where k1 lies
between the logarithms of two ratios, k2 and k3 at an upper bound or below; with several options, where all agree.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.losses import ROLLOUT_RS

Config = Any  # GRPOLossConfig, whose checks read this file
Batch = Any  # TokenBatch

LOG_RATIO_LIMIT = 20.0


class Criterion(NamedTuple):
    """One option with its threshold."""

    statistic: str
    """"k1", "k2" or "k3"."""
    over: str
    """"token", or how a sequence's tokens are put together: "sum", "mean" or "max"."""
    low: float
    high: float


@functools.cache
def criteria(options: str, threshold: str | float | None) -> tuple[Criterion, ...]:
    """`rollout_rs` and `rollout_rs_threshold`, read.

    Args:
        options: some of `ROLLOUT_RS`, with commas between them.
        threshold: one for all, or one each, with commas: for k1 two ratios "lower_upper", or the upper one, with its
            inverse below; else an upper bound.

    Raises:
        ValueError: an option that is none, or a threshold that does not fit it.
    """
    names = list(dict.fromkeys(name.strip() for name in options.split(",")))
    for name in names:
        if name == "seq_max_k1":
            raise ValueError("rollout_rs='seq_max_k1': the largest k1 is blind to one side; write seq_max_k2")
        if name not in ROLLOUT_RS:
            raise ValueError(f"rollout_rs={name!r} is unknown; choose some of {', '.join(ROLLOUT_RS)}")
    if threshold is None:
        raise ValueError(f"rollout_rs={options!r} needs rollout_rs_threshold, got None; set one, for example 2.0")
    bounds = [bound.strip() for bound in str(threshold).split(",")]
    if len(bounds) not in (1, len(names)):
        raise ValueError(
            f"rollout_rs_threshold={threshold!r} has {len(bounds)} thresholds and rollout_rs={options!r} "
            f"{len(names)} options; write one for all, or one each"
        )
    return tuple(map(_criterion, names, bounds * (len(names) if len(bounds) == 1 else 1)))


criteria._dynamo_marked_constant = True  # as `_resolve` in impls.py


def _criterion(name: str, bound: str) -> Criterion:
    level, *over, statistic = name.split("_")
    ratios = statistic == "k1"
    try:
        numbers = [float(part) for part in bound.split("_")]
    except ValueError:
        numbers = []
    if ratios and len(numbers) == 1 and numbers[0] > 0:
        numbers = [1.0 / numbers[0], numbers[0]]
    fits = (
        len(numbers) == (2 if ratios else 1) and all(0 < x < math.inf for x in numbers) and sorted(numbers) == numbers
    )
    if not fits:
        wanted = "two ratios, 0.5_2.0, or the upper one, above 1" if ratios else "one number above 0"
        raise ValueError(f"rollout_rs_threshold={bound!r} does not fit rollout_rs={name!r}; write {wanted}")
    low, high = map(math.log, numbers) if ratios else (-math.inf, numbers[0])
    return Criterion(statistic, over[0] if over else level, low, high)


def accepts(old: Tensor, batch: Batch, config: Config) -> Tensor | None:
    """Bool (n,): rows that every criterion keeps; None where nothing is rejected. Unscored tokens (NaN) have u = 0."""
    if config.rollout_rs is None or batch.sampling_per_token_logps is None:
        return None
    u = torch.nan_to_num(old - batch.sampling_per_token_logps, nan=0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    kept = torch.ones_like(batch.mask)
    for statistic, over, low, high in criteria(config.rollout_rs, config.rollout_rs_threshold):
        k = -u if statistic == "k1" else 0.5 * u * u if statistic == "k2" else u.exp() - 1.0 - u
        if over == "max":
            k = batch.expand(_largest(batch.masked(k), batch))
        elif over != "token":
            of_sequence = batch.segment_sum(k)
            k = batch.expand(of_sequence / batch.lengths.clamp(min=1.0) if over == "mean" else of_sequence)
        kept = kept & (k >= low) & (k <= high)
    return kept


def _largest(x: Tensor, batch: Batch) -> Tensor:
    """(S,) largest of each sequence's rows of x (n,) >= 0; 0 for an empty one."""
    if batch.cu_seqlens is None:
        padded = x.reshape(batch.num_sequences, -1) if x.numel() else x.new_zeros(batch.num_sequences, 1)
        return padded.amax(-1)
    return torch.segment_reduce(x.contiguous(), "max", offsets=batch.cu_seqlens, initial=0, unsafe=True)
