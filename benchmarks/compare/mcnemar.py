"""McNemar's exact test of two methods that are right or wrong on the same samples (Psychometrika 12, 1947)."""

import math
from dataclasses import dataclass

#: Power at which the difference is stated that a test could have shown.
POWER = 0.8


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
    def odds(self) -> float | None:
        """Odds ratio: discordant samples that the first got right to those that the second did; None without these."""
        return self.first / self.second if self.second else None

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


def odds_interval(table: Table, level: float) -> tuple[float, float | None]:
    """Return the interval of the odds ratio, from Clopper and Pearson's of the share of the first; None: unbounded."""
    from scipy.stats import binomtest

    discordant = table.first + table.second
    if not discordant:
        return 0.0, None
    share = binomtest(table.first, discordant).proportion_ci(level, method="exact")
    return float(share.low / (1 - share.low)), float(share.high / (1 - share.high)) if share.high < 1 else None


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


def detectable(n: int, discordant: float, level: float) -> float | None:
    """Return the smallest difference that the test shows with a power of :data:`POWER`; None if not even the largest.

    Connor's formula (Biometrics 43, 1987): with ψ the share of discordant samples, the difference δ solves
    δ√n = z(α/2) √ψ + z(power) √(ψ - δ²). Where δ exceeds ψ, ψ is taken as δ (an
    addition to the formula): all discordant samples are of one method then.

    Args:
        n: samples.
        discordant: ψ, as observed.
        level: of confidence, 1 - α.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z_test, z_power = norm.ppf(0.5 + level / 2), norm.ppf(POWER)

    def lacking(difference: float) -> float:
        share = max(discordant, difference)
        return float(z_test * math.sqrt(share) + z_power * math.sqrt(share - difference**2) - difference * math.sqrt(n))

    return None if lacking(1.0) > 0 else float(brentq(lacking, 1e-9, 1.0))
