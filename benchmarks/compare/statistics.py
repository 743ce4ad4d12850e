"""Paired tests: McNemar, Newcombe, bootstrap over clusters, Holm; the t interval of a mean."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm, t

from benchmarks.results.outcomes import statistic

RESAMPLES = 10_000
_SEED = 0
#: Number of counts per batch of resamples, which limits the memory.
_COUNTS = 2**22


@dataclass(frozen=True)
class Interval:
    """A difference with its confidence interval, two-sided p-value and standard error."""

    difference: float
    low: float
    high: float
    p: float
    se: float


@dataclass(frozen=True)
class PairedCounts:
    """Numbers of samples that both methods, only one of the two, or neither got right."""

    both: int
    first: int
    second: int
    neither: int

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> "PairedCounts":
        """Count the samples from two arrays (n,), bool: right or wrong."""
        return cls(*(int(each.sum()) for each in (x & y, x & ~y, ~x & y, ~x & ~y)))

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.both + self.first + self.second + self.neither

    @property
    def difference(self) -> float:
        """Share that the first got right, minus the share of the second."""
        return (self.first - self.second) / self.n

    @property
    def cohens_g(self) -> float:
        """Cohen's g (1988, chapter 5): share of ``first`` in ``first + second``, minus 0.5."""
        discordant = self.first + self.second
        return self.first / discordant - 0.5 if discordant else 0.0

    @property
    def se(self) -> float:
        """Standard error of the difference."""
        gap = self.first - self.second
        return math.sqrt(self.first + self.second - gap**2 / self.n) / self.n


def mcnemar(counts: PairedCounts, level: float) -> Interval:
    """Return McNemar's exact two-sided binomial test with Newcombe's interval, in points."""
    discordant = counts.first + counts.second
    p = float(binomtest(counts.first, discordant).pvalue) if discordant else 1.0
    low, high = newcombe(counts, level)
    return Interval(100 * counts.difference, 100 * low, 100 * high, p, 100 * counts.se)


def newcombe(counts: PairedCounts, level: float) -> tuple[float, float]:
    """Return the interval of the difference by Newcombe's method 10.

    The method (Statistics in Medicine 17, 1998, 2635-2650) adds the squared distances of both
    shares to the ends of their Wilson intervals. Their correlation φ is corrected for continuity.
    """
    n, right = counts.n, (counts.both + counts.first, counts.both + counts.second)
    product = right[0] * (n - right[0]) * right[1] * (n - right[1])
    excess = counts.both * counts.neither - counts.first * counts.second
    corrected = max(excess - n / 2, 0.0) if excess > 0 else excess
    phi = corrected / math.sqrt(product) if product else 0.0
    wilson = [binomtest(count, n).proportion_ci(level, method="wilson") for count in right]
    shares = zip((count / n for count in right), wilson, strict=True)
    (down_1, up_1), (down_2, up_2) = ((at - ends.low, ends.high - at) for at, ends in shares)
    low = math.sqrt(max(down_1**2 - 2 * phi * down_1 * up_2 + up_2**2, 0.0))
    high = math.sqrt(max(up_1**2 - 2 * phi * up_1 * down_2 + down_2**2, 0.0))
    return float(counts.difference - low), float(counts.difference + high)


