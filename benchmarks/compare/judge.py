"""Tests of pairs: for each metric an interval, a p-value, an effect size, and their verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.compare.sides import Pair, Pairing, Run
from benchmarks.compare.statistics import Table, bootstrap, holm, newcombe, p_value
from benchmarks.results.outcomes import CompareError, Outcomes, check_alike, cluster_sums, read
from fimaq_core.errors import CheckpointError, suggest

#: Metrics by which many pairs are compared, unless others are asked for.
MAIN = ("top1", "R@1", "AP_box", "AP_mask")
#: Points by which a metric may be off its outcomes: they are stored as 32-bit numbers at least.
_ROUNDING = 0.01


@dataclass
class Finding:
    """One metric of a pair. Values, difference (A - B), interval and error are in points.

    Attributes:
        test: source of p and the interval.
        effect: of McNemar's test Cohen's g, and the samples that only A or only B got right.
        samples: number of samples.
        clusters: number of independent groups of samples.
        holm: p corrected for the number of pairs; None for one pair.
    """

    metric: str
    test: Literal["McNemar", "bootstrap"]
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    se: float
    effect: Mapping[str, float]
    samples: int
    clusters: int
    holm: float | None = None

    def better(self, level: float) -> Literal["A", "B"] | None:
        """Return the better side; None unless interval and corrected p both show a difference."""
        p = self.p if self.holm is None else self.holm
        if self.low <= 0 <= self.high or p > 1 - level:
            return None
        return "A" if self.difference > 0 else "B"

    def verdict(self, level: float) -> str:
        """Return the result in words."""
        p = f"p = {p_text(self.p)}"
        ahead, gap, low, high = "A", self.difference, self.low, self.high
        if gap < 0:
            ahead, gap, low, high = "B", -gap, -high, -low
        if self.holm is not None:
            p += f", Holm = {p_text(self.holm)}"
        p = p.replace("= <", "<")
        lead = f"by {gap:.2f} points [{low:.2f}, {high:.2f}]"
        if self.better(level):
            return f"{ahead} is better {lead}, {p}"
        if not self.low <= 0 <= self.high and self.p <= 1 - level:
            return f"no difference shown among so many pairs ({ahead} ahead {lead}, {p})"
        interval = f"[{self.low:.2f}, {self.high:.2f}]"
        return f"no difference shown ({self.difference:+.2f} points {interval}, {p})"


@dataclass(frozen=True)
class Judged:
    """A pair with its findings; ``problem`` says why there are none."""

    pair: Pair
    findings: Sequence[Finding] = ()
    problem: str | None = None


def judge(pairing: Pairing, level: float, metrics: Sequence[str] = ()) -> list[Judged]:
    """Test all pairs, and correct p for the number of pairs by Holm's method in each metric.

    Without ``metrics``, one pair has all its metrics, several have those of :data:`MAIN`.

    Raises:
        CompareError: no pair can be compared, or none has one of ``metrics``.
    """
    judged = []
    for pair in pairing.pairs:
        try:
            judged.append(Judged(pair, _findings(pair, level, metrics, len(pairing.pairs) > 1)))
        except (CompareError, CheckpointError) as error:
            judged.append(Judged(pair, problem=str(error)))
    by_metric: dict[str, list[Finding]] = {}
    for finding in (finding for item in judged for finding in item.findings):
        by_metric.setdefault(finding.metric, []).append(finding)
    if not by_metric:
        raise CompareError("\n".join(dict.fromkeys(item.problem or "" for item in judged)))
    for found in by_metric.values():
        if len(found) > 1:
            corrected = holm([finding.p for finding in found])
            for finding, p in zip(found, corrected, strict=True):
                finding.holm = p
    return judged


def _findings(pair: Pair, level: float, metrics: Sequence[str], short: bool) -> list[Finding]:
    mine, theirs = ([_read(run) for run in side.values()] for side in (pair.a, pair.b))
    for other in (*mine, *theirs):
        check_alike(mine[0], other)
    runs = (*mine, *theirs)
    everywhere = [name for name in mine[0].metrics if all(name in run.metrics for run in runs)]
    for name in metrics:
        if name not in everywhere:
            hint = suggest(name, everywhere)
            raise CompareError(f"There is no metric '{name}' in these outcomes.{hint}")
    if not everywhere:
        raise CompareError(f"The outcomes of {pair.label} have no metric in common.")
    main = [name for name in everywhere if name in MAIN] if short else []
    return [_finding(name, mine, theirs, level) for name in metrics or main or everywhere]


def _read(run: Run) -> Outcomes:
    """Read the outcomes of a run and check them against its record."""
    outcomes = read(run.record, run.path.parent)
    n, clusters = len(outcomes.sample), outcomes.clusters
    again = f"Measure {run.label} again with --force."
    where = f"The outcomes beside {run.path}"
    if not outcomes.metrics:
        raise CompareError(f"{where} hold nothing that can be compared. {again}")
    if n > 1 and (outcomes.sample[1:] == outcomes.sample[:-1]).any():
        raise CompareError(f"{where} name a sample twice. {again}")
    if clusters != run.record.n:
        numbers = f"{clusters} samples, the record is of {run.record.n}"
        raise CompareError(f"{where} are of {numbers}: they are another run's. {again}")
    if clusters < 2:
        raise CompareError(f"{where} are of one sample: there is nothing to test.")
    for name, parts in outcomes.metrics.items():
        for part in parts:
            complete = len(np.unique(outcomes.cluster[part.rows])) == clusters
            if not complete or not np.isfinite(part.score).all():
                lack = f"{where} lack some images' {name}, or it is not finite"
                raise CompareError(f"{lack}. {again}")
        stated, found = run.record.metrics.get(name), _value(outcomes, name)
        if stated is not None and abs(stated.value - found) > _ROUNDING:
            values = f"{name} {found:.2f}, the record says {stated.value:.2f}"
            raise CompareError(f"{where} give {values}: they are another run's. {again}")
    return outcomes


def _value(outcomes: Outcomes, metric: str) -> float:
    return float(np.mean([100 * part.score.mean() for part in outcomes.metrics[metric]]))


def _finding(
    name: str, mine: Sequence[Outcomes], theirs: Sequence[Outcomes], level: float
) -> Finding:
    """Test one metric.

    McNemar's test takes one seed and independent samples that are right or wrong. The bootstrap
    takes all else: means over seeds, recalls, contributions to average precision.
    """
    a, b = (float(np.mean([_value(run, name) for run in side])) for side in (mine, theirs))
    parts, clusters = mine[0].metrics[name], mine[0].clusters
    samples = len(np.unique(np.concatenate([part.rows for part in parts])))
    independent = len(mine[0].sample) == clusters
    if len(mine) == len(parts) == 1 and parts[0].score.dtype == bool and independent:
        x, y = parts[0].score, theirs[0].metrics[name][0].score
        table = Table(*(int(both.sum()) for both in (x & y, x & ~y, ~x & y, ~x & ~y)))
        low, high = newcombe(table, level)
        effect = {"cohens_g": table.cohens_g, "only_a": table.first, "only_b": table.second}
        return Finding(
            name, "McNemar", a, b, 100 * table.difference, 100 * low, 100 * high, p_value(table),
            100 * table.se, effect, samples, clusters,
        )  # fmt: skip
    found = bootstrap(cluster_sums(mine, theirs, name), level)
    return Finding(
        name, "bootstrap", a, b, found.difference, found.low, found.high, found.p, found.se, {},
        samples, clusters,
    )  # fmt: skip


def p_text(p: float | None) -> str:
    """Return ``0.003``, ``< 0.0001``, or ``-`` for none."""
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"
