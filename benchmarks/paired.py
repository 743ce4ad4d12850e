"""Paired comparison of two methods on the same samples: their difference is surer than either's accuracy.

With seeds averaged first, a sample counts once however many seeds there are; for one seed, of samples that are right or wrong,
this is McNemar's setting (Psychometrika 12, 1947): only those on which the two disagree add to the variance. Metrics that are no
mean over samples, such as average precision, are compared by what each sample contributes to them: the jackknife's pseudo-values
(Efron and Stein, Annals of Statistics 9, 1981), whose mean is the metric.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.cells import MAIN_METRIC
from benchmarks.tables import Measured
from fimaq_core.errors import CheckpointError
from tasks.common.record import outcome_arrays

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcomes:
    """Of each sample its id and its score.

    Attributes:
        sample: (n,) distinct ids.
        score: (n,) bool, whether it was right; or float, what it contributes to the metric: the mean is the metric as a fraction.
        weight: (n,) float, what each sample counts; None: all the same.
        cluster: (n,) integers, the same for samples that depend on each other, such as captions of one image; None: no two do.
    """

    sample: np.ndarray
    score: np.ndarray
    weight: np.ndarray | None = None
    cluster: np.ndarray | None = None

    def by_id(self, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ids in order, and what goes with each: score (n,) float64, weight (n,), cluster (n,).

        Args:
            order: (n,) positions by id, where they are known.
        """
        order, n = np.argsort(self.sample) if order is None else order, len(self.sample)
        weight = np.ones(n) if self.weight is None else self.weight.astype(np.float64)[order]
        cluster = np.arange(n) if self.cluster is None else self.cluster[order]
        return self.sample[order], self.score[order].astype(np.float64), weight, cluster


@dataclass(frozen=True)
class Paired:
    """A difference of metrics in points, its standard error over samples, and how many of these and seeds it rests on."""

    difference: float
    se: float
    samples: int
    seeds: int


def read_outcomes(item: Measured) -> Outcomes | None:
    """Return a record's per-sample outcomes; None if there are none that can be read.

    The scores are ``correct`` where there is that, else what the file has under the name of the task's main metric. A warning
    says why a file cannot be read.
    """
    if item.folder is None:
        return None
    try:
        content = outcome_arrays(item.record, item.folder)
    except CheckpointError as error:
        _warn(str(error))
        return None
    score = "correct" if "correct" in content else MAIN_METRIC.get(item.record.task, "")
    if score not in content:
        return None
    return Outcomes(content["sample"], content[score], content.get("weight"), content.get("cluster"))


@cache
def _warn(problem: str) -> None:
    """Once a text: tables read the same outcomes many times."""
    logger.warning("%s It is left out of comparisons sample by sample.", problem)


def paired(first: Mapping[int, Outcomes], second: Mapping[int, Outcomes]) -> Paired | None:
    """Compare two methods, given their outcomes by seed.

    With dᵢ the mean over common seeds of score₁ - score₂ on sample i, the difference D is the weighted mean of d. Its
    standard error is the cluster-robust one (Liang and Zeger, Biometrika 73, 1986): with s the sum of wᵢ(dᵢ - D)/Σw over a
    cluster, √(G/(G-1) Σs²) over G clusters; sd(d)/√n where all weights are equal and no samples share a cluster.

    Returns:
        first minus second; None without a common seed, or where they were not measured on the same samples (of at least two
        clusters).
    """
    seeds = sorted(set(first) & set(second))
    chosen = [outcomes for seed in seeds for outcomes in (first[seed], second[seed])]
    if not chosen:
        return None
    # Mostly in the same order: to see that takes less than to sort them.
    order, sample = np.argsort(chosen[0].sample), chosen[0].sample
    everything = [outcomes.by_id(order if np.array_equal(outcomes.sample, sample) else None) for outcomes in chosen]
    ids, _, weight, cluster = everything[0]
    for other_ids, _, other_weight, other_cluster in everything[1:]:
        alike = ((ids, other_ids), (weight, other_weight), (cluster, other_cluster))
        if not all(np.array_equal(mine, other) for mine, other in alike):
            return None
    groups, place = np.unique(cluster, return_inverse=True)
    if len(groups) < 2:
        return None
    scores = [score for _, score, _, _ in everything]
    gaps = 100 * np.mean([a - b for a, b in zip(scores[::2], scores[1::2], strict=True)], axis=0)
    share = weight / weight.sum()
    difference = float((share * gaps).sum())
    sums = np.bincount(place, share * (gaps - difference))
    se = math.sqrt(len(groups) / (len(groups) - 1) * float((sums**2).sum()))
    return Paired(difference, se, len(gaps), len(seeds))


def compare(first: Sequence[Measured], second: Sequence[Measured]) -> Paired | None:
    """Compare two sets of finished cells, each of one subject, method and bits, by :func:`paired`; None where it cannot."""
    return paired(by_seed(first), by_seed(second))


def by_seed(items: Sequence[Measured]) -> dict[int, Outcomes]:
    """Read the outcomes of cells that differ in their seeds; what has none is left out."""
    found = {item.cell.seed: read_outcomes(item) for item in items}
    return {seed: outcomes for seed, outcomes in found.items() if seed is not None and outcomes is not None}


def mean_difference(parts: Sequence[Paired]) -> tuple[float, float]:
    """Return the mean of differences on independent samples (one part a model) and its standard error."""
    return sum(part.difference for part in parts) / len(parts), math.hypot(*(part.se for part in parts)) / len(parts)
