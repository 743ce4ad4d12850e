"""Paired tests: McNemar's exact test, Newcombe's interval, the bootstrap over clusters, Holm."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm

from benchmarks.results.outcomes import statistic

RESAMPLES = 10_000
_SEED = 0
#: Number of counts that are drawn at a time.
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
class Table:
    """Numbers of samples that both, only the first, only the second, and neither got right."""

    both: int
    first: int
    second: int
    neither: int

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> "Table":
        """Count the samples (n,) that two methods got right or wrong (bool)."""
        return cls(*(int(each.sum()) for each in (x & y, x & ~y, ~x & y, ~x & ~y)))

    @property
    def n(self) -> int:
        """All samples."""
        return self.both + self.first + self.second + self.neither

    @property
    def difference(self) -> float:
        """Share of the first minus share of the second."""
        return (self.first - self.second) / self.n

    @property
    def cohens_g(self) -> float:
        """Share of the first among discordant samples, less a half (Cohen, 1988, chapter 5)."""
        discordant = self.first + self.second
        return self.first / discordant - 0.5 if discordant else 0.0

    @property
    def se(self) -> float:
        """Standard error of the difference."""
        gap = self.first - self.second
        return math.sqrt(self.first + self.second - gap**2 / self.n) / self.n


def mcnemar(table: Table, level: float) -> Interval:
    """Return McNemar's exact test with Newcombe's interval, in points."""
    low, high = newcombe(table, level)
    return Interval(100 * table.difference, 100 * low, 100 * high, p_value(table), 100 * table.se)


def p_value(table: Table) -> float:
    """Return McNemar's exact two-sided p-value: binomial, of the discordant samples."""
    discordant = table.first + table.second
    return float(binomtest(table.first, discordant).pvalue) if discordant else 1.0


def newcombe(table: Table, level: float) -> tuple[float, float]:
    """Return the interval of the difference by Newcombe's method 10.

    (Statistics in Medicine 17, 1998, 2635-2650.) The method squares and adds the distances of both
    shares to the ends of their Wilson intervals, with their correlation φ corrected for continuity.
    """
    n, right = table.n, (table.both + table.first, table.both + table.second)
    product = right[0] * (n - right[0]) * right[1] * (n - right[1])
    excess = table.both * table.neither - table.first * table.second
    corrected = max(excess - n / 2, 0.0) if excess > 0 else excess
    phi = corrected / math.sqrt(product) if product else 0.0
    wilson = [binomtest(count, n).proportion_ci(level, method="wilson") for count in right]
    shares = zip((count / n for count in right), wilson, strict=True)
    (down_1, up_1), (down_2, up_2) = ((at - ends.low, ends.high - at) for at, ends in shares)
    low = math.sqrt(max(down_1**2 - 2 * phi * down_1 * up_2 + up_2**2, 0.0))
    high = math.sqrt(max(up_1**2 - 2 * phi * up_1 * down_2 + down_2**2, 0.0))
    return float(table.difference - low), float(table.difference + high)


def bootstrap(clusters: np.ndarray, level: float, resamples: int = RESAMPLES) -> Interval:
    """Return the bias-corrected and accelerated interval (BCa; Efron, JASA 82, 1987).

    The unit drawn is a cluster, such as an image with its captions. p inverts the interval: it is
    the largest 1 - level whose interval still holds 0. Its resolution is that of the resamples.
    Average precision is resampled in its linear part, the contributions of images: the interpolated
    curve and the categories with objects stay as they are.

    Args:
        clusters: (G, parts, 2), see :func:`benchmarks.results.outcomes.cluster_sums`.
        level: of confidence.
        resamples: their number. They are seeded, so all calls return the same.
    """
    groups, parts = clusters.shape[:2]
    rows, counts = np.unique(clusters.reshape(groups, -1), axis=0, return_counts=True)
    whole = counts @ rows
    estimate = float(statistic(whole.reshape(parts, 2)))
    drawn = np.concatenate([
        statistic((draw @ rows).reshape(-1, parts, 2)) for draw in _draws(counts, resamples)
    ])  # fmt: skip
    # Sums in another order differ in their last digits, which must not count as bias.
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
    """Yield how often each distinct row is drawn, (b, rows), in parts that fit into memory.

    Equal clusters are interchangeable, so only their number is drawn: 50,000 images that are
    right or wrong have three distinct rows.
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
    """Return p-values that hold for the whole family (Holm, Scand. J. of Statistics 6, 1979)."""
    p = np.array(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, np.arange(len(p), 0, -1) * p[order])
    p[order] = np.maximum.accumulate(steps)
    return p.tolist()