def bootstrap(clusters: np.ndarray, level: float, resamples: int = RESAMPLES) -> Interval:
    """Return the bias-corrected and accelerated interval (BCa; Efron, JASA 82, 1987).

    Whole clusters are drawn, such as an image with its captions. p is the largest ``1 - level``
    whose interval still contains 0; the number of resamples limits its resolution. For average
    precision only the contributions of the images are resampled: the interpolated curve and the
    categories with objects stay fixed.

    Args:
        clusters: (G, parts, 2), see :func:`benchmarks.results.outcomes.cluster_sums`.
        level: confidence level of the interval.
        resamples: number of draws. The seed is fixed, so equal calls return equal intervals.
    """
    groups, parts = clusters.shape[:2]
    rows, counts = np.unique(clusters.reshape(groups, -1), axis=0, return_counts=True)
    whole = counts @ rows
    estimate = float(statistic(whole.reshape(parts, 2)))
    drawn = np.concatenate([
        statistic((draw @ rows).reshape(-1, parts, 2)) for draw in _draws(counts, resamples)
    ])  # fmt: skip
    # Another order of summation changes the last digits, which must not count as bias.
    tiny = 1e-9 * max(1.0, abs(estimate))

    def share_below(value: float) -> float:
        below = (drawn < value - tiny).sum() + 0.5 * (np.abs(drawn - value) <= tiny).sum()
        return float(np.clip(below / resamples, 1 / (resamples + 1), resamples / (resamples + 1)))

    bias = float(norm.ppf(share_below(estimate)))
    skew = _acceleration(rows, counts, whole, parts)

    def corrected(quantile: float) -> float:
        moved = bias + float(norm.ppf(quantile))
        return float(norm.cdf(bias + moved / (1 - skew * moved)))

    ends = (0.5 - level / 2, 0.5 + level / 2)
    low, high = (float(np.quantile(drawn, corrected(end))) for end in ends)
    at_zero = float(norm.ppf(share_below(0.0))) - bias
    nominal = float(norm.cdf(at_zero / (1 + skew * at_zero) - bias))
    p = max(2 * min(nominal, 1 - nominal), 2 / (resamples + 1))
    return Interval(estimate, low, high, min(p, 1.0), float(drawn.std(ddof=1)))


def _draws(counts: np.ndarray, resamples: int) -> Iterator[np.ndarray]:
    """Yield the number of times that each distinct row is drawn, (b, rows), batch by batch.

    Equal clusters are interchangeable, so only their number is drawn: the 50,000 images of a paired
    comparison have three distinct rows (a difference of -1, 0 or 1).
    """
    generator, kinds, groups = np.random.default_rng(_SEED), len(counts), int(counts.sum())
    few = 8 * kinds < groups
    size = max(1, _COUNTS // (kinds if few else groups))
    owner = np.repeat(np.arange(kinds), counts)
    for start in range(0, resamples, size):
        b = min(size, resamples - start)
        if few:
            yield generator.multinomial(groups, counts / groups, size=b)
        else:
            drawn = owner[generator.integers(0, groups, (b, groups))]
            places = (drawn + kinds * np.arange(b)[:, None]).ravel()
            yield np.bincount(places, minlength=b * kinds).reshape(b, kinds)


def _acceleration(rows: np.ndarray, counts: np.ndarray, whole: np.ndarray, parts: int) -> float:
    """Return the statistic's skewness over √G by the jackknife; 0 for a constant statistic."""
    left = statistic((whole - rows).reshape(-1, parts, 2))
    gaps = (counts @ left) / counts.sum() - left
    spread = float(counts @ gaps**2)
    if not (spread > 0 and math.isfinite(spread)):
        return 0.0
    return float(counts @ gaps**3) / (6 * spread**1.5)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for the number of tests (Holm, Scandinavian J. of Statistics 6, 1979)."""
    p = np.array(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, np.arange(len(p), 0, -1) * p[order])
    p[order] = np.maximum.accumulate(steps)
    return p.tolist()


def half_width(sampling: float, sd: float, seeds: int, alpha: float) -> float:
    """Return half the width of the ``1 - 2 alpha`` interval of a mean over seeds.

    It is the root of the sum of the squares of two half-widths: the normal quantile times the known
    error from samples, and Student's quantile with ``seeds - 1`` degrees of freedom times the
    estimated error over seeds (Zou and Donner, Statistics in Medicine 27, 2008). Each alone is
    exact, and both together err on the wide side. More noise of either kind gives a wider interval,
    which is not so with Satterthwaite's degrees of freedom.

    Args:
        sampling: standard error from the finite number of samples, which all seeds share.
        sd: standard deviation over seeds; not used for one seed, whose spread is unknown.
        seeds: number of seeds.
        alpha: error of each of the two one-sided tests.
    """
    samples, spread = float(norm.ppf(1 - alpha)) * sampling, 0.0
    if seeds > 1:
        spread = float(t.ppf(1 - alpha, seeds - 1)) * sd / math.sqrt(seeds)
    return math.hypot(samples, spread)
