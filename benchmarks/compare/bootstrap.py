"""Bootstrap of a difference of means over clusters (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

The unit that is drawn is a cluster, such as an image with its captions. A difference is a mean over parts (the directions of
retrieval) of Σ score / Σ queries, each sum over the clusters that were drawn.

Average precision is no such mean. What is drawn for it are the contributions of images, the jackknife's pseudo-values
(:mod:`tasks.detection.precision`): the linear part of how the value depends on which images there are. Accumulating anew over the
images drawn would also move the interpolated curve and the categories that have objects; of these effects the linear part holds
the first order only. How much that leaves out on a given data set is not measured here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_SEED = 0
#: Counts at a time.
_COUNTS = 2**22


@dataclass(frozen=True)
class Interval:
    """A difference with its interval, two-sided p-value and standard error."""

    difference: float
    low: float
    high: float
    p: float
    se: float


def statistic(sums: np.ndarray) -> np.ndarray:
    """Return the mean over parts of score / queries from their sums (..., parts, 2)."""
    return np.asarray((sums[..., 0] / sums[..., 1]).mean(axis=-1))


def bootstrap(clusters: np.ndarray, level: float, resamples: int = RESAMPLES, seed: int = _SEED) -> Interval:
    """Return the bias-corrected and accelerated interval (BCa; Efron, JASA 82, 1987), the same on every call.

    p is found by inverting it: the largest 1 - level at which the interval still holds 0, so that test and interval agree. It
    counts no finer than the resamples do.

    Args:
        clusters: (G, parts, 2) of each cluster and part the sum of differences and the number of queries.
        level: of confidence.
        resamples: how many.
        seed: of the draws.
    """
    from scipy.stats import norm

    groups = len(clusters)
    rows, counts = np.unique(clusters.reshape(groups, -1), axis=0, return_counts=True)
    parts = clusters.shape[1]
    whole = counts @ rows
    estimate = float(statistic(whole.reshape(parts, 2)))
    drawn = np.concatenate([statistic((draw @ rows).reshape(-1, parts, 2)) for draw in _draws(counts, resamples, seed)])
    se = float(drawn.std(ddof=1))
    # Sums in another order differ in their last digits, which must not count as bias.
    tiny = 1e-9 * max(1.0, abs(estimate))

    def share_below(value: float) -> float:
        share = ((drawn < value - tiny).sum() + 0.5 * (np.abs(drawn - value) <= tiny).sum()) / resamples
        return float(np.clip(share, 1 / (resamples + 1), resamples / (resamples + 1)))

    bias, skew = float(norm.ppf(share_below(estimate))), _acceleration(rows, counts, whole, parts)

    def corrected(quantile: float) -> float:
        moved = bias + float(norm.ppf(quantile))
        return float(norm.cdf(bias + moved / (1 - skew * moved)))

    low, high = (float(np.quantile(drawn, corrected(quantile))) for quantile in (0.5 - level / 2, 0.5 + level / 2))
    at_zero = float(norm.ppf(share_below(0.0))) - bias
    nominal = float(norm.cdf(at_zero / (1 + skew * at_zero) - bias))
    p = max(2 * min(nominal, 1 - nominal), 2 / (resamples + 1))
    return Interval(estimate, low, high, min(p, 1.0), se)


def _draws(counts: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each distinct row is drawn, (b, rows), in parts that fit into memory.

    Clusters of the same content are interchangeable, so only their number is drawn: of 50,000 images that are right or wrong
    there are three kinds.
    """
    generator, kinds, groups = np.random.default_rng(seed), len(counts), int(counts.sum())
    few = 8 * kinds < groups
    size = max(1, _COUNTS // (kinds if few else groups))
    owner = np.repeat(np.arange(kinds), counts)
    for start in range(0, resamples, size):
        b = min(size, resamples - start)
        if few:
            yield generator.multinomial(groups, counts / groups, size=b)
        else:
            drawn = owner[generator.integers(0, groups, (b, groups))] + kinds * np.arange(b)[:, None]
            yield np.bincount(drawn.ravel(), minlength=b * kinds).reshape(b, kinds)


def _acceleration(rows: np.ndarray, counts: np.ndarray, whole: np.ndarray, parts: int) -> float:
    """The statistic's skewness over √G, by the jackknife; 0 where leaving a cluster out changes nothing."""
    left = statistic((whole - rows).reshape(-1, parts, 2))
    gaps = (counts @ left) / counts.sum() - left
    spread = float(counts @ gaps**2)
    return float(counts @ gaps**3) / (6 * spread**1.5) if spread > 0 and math.isfinite(spread) else 0.0
