"""Paired comparison of two methods on the same samples: their difference is surer than either's accuracy.

With seeds averaged first, a sample counts once however many seeds there are; for one seed this is McNemar's setting
(Psychometrika 12, 1947): only samples on which the two disagree add to the variance.
"""

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.tables import Measured


@dataclass(frozen=True)
class Outcomes:
    """Of each sample its id and whether it was right: ``sample`` (n,) distinct ids, ``correct`` (n,) bool."""

    sample: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True)
class Paired:
    """A difference of accuracies in points, its standard error over samples, and how many of these and seeds it rests on."""

    difference: float
    se: float
    samples: int
    seeds: int


def read_outcomes(item: Measured) -> Outcomes | None:
    """Return a record's per-sample outcomes; None if there are none that can be read."""
    if item.folder is None:
        return None
    try:
        with np.load(item.folder / item.record.outcomes, allow_pickle=False) as content:
            return Outcomes(content["sample"], content["correct"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def paired(first: Mapping[int, Outcomes], second: Mapping[int, Outcomes]) -> Paired | None:
    """Compare two methods, given their outcomes by seed.

    With dᵢ the mean over common seeds of correct₁ - correct₂ on sample i, the difference is the mean of d, its standard
    error sd(d)/√n.

    Returns:
        first minus second; None without a common seed, or where they were not measured on the same samples (at least two).
    """
    seeds = sorted(set(first) & set(second))
    everything = [outcomes for seed in seeds for outcomes in (first[seed], second[seed])]
    if not everything or len(everything[0].sample) < 2:
        return None
    orders = [np.argsort(outcomes.sample) for outcomes in everything]
    ids = everything[0].sample[orders[0]]
    if any(not np.array_equal(outcomes.sample[order], ids) for outcomes, order in zip(everything, orders, strict=True)):
        return None
    right = [outcomes.correct[order].astype(float) for outcomes, order in zip(everything, orders, strict=True)]
    gaps = 100 * np.mean([a - b for a, b in zip(right[::2], right[1::2], strict=True)], axis=0)
    return Paired(float(gaps.mean()), float(gaps.std(ddof=1)) / math.sqrt(len(gaps)), len(gaps), len(seeds))


def compare(first: Sequence[Measured], second: Sequence[Measured]) -> Paired | None:
    """Compare two sets of finished cells, each of one model, method and bits, by :func:`paired`; None where it cannot."""
    return paired(_by_seed(first), _by_seed(second))


def _by_seed(items: Sequence[Measured]) -> dict[int, Outcomes]:
    found = {item.cell.seed: read_outcomes(item) for item in items}
    return {seed: outcomes for seed, outcomes in found.items() if seed is not None and outcomes is not None}


def mean_difference(parts: Sequence[Paired]) -> tuple[float, float]:
    """Return the mean of differences on independent samples (one part a model) and its standard error."""
    return sum(part.difference for part in parts) / len(parts), math.hypot(*(part.se for part in parts)) / len(parts)
