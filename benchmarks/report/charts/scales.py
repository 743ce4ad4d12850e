"""Scales: from values to pixels, and where an axis has its ticks."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

#: Pixels between two ticks of a stretched scale.
_TICK_GAP = 24.0


@dataclass(frozen=True)
class Scale:
    """A map of [low, high] to [start, end] pixels.

    Attributes:
        kind: ``linear``; ``log``; or ``stretched``: by the square root of what is missing to ``high``, which gives most room to
            the scores just below it, where methods are that differ little.
    """

    low: float
    high: float
    start: float
    end: float
    kind: Literal["linear", "log", "stretched"] = "linear"

    def __call__(self, value: float) -> float:
        """The pixel of a value; values beyond the ends are drawn at the end."""
        a, b, v = (self._bent(one) for one in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (self.end - self.start) * ((v - a) / (b - a) if b > a else 0.5)

    def _bent(self, value: float) -> float:
        if self.kind == "log":
            return math.log10(value)
        return -math.sqrt(max(0.0, self.high - value)) if self.kind == "stretched" else value

    def ticks(self, count: int = 5) -> list[float]:
        """Round values between the ends, far enough from each other to be read."""
        if self.kind == "log":
            return log_ticks(self.low, self.high)
        if self.kind == "linear":
            return linear_ticks(self.low, self.high, count)
        found: list[float] = []
        # From the coarsest on: rounder values win where there is no room for all.
        for finer in (2, 4, 8, 16, 32):
            for value in linear_ticks(self.low, self.high, finer):
                if all(abs(self(value) - self(other)) >= _TICK_GAP for other in found):
                    found.append(value)
        return sorted(found)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Some ``count`` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high]; with 2 and 5 times them where there are few, every second, third … where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = last - first
    factors = (1, 2, 5) if decades <= 2 else (1, 3) if decades == 3 else (1,)
    step = max(1, math.ceil(decades / 6))
    found = [factor * 10.0**power for power in range(first, last + 1, step) for factor in factors]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def linear(values: Iterable[float], start: float, end: float, margin: float = 0.04) -> Scale:
    """A scale that has all values between its ends, with some air; for no values from 0 to 1."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    air = (high - low) * margin or max(abs(low) * 0.05, 0.5)
    return Scale(low - air, high + air, start, end)


def stretched(values: Iterable[float], ceiling: float, start: float, end: float) -> Scale:
    """A scale with most room below ``ceiling``, or the highest value where that is higher."""
    found = [*values, ceiling]
    low, high = min(found), max(found)
    air = (high - low) * 0.02 or max(abs(high) * 0.05, 0.5)
    return Scale(low - air, high + air / 4, start, end, "stretched")


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """The same on a logarithmic scale, for positive values."""
    low, high = min(values), max(values)
    air = (high / low) ** 0.04 if high > low else 1.5
    return Scale(low / air, high * air, start, end, "log")


def tick_text(value: float) -> str:
    """A tick as people write it: ``0.001``, ``50``, ``2e-05``."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart: the nearest places at least ``gap`` from each other, in the same order, within [low, high].

    Labels that touch form a block whose middle is the mean of where its labels want to be. Where there is no room for all,
    they stand as far apart as there is.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    if len(order) > 1:
        gap = min(gap, (high - low) / (len(order) - 1))
    blocks: list[tuple[list[int], float]] = []  # members, middle

    def bounds(count: int, middle: float) -> float:
        half = gap * (count - 1) / 2
        return min(max(middle, low + half), high - half)

    for index in order:
        members, middle = [index], bounds(1, places[index])
        while blocks:
            before, theirs = blocks[-1]
            if middle - gap * (len(members) - 1) / 2 - (theirs + gap * (len(before) - 1) / 2) >= gap - 1e-9:
                break
            blocks.pop()
            members = before + members
            middle = bounds(len(members), sum(places[i] for i in members) / len(members))
        blocks.append((members, middle))
    found = [0.0] * len(places)
    for members, middle in blocks:
        for position, index in enumerate(members):
            found[index] = middle + gap * (position - (len(members) - 1) / 2)
    return found
