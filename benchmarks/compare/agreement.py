"""Test of measured cells against a reference, corrected for the number of comparisons.

Rounding differs between processors, and hundreds of optimisation steps turn this into different
results. A reference contains cells from several processors, which show the size of the effect.
"""

import math

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.compare.statistics import holm
from benchmarks.grid.cell import MAIN_METRIC
from benchmarks.results import scores
from benchmarks.results.scores import CELL, COLUMNS, Items
from tasks.common.record import ResultRecord

#: Level of significance: probability of at least one false alarm among all comparisons of an
#: intact installation.
ALPHA = 0.01

#: Figures of reconstruction, which are more sensitive to faults than scores: number of Fisher
#: passes; mean diagonal Fisher weight of the first block, which rounding in earlier blocks cannot
#: reach; relative error of the blocks' outputs (geometric mean). :data:`RATIOS` are compared as
#: logarithms.
PASSES, WEIGHT, ERROR = FIGURES = ("fisher_passes", "fisher_weight", "block_error")
RATIOS = (WEIGHT, ERROR)

#: Known standard deviations between processors: of the logarithm of a ratio (another range from
#: calibration moves it by some percent), of a number of passes, and of a median rank.
_RATIO_SD, _PASSES_SD, _RANK_SD = 0.02, 0.1, 0.5
#: The same for a score, in points, after a search that found ranges of nearly equal quality.
_SEARCH_SD = 0.2

#: Replaces zero in logarithms.
_TINY = 1e-30

#: Kinds of methods by the cause of the spread between processors. A range search has
#: near-ties that rounding decides; rounding to nearest has hardly any. All other methods are
#: "reconstruction".
_KINDS = dict.fromkeys(scores.CALIBRATION_ONLY, "calibration")
_KINDS |= {"rtn": "rounding", "fp": "full precision"}

#: Columns of :func:`_prepared` within which variances are pooled.
_POOL = ["pool", "kind", "bits", "metric"]


def observations(measured: Items) -> pd.DataFrame:
    """Return one row per cell and metric; :data:`FIGURES` count as metrics.

    Returns:
        The columns ``COLUMNS`` of the scores, ``bits`` and ``processor``.
    """
    table = scores.scores(measured)[[*COLUMNS, "bits", "item"]]
    figures = [
        {**row, "metric": name, "value": value, "stderr": 0.0}
        for row in table.drop_duplicates("item").to_dict("records")
        for name, value in _figures(measured[row["item"]].record).items()
    ]
    if figures:
        table = pd.concat([table, pd.DataFrame(figures)], ignore_index=True)
    where = [measured[place].record.environment for place in table.pop("item")]
    names = [", ".join(filter(None, (found.device, found.instructions))) for found in where]
    return table.assign(processor=names)


def _figures(record: ResultRecord) -> dict[str, float]:
    """Return the figures of a record; an export has those of its simulated cell, so none here."""
    if record.exported is not None:
        return {}
    passes, blocks = float(sum(record.fisher_passes.values())), record.blocks.values()
    found = {PASSES: passes} if record.fisher_passes else {}
    if blocks:
        weights = [block.fisher for block in blocks if block.fisher is not None]
        if passes or weights:
            found[WEIGHT] = max(weights[0] if weights else 0.0, _TINY)
        found[ERROR] = float(stats.gmean([max(block.error, _TINY) for block in blocks]))
    return found


def compared(reference: pd.DataFrame, mine: pd.DataFrame) -> pd.DataFrame:
    """Test each cell of both tables for a difference that processors do not explain.

    The difference is ``d = mine - mean over the k processors of the reference``, for one cell and
    seed. Its variance is ``s² (1 + 1/k)``. Here ``s²`` is the variance over processors, plus a
    known variance (:func:`_known_sd`). The variance over processors is pooled over cells of the
    same data, scope, bits, metric and kind of method. If no cell has two processors, the variance
    over seeds replaces it; without several seeds, the squared standard error of the score does. So
    ``d`` has Student's t distribution with Satterthwaite's degrees of freedom.

    Args:
        reference, mine: tables of :func:`observations`.

    Returns:
        One row per comparison: the cell, ``mean_ref``, ``mean_mine``, ``difference``, and ``p``
        after Holm's correction for all rows. :data:`RATIOS` are compared as logarithms.
    """
    theirs, ours = (_prepared(table) for table in (reference, mine))
    same_seed = [*CELL, "seed"]
    means = theirs.groupby([*same_seed, "pool", "kind"], sort=False, dropna=False).agg(
        mean_ref=("x", "mean"), k=("x", "size"), stderr=("stderr", "mean"), n=("n", "first")
    )
    own = ours[[*same_seed, "x"]].rename(columns={"x": "mean_mine"})
    both = means.reset_index().merge(own, on=same_seed)
    spread = pd.concat([_pooled(theirs, same_seed), _pooled(theirs, CELL)]).drop_duplicates(_POOL)
    both = both.merge(spread, on=_POOL, how="left")
    both = both[both["variance"].notna() | ~both["metric"].isin(RATIOS)]
    between = both["variance"].fillna(both["stderr"] ** 2).to_numpy()
    variance = between + _known_sd(both) ** 2
    freedom = both["freedom"].fillna(math.inf).to_numpy()
    with np.errstate(divide="ignore"):
        freedom = freedom * (variance / between) ** 2
    scale = np.sqrt(variance * (1 + 1 / both["k"].to_numpy()))
    difference = (both["mean_mine"] - both["mean_ref"]).to_numpy()
    p = 2 * stats.t.sf(np.abs(difference) / scale, freedom)
    return both.assign(difference=difference, p=holm(p.tolist()))


def _prepared(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows to compare, with their value ``x``, ``pool`` and ``kind``.

    Figures share one pool for all data, because another processor seldom finds other ranges in
    calibration, so few cells show the spread.
    """
    pairs = [metric for pair in scores.METRIC_PAIRS.values() for metric in pair]
    rows = table[table["metric"].isin([*MAIN_METRIC.values(), *FIGURES, *pairs])]
    ratios, values = rows["metric"].isin(RATIOS), rows["value"].astype(float)
    return rows.assign(
        pool=(rows["dataset"] + rows["variant"]).where(~rows["metric"].isin(FIGURES), ""),
        kind=[_KINDS.get(method, "reconstruction") for method in rows["method"]],
        x=np.log(values.where(ratios, 1.0)).where(ratios, values),
    )


def _pooled(rows: pd.DataFrame, same: list[str]) -> pd.DataFrame:
    """Return the variance of ``x`` among rows equal in ``same``, pooled to :data:`_POOL`."""
    keys = list(dict.fromkeys([*same, *_POOL]))
    within = rows.groupby(keys, sort=False, dropna=False)["x"].agg(["var", "size"]).reset_index()
    within = within[within["size"] > 1].assign(freedom=lambda found: found["size"] - 1)
    within["squares"] = within["var"] * within["freedom"]
    pooled = within.groupby(_POOL)[["squares", "freedom"]].sum().reset_index()
    return pooled.assign(variance=pooled["squares"] / pooled["freedom"])


def _known_sd(rows: pd.DataFrame) -> np.ndarray:
    """Return the known standard deviation of each row; for percentages one sample, 100 / n."""
    metric, one = rows["metric"], 100 / rows["n"].astype(float)
    one = one.clip(lower=_SEARCH_SD).where(rows["kind"] == "calibration", one)
    kinds = [metric.isin(RATIOS), metric == PASSES, metric.map(scores.is_percent).astype(bool)]
    return np.select(kinds, [_RATIO_SD, _PASSES_SD, one], _RANK_SD)
