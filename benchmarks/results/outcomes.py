"""Outcomes of single samples: files beside records, and differences between two methods."""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from benchmarks.grid.cell import MAIN_METRIC
from benchmarks.results.scores import Items, Measured
from fimaq_core.errors import FimaqError
from tasks.common.fidelity import UNITS
from tasks.common.outcome_files import OutcomesError, outcome_arrays
from tasks.common.record import ResultRecord
from tasks.retrieval.metrics import CUTS, MEAN_CUTS

logger = logging.getLogger(__name__)
#: Columns of outcomes that metrics are computed from.
_COLUMNS = ("cluster", "direction", "rank", "correct")
#: Ends of the metrics that are the share of right answers, such as ``knn_top1``.
_SHARES = ("top1", "accuracy")
#: Points by which rounding to 32 bits may move a metric that is the mean of contributions.
_ROUNDING = 0.01
#: Arrays that runs share, such as ids of samples; an array is gone when no outcomes use it.
_arrays: WeakValueDictionary[tuple[str, bytes], np.ndarray] = WeakValueDictionary()


class CompareError(FimaqError):
    """Runs, or outcomes of runs, that cannot be compared."""


class DifferentSamples(CompareError):
    """Two runs were measured on different samples."""


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
    #: Parts of each metric. The metric, as a fraction, is the mean of the mean scores of its parts.
    #: Figures of fidelity that are no percentages are divided by 100.
    metrics: Mapping[str, tuple[MetricPart, ...]]
    folder: Path = Path()

    @property
    def clusters(self) -> int:
        """Number of clusters."""
        return int(self.cluster.max(initial=-1)) + 1

    def value(self, metric: str) -> float:
        """Return a metric in percent."""
        return float(np.mean([100 * part.score.mean() for part in self.metrics[metric]]))


@dataclass(frozen=True)
class Paired:
    """Difference of a metric between two methods and its error over samples, in points."""

    difference: float
    se: float
    left_out: tuple[str, ...] = ()  #: reasons why seeds are left out


def read(record: ResultRecord, folder: Path) -> Outcomes:
    """Read the outcomes beside a record.

    Average precision is not a mean over samples. Its samples therefore have contributions with the
    metric as their mean: jackknife pseudo-values (Efron and Stein, Annals of Statistics 9, 1981).

    Raises:
        OutcomesError: the file is missing or damaged, or contradicts the record.
    """
    content = outcome_arrays(record, folder, (*_COLUMNS, *record.metrics, *record.fidelity))
    order = np.argsort(content["sample"], kind="stable")
    content = {name: array[order] for name, array in content.items()}
    sample = content.pop("sample")
    every = cluster = _shared(np.arange(len(sample)))
    if "cluster" in content:
        cluster = np.unique(content["cluster"], return_inverse=True)[1]
    metrics: dict[str, tuple[MetricPart, ...]] = {}
    if "direction" in content and "rank" in content:
        metrics = _recalls(content["direction"], content["rank"])
    elif "correct" in content:
        main = MAIN_METRIC.get(record.task, "")
        name = next((one for one in record.metrics if one.endswith(_SHARES)), main)
        metrics[name] = (MetricPart(every, content["correct"].astype(bool)),)
        fifth = name.removesuffix("1") + "5"
        if fifth in record.metrics and "rank" in content:
            metrics[fifth] = (MetricPart(every, content["rank"] < 5),)
    # The metric that tables show comes first.
    shares = {name: content[name].astype(np.float64) for name in record.metrics if name in content}
    metrics = {name: (MetricPart(every, values),) for name, values in shares.items()} | metrics
    sides = [every]
    if "direction" in content:
        sides = [_shared(np.flatnonzero(content["direction"] == side)) for side in (0, 1)]
    for name in record.fidelity.keys() & content.keys():
        values = content[name].astype(np.float64) / (100 if name in UNITS else 1)
        metrics[name] = tuple(MetricPart(rows, values[rows]) for rows in sides)
    outcomes = Outcomes(_shared(sample), _shared(cluster), metrics, folder)
    for problem in _contradictions(record, outcomes):
        raise OutcomesError(
            f"The outcomes {folder / record.outcomes} {problem}: they belong to another run. "
            f"Measure "
            f"{record.model} {record.method} again with --force.",
            "outcomes of another record",
        )
    return outcomes


def _contradictions(record: ResultRecord, outcomes: Outcomes) -> Iterator[str]:
    """Yield what in the outcomes contradicts their record."""
    if (outcomes.sample[1:] == outcomes.sample[:-1]).any():
        yield "name a sample twice"
    if outcomes.clusters != record.n:
        yield f"have {outcomes.clusters} samples, but the record has {record.n}"
    if not outcomes.metrics:
        yield "contain nothing that can be compared"
    for name, parts in outcomes.metrics.items():
        for part in parts:
            counts = np.bincount(outcomes.cluster[part.rows], minlength=outcomes.clusters)
            if not counts.all() or not np.isfinite(part.score).all():
                yield f"lack the {name} of some images, or it is not finite"
        stated, found = {**record.metrics, **record.fidelity}.get(name), outcomes.value(name)
        exact = all(part.score.dtype == bool for part in parts)
        if stated is not None and not abs(stated.value - found) <= (1e-6 if exact else _ROUNDING):
            yield f"give {name} {found:.2f}, but the record has {stated.value:.2f}"


