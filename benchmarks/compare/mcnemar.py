"""McNemar's exact test of two methods that are right or wrong on the same samples (Psychometrika 12, 1947)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """How many samples both, only the first, only the second, and neither got right."""

    both: int
    first: int
    second: int
    neither: int

    @property
    def n(self) -> int:
        """All samples."""
        return self.both + self.first + self.second + self.neither

    @property
    def difference(self) -> float:
        """Share of the first minus that of the second."""
        return (self.first - self.second) / self.n

    @property
    def cohens_g(self) -> float:
        """How far the share of the first among discordant samples is from a half (Cohen, 1988, chapter 5); -0.5 to 0.5."""
        discordant = self.first + self.second
        return self.first / discordant - 0.5 if discordant else 0.0

    @property
    def se(self) -> float:
        """Standard error of the difference."""
        return math.sqrt(self.first + self.second - (self.first - self.second) ** 2 / self.n) / self.n


def p_value(table: Table) -> float:
    """Return the two-sided p-value: binomial, of the discordant samples with probability ½; 1 where there are none."""
    from scipy.stats import binomtest

    discordant = table.first + table.second
    return float(binomtest(table.first, discordant).pvalue) if discordant else 1.0


def newcombe(table: Table, level: float) -> tuple[float, float]:
    """Return the interval of the difference by Newcombe's method 10 (Statistics in Medicine 17, 1998, 2635-2650).

    It squares and adds the distances of both shares to the ends of their Wilson intervals, with their correlation φ, which is
    corrected for continuity.
    """
    from scipy.stats import binomtest

    n, right = table.n, (table.both + table.first, table.both + table.second)
    product = right[0] * (n - right[0]) * right[1] * (n - right[1])
    excess = table.both * table.neither - table.first * table.second
    corrected = max(excess - n / 2, 0.0) if excess > 0 else excess
    phi = corrected / math.sqrt(product) if product else 0.0
    wilson = [binomtest(count, n).proportion_ci(level, method="wilson") for count in right]
    (down_1, up_1), (down_2, up_2) = (
        (count / n - ends.low, ends.high - count / n) for count, ends in zip(right, wilson, strict=True)
    )
    low = math.sqrt(max(down_1**2 - 2 * phi * down_1 * up_2 + up_2**2, 0.0))
    high = math.sqrt(max(up_1**2 - 2 * phi * up_1 * down_2 + down_2**2, 0.0))
    return float(table.difference - low), float(table.difference + high)
