"""Tests of pairs of runs: interval, p-value, effect size and verdict of each metric."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np

from benchmarks.compare import alike
from benchmarks.compare.pairs import Pair, RecordFile
from benchmarks.compare.statistics import PairedCounts, bootstrap, holm, mcnemar
from benchmarks.results.outcomes import CompareError, Outcomes, check_alike, cluster_sums, read
from fimaq_core.errors import CheckpointError, suggest
from tasks.common.fidelity import LOWER, UNITS

#: Metrics by which several pairs are compared, unless the user names others.
_MAIN = ("top1", "R@1", "AP_box", "AP_mask")


@dataclass
class MetricComparison:
    """One metric of a pair.

    Values, difference, interval and error are in points, or in the unit of a figure of fidelity.
    """

    metric: str
    test: Literal["McNemar", "bootstrap"]
    a: float
    b: float
    difference: float  #: A - B
    low: float
    high: float
    p: float
    se: float
    effect: Mapping[str, float]  #: Cohen's g and numbers of samples for McNemar's test, else empty
    samples: int
    clusters: int  #: number of independent groups of samples
    holm: float | None = None  #: p corrected for the number of pairs; None for one pair

    @property
    def form(self) -> str:
        """Format of values: three digits for figures that are no percentages."""
        return ".3g" if self.metric in UNITS else ".2f"

    def better(self, level: float) -> Literal["A", "B"] | None:
        """Return the better side; None unless both the interval and p show a difference."""
        p = self.p if self.holm is None else self.holm
        if self.low <= 0 <= self.high or p > 1 - level:
            return None
        return "A" if (self.difference > 0) != (self.metric in LOWER) else "B"

    def verdict(self, level: float) -> str:
        """Return the result in words."""
        p = f"p = {p_text(self.p)}"
        if self.holm is not None:
            p += f", Holm = {p_text(self.holm)}"
        p = p.replace("= <", "<")
        low, high = self.low, self.high
        up, ends = (True, (low, high)) if self.difference >= 0 else (False, (-high, -low))
        ahead = "A" if up != (self.metric in LOWER) else "B"
        unit, form = f" {UNITS.get(self.metric, 'points')}".rstrip(), self.form
        lead = f"by {abs(self.difference):{form}}{unit} [{ends[0]:{form}}, {ends[1]:{form}}]"
        if self.better(level):
            return f"{ahead} is better {lead}, {p}"
        if not low <= 0 <= high and self.p <= 1 - level:
            return f"no difference shown among so many pairs ({ahead} ahead {lead}, {p})"
        interval = f"[{low:{form}}, {high:{form}}]"
        return f"no difference shown ({self.difference:+{form}}{unit} {interval}, {p})"


@dataclass(frozen=True)
class ComparedPair:
    """A pair with its compared metrics, or with the ``problem`` that prevents the comparison."""

    pair: Pair
    metrics: Sequence[MetricComparison] = ()
    problem: str | None = None


def compare_pairs(
    pairs: Sequence[Pair], level: float, metrics: Sequence[str] = ()
) -> list[ComparedPair]:
    """Test all pairs; Holm's method corrects the p-values of a metric for the number of pairs.

    Without ``metrics``, one pair is compared in all its metrics, several pairs in their main ones.
    Raises CompareError if no pair can be compared, or if no pair has one of ``metrics``.
    """
    compared = []
    for pair in pairs:
        try:
            compared.append(ComparedPair(pair, _compare(pair, level, metrics, len(pairs) > 1)))
        except (CompareError, CheckpointError) as error:
            compared.append(ComparedPair(pair, problem=str(error)))
    by_metric: dict[str, list[MetricComparison]] = {}
    for found in (found for item in compared for found in item.metrics):
        by_metric.setdefault(found.metric, []).append(found)
    if not by_metric:
        raise CompareError("\n".join(dict.fromkeys(item.problem or "" for item in compared)))
    for same in by_metric.values():
        if len(same) > 1:
            for found, p in zip(same, holm([found.p for found in same]), strict=True):
                found.holm = p
    return compared


def _compare(
    pair: Pair, level: float, metrics: Sequence[str], short: bool
) -> list[MetricComparison]:
    """Test ``metrics`` of a pair, by default all common ones (if ``short``, the main ones)."""
    for file in (*pair.a.values(), *pair.b.values()):
        if problem := alike.contradiction(file.record):
            raise CompareError(f"{file.path}: {problem}. Measure {file.label} again with --force.")
    if unlike := alike.differing(pair.records, alike.SHARED):
        raise CompareError(f"The records of {pair.label} are unlike: they differ in {unlike}.")
    mine, theirs = ([_read(file) for file in side.values()] for side in (pair.a, pair.b))
    for other in (*mine, *theirs):
        check_alike(mine[0], other)
    common = [name for name in mine[0].metrics if all(name in o.metrics for o in (*mine, *theirs))]
    for name in metrics:
        if name not in common:
            unknown = f"There is no metric '{name}' in these outcomes."
            raise CompareError(f"{unknown}{suggest(name, common)}")
    if not common:
        raise CompareError(f"The outcomes of {pair.label} have no metric in common.")
    main = [name for name in common if name in _MAIN] if short else []
    scored = [name for name in common if name not in pair.records[0].fidelity]
    return [_test(name, mine, theirs, level) for name in metrics or main or scored or common]


def _read(file: RecordFile) -> Outcomes:
    """Read the outcomes of a record. Raises OutcomesError or CompareError."""
    outcomes = read(file.record, file.path.parent)
    if outcomes.clusters < 2:
        raise CompareError(f"The outcomes beside {file.path} have one sample: no test is possible.")
    return outcomes


def _test(
    name: str, mine: Sequence[Outcomes], theirs: Sequence[Outcomes], level: float
) -> MetricComparison:
    """Test one metric.

    McNemar's test needs one seed and independent samples that are right or wrong. The bootstrap
    tests the rest: means over seeds, recalls, contributions to average precision.
    """
    a, b = (float(np.mean([run.value(name) for run in side])) for side in (mine, theirs))
    parts, clusters = mine[0].metrics[name], mine[0].clusters
    samples = len(np.unique(np.concatenate([part.rows for part in parts])))
    independent = len(mine[0].sample) == clusters
    test: Literal["McNemar", "bootstrap"] = "bootstrap"
    effect: dict[str, float] = {}
    if len(mine) == len(parts) == 1 and parts[0].score.dtype == bool and independent:
        test, counts = "McNemar", PairedCounts.of(parts[0].score, theirs[0].metrics[name][0].score)
        effect = {"cohens_g": counts.cohens_g, "only_a": counts.first, "only_b": counts.second}
        found = mcnemar(counts, level)
    else:
        found = bootstrap(cluster_sums(mine, theirs, name), level)
    return MetricComparison(name, test, a, b, *astuple(found), effect, samples, clusters)


def p_text(p: float | None) -> str:
    """Return ``0.003``, ``< 0.0001``, or ``-`` for None."""
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"
