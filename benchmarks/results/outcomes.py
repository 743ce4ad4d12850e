"""Outcomes of single samples: files beside records, and differences between two methods."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.grid.cell import MAIN_METRIC
from benchmarks.results.scores import Items, Measured
from fimaq_core.errors import FimaqError
from tasks.common.record import ResultRecord, outcome_arrays
from tasks.retrieval.metrics import CUTS, MEAN_CUTS

logger = logging.getLogger(__name__)


class CompareError(FimaqError):
    """Runs, or outcomes of runs, that cannot be compared."""


@dataclass(frozen=True)
class MetricPart:
    """Scores whose mean is one part of a metric, such as one direction of retrieval."""

    rows: np.ndarray  #: (m,) indices of the samples
    score: np.ndarray  #: (m,) bool, right or wrong; or float64, the contribution to the metric


@dataclass(frozen=True)
class Outcomes:
    """Scores of the samples of one run, sorted by the ids of the samples."""

    sample: np.ndarray  #: (n,) distinct ids
    cluster: np.ndarray  #: (n,) from 0, equal for dependent samples, such as captions of one image
    #: Parts of each metric. The metric, a fraction, is the mean of the mean scores of its parts.
    metrics: Mapping[str, tuple[MetricPart, ...]]
    folder: Path = Path()

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return int(self.cluster.max(initial=-1)) + 1


@dataclass(frozen=True)
class Paired:
    """Difference of a metric between two methods and its error over samples, in points."""

    difference: float
    se: float


def read(record: ResultRecord, folder: Path) -> Outcomes:
    """Read the outcomes beside a record.

    Average precision is not a mean over samples. Its samples therefore have contributions with the
    metric as their mean: jackknife pseudo-values (Efron and Stein, Annals of Statistics 9, 1981).

    Raises:
        CheckpointError: the file is missing or damaged, belongs to another record, or has another
            form.
    """
    content = outcome_arrays(record, folder)
    order = np.argsort(content["sample"], kind="stable")
    content = {name: array[order] for name, array in content.items()}
    sample = content.pop("sample")
    every = cluster = np.arange(len(sample))
    if "cluster" in content:
        cluster = np.unique(content["cluster"], return_inverse=True)[1]
    metrics: dict[str, tuple[MetricPart, ...]] = {}
    if "direction" in content and "rank" in content:
        metrics = _recalls(content["direction"], content["rank"])
    elif "correct" in content:
        name = "top1" if "top1" in record.metrics else MAIN_METRIC.get(record.task, "")
        metrics[name] = (MetricPart(every, content["correct"].astype(bool)),)
        if "top5" in record.metrics and "rank" in content:
            metrics["top5"] = (MetricPart(every, content["rank"] < 5),)
    else:
        for name in record.metrics:
            if name in content:
                metrics[name] = (MetricPart(every, content[name].astype(np.float64)),)
    return Outcomes(sample, cluster, metrics, folder)


def _recalls(direction: np.ndarray, rank: np.ndarray) -> dict[str, tuple[MetricPart, ...]]:
    """Return the recalls of papers: R@k over both directions, the mean recall, each direction."""
    images, captions = np.flatnonzero(direction == 0), np.flatnonzero(direction == 1)
    each = {
        f"{side}_R@{cut}": (MetricPart(rows, rank[rows] < cut),)
        for side, rows, candidates in (("i2t", images, captions), ("t2i", captions, images))
        for cut in CUTS
        if cut <= len(candidates)
    }
    both = {
        f"R@{cut}": each[f"i2t_R@{cut}"] + each[f"t2i_R@{cut}"]
        for cut in CUTS
        if f"i2t_R@{cut}" in each and f"t2i_R@{cut}" in each
    }
    names = [f"{side}_R@{cut}" for side in ("i2t", "t2i") for cut in MEAN_CUTS]
    if all(name in each for name in names):
        both["mean_recall"] = tuple(each[name][0] for name in names)
    return both | each


def check_alike(one: Outcomes, other: Outcomes) -> None:
    """Raise CompareError with the reason unless both runs have the same samples."""
    sizes = len(one.sample), len(other.sample)
    if sizes[0] != sizes[1]:
        raise CompareError(
            f"Different samples: {one.folder} has {sizes[0]}, {other.folder} has {sizes[1]}. "
            "Measure both with the same images: a run leaves out images that were damaged."
        )
    where = f"Different samples: {one.folder} and {other.folder}"
    if unlike := sorted(set(one.sample.tolist()) ^ set(other.sample.tolist())):
        raise CompareError(f"{where} do not share all samples: only one of them has {unlike[0]}.")
    same = np.array_equal(one.sample, other.sample)
    if not (same and np.array_equal(one.cluster, other.cluster)):
        raise CompareError(f"{where} have the same samples, but group them differently.")


def cluster_sums(first: Sequence[Outcomes], second: Sequence[Outcomes], metric: str) -> np.ndarray:
    """Return the summed differences and the number of queries of each cluster and metric part.

    The difference of a query is its mean over seeds, so each query counts once.

    Args:
        first, second: two methods on the same samples, seed by seed.

    Returns:
        (clusters, parts, 2): sum of the differences in points, number of queries.
    """
    columns = []
    for place, part in enumerate(first[0].metrics[metric]):
        owner = first[0].cluster[part.rows]
        gaps = [
            a.metrics[metric][place].score.astype(np.float64) - b.metrics[metric][place].score
            for a, b in zip(first, second, strict=True)
        ]
        columns.append([np.bincount(owner, 100 * np.mean(gaps, axis=0)), np.bincount(owner)])
    return np.array(columns, dtype=np.float64).transpose(2, 0, 1)


def statistic(sums: np.ndarray) -> np.ndarray:
    """Return the mean over parts of sum / queries, given :func:`cluster_sums` (..., parts, 2)."""
    return np.asarray((sums[..., 0] / sums[..., 1]).mean(axis=-1))


def paired(first: Mapping[int, Outcomes], second: Mapping[int, Outcomes]) -> Paired | None:
    """Return the difference of the first metric of two methods, given their outcomes by seed.

    One seed and samples that are right or wrong are McNemar's setting (Psychometrika 12, 1947).
    The standard error is cluster-robust (Liang and Zeger, Biometrika 73, 1986): √(G/(G-1) Σs²) over
    G clusters, where s is the sum of wᵢ(dᵢ - D) in a cluster. For independent samples it is
    sd(d)/√n.

    Returns:
        ``first`` minus ``second``. None if they have no common seed, different samples, or fewer
        than two clusters.
    """
    seeds = sorted(set(first) & set(second))
    own, base = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    try:
        for other in (*own, *base):
            check_alike(own[0], other)
    except CompareError:
        return None
    if not own or own[0].clusters < 2:
        return None
    sums = cluster_sums(own, base, next(iter(own[0].metrics)))
    groups, parts = sums.shape[:2]
    total = sums.sum(axis=0)
    difference = float(statistic(total))
    residual = (sums[..., 0] - difference * sums[..., 1]) / (parts * total[:, 1])
    squares = float((residual.sum(axis=1) ** 2).sum())
    return Paired(difference, math.sqrt(groups / (groups - 1) * squares))


def compare(first: Items, second: Items) -> Paired | None:
    """Compare finished cells of two methods by :func:`paired`; None if that is impossible."""
    return paired(_by_seed(first), _by_seed(second))


def _by_seed(items: Items) -> dict[int, Outcomes]:
    """Read the outcomes of cells that differ in their seeds. Cells without outcomes are absent."""
    found = ((item.record.seed, read_outcomes(item)) for item in items)
    return {seed: outcomes for seed, outcomes in found if seed is not None and outcomes is not None}


def read_outcomes(item: Measured) -> Outcomes | None:
    """Return the outcomes of a cell in the main metric of its task; None if there are none.

    If the file cannot be read, one warning gives the reason.
    """
    if item.folder is None:
        return None
    try:
        outcomes = read(item.record, item.folder)
    except FimaqError as error:
        _warn(str(error))
        return None
    wanted = (MAIN_METRIC.get(item.record.task), "top1")
    shown = {name: parts for name, parts in outcomes.metrics.items() if name in wanted}
    return replace(outcomes, metrics=shown) if shown else None


@cache
def _warn(problem: str) -> None:
    logger.warning("%s This cell is left out of comparisons sample by sample.", problem)


def mean_difference(parts: Sequence[Paired]) -> tuple[float, float]:
    """Return the mean of independent differences, such as those of models, and its error."""
    mean = sum(part.difference for part in parts) / len(parts)
    return mean, math.hypot(*(part.se for part in parts)) / len(parts)