def _shared(array: np.ndarray) -> np.ndarray:
    """Return an equal array that is in use already, or else ``array``."""
    key = array.dtype.str, hashlib.sha256(np.ascontiguousarray(array)).digest()
    return _arrays.setdefault(key, array)


def _recalls(direction: np.ndarray, rank: np.ndarray) -> dict[str, tuple[MetricPart, ...]]:
    """Return the recalls of papers: R@k over both directions, the mean recall, each direction."""
    images, captions = (_shared(np.flatnonzero(direction == side)) for side in (0, 1))
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
    """Raise DifferentSamples with the reason unless both runs have the same samples."""
    if one.sample is other.sample and one.cluster is other.cluster:
        return
    sizes = len(one.sample), len(other.sample)
    if sizes[0] != sizes[1]:
        raise DifferentSamples(
            f"Different samples: {one.folder} has {sizes[0]}, {other.folder} has {sizes[1]}. "
            "Measure both with the same images: a run leaves out images that were damaged."
        )
    where = f"Different samples: {one.folder} and {other.folder}"
    if unlike := sorted(set(one.sample.tolist()) ^ set(other.sample.tolist())):
        raise DifferentSamples(
            f"{where} do not share all samples: only one of them has {unlike[0]}."
        )
    same = np.array_equal(one.sample, other.sample)
    if not (same and np.array_equal(one.cluster, other.cluster)):
        raise DifferentSamples(f"{where} have the same samples, but group them differently.")


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


def paired(first: Mapping[int, Outcomes], second: Mapping[int, Outcomes]) -> Paired:
    """Return the difference of the first metric of two methods, given their outcomes by seed.

    One seed and samples that are right or wrong are McNemar's setting (Psychometrika 12, 1947).
    The standard error is cluster-robust (Liang and Zeger, Biometrika 73, 1986): √(G/(G-1) Σs²) over
    G clusters, where s is the sum of wᵢ(dᵢ - D) in a cluster. For independent samples it is
    sd(d)/√n.

    Returns:
        ``first`` minus ``second``.

    Raises:
        CompareError: they have no common seed, different samples, or fewer than two clusters.
    """
    seeds = sorted(set(first) & set(second))
    own, base = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    if not own:
        raise CompareError("no common seed")
    for other in (*own, *base):
        check_alike(own[0], other)
    if own[0].clusters < 2:
        raise CompareError("a single sample")
    sums = cluster_sums(own, base, next(iter(own[0].metrics)))
    groups, parts = sums.shape[:2]
    total = sums.sum(axis=0)
    difference = float(statistic(total))
    residual = (sums[..., 0] - difference * sums[..., 1]) / (parts * total[:, 1])
    squares = float((residual.sum(axis=1) ** 2).sum())
    return Paired(difference, math.sqrt(groups / (groups - 1) * squares))


def compare(first: Items, second: Items) -> Paired:
    """Compare finished cells of two methods by :func:`paired`, on the seeds that can be read.

    One warning names each file that cannot be read. Raises CompareError with the reason in a few
    words if nothing can be compared.
    """
    mine, theirs = ({item.record.seed: item for item in items} for items in (first, second))
    found: dict[int, tuple[Outcomes, Outcomes]] = {}
    reasons: dict[str, None] = {}
    for seed in sorted((mine.keys() & theirs.keys()) - {None}):
        try:
            found[seed] = read_outcomes(mine[seed]), read_outcomes(theirs[seed])
        except OutcomesError as error:
            _warn(str(error))
            reasons[error.reason] = None
    if reasons and not found:
        raise CompareError(", ".join(reasons))
    try:
        pair = paired(*({seed: both[side] for seed, both in found.items()} for side in (0, 1)))
    except DifferentSamples as error:
        raise CompareError("different samples") from error
    return replace(pair, left_out=tuple(reasons))


@lru_cache(maxsize=512)  # small, since equal arrays are shared
def read_outcomes(item: Measured) -> Outcomes:
    """Return the outcomes of a cell in the main metric of its task. Raises OutcomesError."""
    if item.folder is None:
        raise OutcomesError(f"{item.cell.label} has no folder.", "outcomes missing")
    outcomes = read(item.record, item.folder)
    main = MAIN_METRIC.get(item.record.task)
    shown = {
        name: parts
        for name, parts in outcomes.metrics.items()
        if name == main or name.endswith(_SHARES)
    }
    if not shown:
        raise OutcomesError(f"{item.folder} has other metrics.", "outcomes of other metrics")
    return replace(outcomes, metrics=shown)


@cache
def _warn(problem: str) -> None:
    logger.warning("%s This cell is left out of comparisons sample by sample.", problem)


def mean_difference(parts: Sequence[Paired]) -> tuple[float, float]:
    """Return the mean of independent differences, such as those of models, and its error."""
    mean = sum(part.difference for part in parts) / len(parts)
    return mean, math.hypot(*(part.se for part in parts)) / len(parts)
