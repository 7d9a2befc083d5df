"""pass@k without bias, and bootstrap intervals over problems."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over problems with its 95 % bootstrap interval; ``low`` and ``high`` are None for a single problem."""

    value: float
    low: float | None
    high: float | None


def pass_at_k(correct_P: Sequence[int], n: int) -> np.ndarray:
    """Chance that at least one of k samples is right, for every k <= n.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{j < k} (n - c - j) / (n - j)

    which is unbiased for c right answers among n samples, unlike 1 - (1 - c/n)^k. The product of factors in [0, 1]
    never overflows, where the binomials do.

    Args:
        correct_P: [P] right answers per problem, 0 to n.

    Returns:
        [P, n] fp64; column k - 1 is pass@k, column 0 is c / n.

    Raises:
        ValueError: a count outside 0..n.
    """
    correct = np.asarray(correct_P, dtype=np.int64)
    if n < 1 or (correct < 0).any() or (correct > n).any():
        raise ValueError(f"counts of right answers must lie between 0 and n = {n}")
    j = np.arange(n)
    return 1.0 - np.cumprod(np.maximum(n - correct[:, None] - j, 0) / (n - j), axis=1)


def bootstrap(values_P_K: np.ndarray, seed: int, resamples: int = 10_000) -> tuple[list[Estimate], np.ndarray]:
    """Means over problems and their percentile intervals: problems are drawn again with replacement.

    Args:
        values_P_K: [P, K] one row per problem.

    Returns:
        K estimates, and the means of column 0 in each resample (``resamples``,) to combine benchmarks with.
    """
    problems, columns = values_P_K.shape
    means, rng = values_P_K.mean(0), np.random.default_rng(seed)
    drawn = np.empty((resamples, columns))
    block = max(1, 10_000_000 // max(problems, columns))  # rows at once: memory stays below 100 MB
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        weights = rng.multinomial(problems, np.full(problems, 1 / problems), size=size) / problems
        drawn[start : start + size] = weights @ values_P_K
    if problems == 1:
        return [Estimate(float(m), None, None) for m in means], drawn[:, 0]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return [Estimate(*map(float, row)) for row in zip(means, low, high, strict=True)], drawn[:, 0]


def average(first_columns: Sequence[np.ndarray], values: Sequence[float]) -> Estimate:
    """Plain mean over benchmarks; their problems are independent, so resample i of each goes with resample i."""
    low, high = np.percentile(np.mean(first_columns, axis=0), [2.5, 97.5])
    return Estimate(float(np.mean(values)), float(low), float(high))
