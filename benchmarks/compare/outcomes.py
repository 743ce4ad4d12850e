"""What each sample scored in a run, read from the outcomes beside its record, metric by metric."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.cells import MAIN_METRIC
from benchmarks.compare.sides import CompareError, Run
from fimaq_core.errors import CheckpointError
from tasks.common.record import outcome_arrays
from tasks.retrieval.bootstrap import CUTS

#: Points by which a metric may be off its outcomes: they are stored as 32-bit numbers at least.
_ROUNDING = 0.01


@dataclass(frozen=True)
class Part:
    """Scores of some queries, whose mean is one part of a metric.

    Attributes:
        rows: (m,) which samples.
        score: (m,) bool, whether it was right, or float64, what it contributes.
    """

    rows: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Outcomes:
    """Of one run, in the order of ids.

    Attributes:
        sample: (n,) distinct ids.
        cluster: (n,) from 0: the same for samples that depend on each other, such as captions of one image.
        metrics: each the mean over its parts (retrieval: both directions) of their mean scores, as a fraction.
    """

    sample: np.ndarray
    cluster: np.ndarray
    metrics: Mapping[str, tuple[Part, ...]]


def value(parts: tuple[Part, ...]) -> float:
    """Return the metric in percent."""
    return float(np.mean([100 * part.score.mean() for part in parts]))


def read(run: Run) -> Outcomes:
    """Read a run's outcomes, without unpickling anything.

    Raises:
        CompareError: there are none, or they are damaged, of another form, or not those of the record.
    """
    try:
        content = outcome_arrays(run.record, run.path.parent)
    except CheckpointError as error:
        raise CompareError(str(error)) from error
    order = np.argsort(content["sample"], kind="stable")
    ordered = {name: array[order] for name, array in content.items()}
    outcomes = Outcomes(ordered["sample"], _clusters(ordered), _metrics(run, ordered))
    _check(run, outcomes)
    return outcomes


def _clusters(content: Mapping[str, np.ndarray]) -> np.ndarray:
    if "cluster" not in content:
        return np.arange(len(content["sample"]))
    return np.asarray(np.unique(content["cluster"], return_inverse=True)[1])


def _metrics(run: Run, content: Mapping[str, np.ndarray]) -> dict[str, tuple[Part, ...]]:
    every = np.arange(len(content["sample"]))
    if "direction" in content and "rank" in content:
        return _recalls(content["direction"], content["rank"])
    if "correct" in content:
        main = MAIN_METRIC.get(run.record.task, "")
        found = {"top1" if "top1" in run.record.metrics else main: content["correct"].astype(bool)}
        if "top5" in run.record.metrics and "rank" in content:
            found["top5"] = content["rank"] < 5
    else:
        found = {name: content[name].astype(np.float64) for name in run.record.metrics if name in content}
    return {name: (Part(every, score),) for name, score in found.items()}


def _recalls(direction: np.ndarray, rank: np.ndarray) -> dict[str, tuple[Part, ...]]:
    """Recalls as the papers print them: of both directions (R@k), of each, and the mean of all six."""
    images, captions = np.flatnonzero(direction == 0), np.flatnonzero(direction == 1)
    sides = {"i2t": (images, len(captions)), "t2i": (captions, len(images))}
    each = {
        f"{side}_R@{cut}": Part(rows, rank[rows] < cut)
        for side, (rows, candidates) in sides.items() for cut in CUTS if cut <= candidates
    }  # fmt: skip
    both: dict[str, tuple[Part, ...]] = {
        f"R@{cut}": (each[f"i2t_R@{cut}"], each[f"t2i_R@{cut}"])
        for cut in CUTS if f"i2t_R@{cut}" in each and f"t2i_R@{cut}" in each
    }  # fmt: skip
    if len(each) == 2 * len(CUTS):
        both["mean_recall"] = tuple(each.values())
    return both | {name: (part,) for name, part in each.items()}


def _check(run: Run, outcomes: Outcomes) -> None:
    n, clusters = len(outcomes.sample), int(outcomes.cluster.max(initial=-1)) + 1
    again = f"Measure {run.label} again with --force."
    where = f"The outcomes beside {run.path}"
    if not outcomes.metrics:
        raise CompareError(f"{where} hold nothing that can be compared. {again}")
    if n > 1 and (outcomes.sample[1:] == outcomes.sample[:-1]).any():
        raise CompareError(f"{where} name a sample twice. {again}")
    if clusters != run.record.n:
        raise CompareError(f"{where} are of {clusters} samples, the record is of {run.record.n}: they are another run's. {again}")
    if clusters < 2:
        raise CompareError(f"{where} are of one sample: there is nothing to test.")
    for name, parts in outcomes.metrics.items():
        for part in parts:
            if len(np.unique(outcomes.cluster[part.rows])) != clusters or not np.isfinite(part.score.astype(np.float64)).all():
                raise CompareError(f"{where} lack some images' {name}, or it is not finite. {again}")
        stated = run.record.metrics.get(name)
        if stated is not None and abs(stated.value - value(parts)) > _ROUNDING:
            raise CompareError(
                f"{where} give {name} {value(parts):.2f}, the record says {stated.value:.2f}: they are another run's. {again}"
            )


def check_alike(one: Run, first: Outcomes, other: Run, second: Outcomes) -> None:
    """Refuse runs that were not measured on the same samples.

    Raises:
        CompareError: saying how they differ.
    """
    if len(first.sample) != len(second.sample):
        raise CompareError(
            f"Other samples: {one.path.parent} has {len(first.sample)}, {other.path.parent} has {len(second.sample)}. "
            "Measure both with the same images: a damaged image that one left out is missing there."
        )
    if not (np.array_equal(first.sample, second.sample) and np.array_equal(first.cluster, second.cluster)):
        unlike = sorted(set(first.sample.tolist()) ^ set(second.sample.tolist()))
        such = f", such as {unlike[0]}" if unlike else ": their images are grouped otherwise"
        raise CompareError(f"Other samples: {one.path.parent} and {other.path.parent} were not measured on the same{such}.")
