"""Pairs judged: for each metric a test, an interval, an effect size, and what they mean in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from benchmarks.compare import mcnemar, outcomes
from benchmarks.compare.bootstrap import bootstrap
from benchmarks.compare.outcomes import Outcomes, Part
from benchmarks.compare.sides import CompareError, Pair, Pairing
from fimaq_core.errors import suggest

#: Metrics that many pairs are compared by, unless others are asked for.
MAIN = ("top1", "R@1", "AP_box", "AP_mask")


@dataclass(frozen=True)
class Finding:
    """One metric of a pair. Values, difference (A - B), interval and standard error are in points.

    Attributes:
        test: how p and the interval were found.
        effect: of McNemar's test Cohen's g, and the samples that only A or only B got right.
        samples, clusters: how many; clusters are independent, and as many as samples where none depend on each other.
        holm: p corrected for the number of pairs; None where there is one.
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
        """Which is better: shown where interval and p agree, and what is left of p after correction. None: not shown."""
        p = self.p if self.holm is None else self.holm
        return None if self.low <= 0 <= self.high or p > 1 - level else "A" if self.difference > 0 else "B"

    def verdict(self, level: float) -> str:
        """What came out, in words."""
        p = f"p {p_text(self.p)}"
        ahead, gap, low, high = "A", self.difference, self.low, self.high
        if gap < 0:
            ahead, gap, low, high = "B", -gap, -high, -low
        if self.holm is not None:
            p += f", Holm {p_text(self.holm)}"
        interval = f"[{low:.2f}, {high:.2f}]"
        if self.better(level):
            return f"{ahead} is better by {gap:.2f} points {interval}, {p}"
        if not self.low <= 0 <= self.high and self.p <= 1 - level:
            return f"no difference shown among so many pairs ({ahead} ahead by {gap:.2f} points {interval}, {p})"
        interval = f"[{self.low:.2f}, {self.high:.2f}]"
        return f"no difference shown ({self.difference:+.2f} points {interval}, {p})"


@dataclass(frozen=True)
class Judged:
    """A pair with its findings; ``problem`` says why there are none."""

    pair: Pair
    findings: tuple[Finding, ...] = ()
    problem: str | None = None


def judge(pairing: Pairing, level: float, metrics: Sequence[str] = ()) -> list[Judged]:
    """Test every pair, and correct p for the number of pairs by Holm's method, metric by metric.

    Args:
        pairing: the pairs.
        level: of confidence.
        metrics: only these; empty takes all that the outcomes of one pair give, and of several pairs :data:`MAIN`.

    Raises:
        CompareError: no pair can be compared, or one of ``metrics`` is nowhere.
    """
    judged = []
    for pair in pairing.pairs:
        try:
            judged.append(Judged(pair, tuple(findings(pair, level, metrics, short=len(pairing.pairs) > 1))))
        except CompareError as error:
            judged.append(Judged(pair, problem=str(error)))
    if not any(item.findings for item in judged):
        raise CompareError("\n".join(dict.fromkeys(item.problem or "" for item in judged)))
    return _corrected(judged)


def findings(pair: Pair, level: float, metrics: Sequence[str] = (), short: bool = False) -> list[Finding]:
    """Test one pair; see :func:`judge`.

    McNemar's test takes one seed and samples that are right or wrong by themselves. For more seeds, what a sample scored is
    averaged over them first, and the bootstrap takes these means, as it takes recalls and contributions.
    """
    both = [(outcomes.read(pair.a[seed]), outcomes.read(pair.b[seed])) for seed in pair.a]
    seed = next(iter(pair.a))
    for (mine, theirs), other in zip(both, pair.a, strict=True):
        outcomes.check_alike(pair.a[seed], both[0][0], pair.a[other], mine)
        outcomes.check_alike(pair.a[seed], both[0][0], pair.b[other], theirs)
    everywhere = [name for name in both[0][0].metrics if all(name in side.metrics for run in both for side in run)]
    for name in metrics:
        if name not in everywhere:
            raise CompareError(f"There is no metric '{name}' in these outcomes.{suggest(name, everywhere)}")
    if not everywhere:
        raise CompareError(f"The outcomes of {pair.label} have no metric in common.")
    main = [name for name in everywhere if name in MAIN] if short else []
    return [_finding(name, both, level) for name in metrics or main or everywhere]


def _finding(name: str, both: Sequence[tuple[Outcomes, Outcomes]], level: float) -> Finding:
    mine, theirs = ([side.metrics[name] for side in sides] for sides in zip(*both, strict=True))
    a, b = (float(np.mean([outcomes.value(parts) for parts in found])) for found in (mine, theirs))
    cluster = both[0][0].cluster
    samples, clusters = len(np.unique(np.concatenate([part.rows for part in mine[0]]))), int(cluster.max()) + 1
    part = mine[0][0]
    alone = len(cluster) == clusters  # no two samples depend on each other
    if len(both) == len(mine[0]) == 1 and part.score.dtype == bool and alone:
        return _mcnemar(name, a, b, part.score, theirs[0][0].score, level)
    found = bootstrap(_clusters(mine, theirs, cluster), level)
    return Finding(
        name, "bootstrap", a, b, found.difference, found.low, found.high, found.p, found.se,
        {}, samples, clusters,
    )  # fmt: skip


def _mcnemar(name: str, a: float, b: float, mine: np.ndarray, theirs: np.ndarray, level: float) -> Finding:
    table = mcnemar.Table(*(int(cells.sum()) for cells in (mine & theirs, mine & ~theirs, ~mine & theirs, ~mine & ~theirs)))
    low, high = mcnemar.newcombe(table, level)
    effect = {"cohens_g": table.cohens_g, "only_a": table.first, "only_b": table.second}
    return Finding(
        name, "McNemar", a, b, 100 * table.difference, 100 * low, 100 * high,
        mcnemar.p_value(table), 100 * table.se, effect, table.n, table.n,
    )  # fmt: skip


def _clusters(mine: Sequence[tuple[Part, ...]], theirs: Sequence[tuple[Part, ...]], cluster: np.ndarray) -> np.ndarray:
    """Sums of differences in points, averaged over seeds, and numbers of queries: (clusters, parts, 2)."""
    columns = []
    for place, part in enumerate(mine[0]):
        gaps = [a[place].score.astype(np.float64) - b[place].score.astype(np.float64) for a, b in zip(mine, theirs, strict=True)]
        owner = cluster[part.rows]
        columns.append([np.bincount(owner, 100 * np.mean(gaps, axis=0)), np.bincount(owner).astype(np.float64)])
    return np.array(columns).transpose(2, 0, 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that hold for the whole family (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    order, highest = sorted(range(len(p_values)), key=lambda place: p_values[place]), 0.0
    corrected = [0.0] * len(p_values)
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def _corrected(judged: Sequence[Judged]) -> list[Judged]:
    values: dict[str, list[float]] = {}
    for item in judged:
        for finding in item.findings:
            values.setdefault(finding.metric, []).append(finding.p)
    corrected = {metric: iter(holm(found)) for metric, found in values.items() if len(found) > 1}
    return [
        replace(item, findings=tuple(
            replace(finding, holm=next(corrected[finding.metric])) if finding.metric in corrected else finding
            for finding in item.findings
        ))
        for item in judged
    ]  # fmt: skip


def p_text(p: float) -> str:
    """Return ``= 0.003`` or ``< 0.0001``."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"
