"""Agreement of measured cells with a reference: one test for the whole family of comparisons.

Rounding differs between processors, and hundreds of optimisation steps turn one rounding into
another result. A reference holds cells from several processors, which shows how large this is.
"""

import math

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.compare.statistics import holm
from benchmarks.grid.cell import MAIN_METRIC
from benchmarks.results.scores import CALIBRATION_ONLY, CELL, COLUMNS, PAIRS, Items, is_percent
from benchmarks.results.scores import scores as score_table
from tasks.common.record import ResultRecord

#: Probability that any comparison finds a difference in an intact installation.
ALPHA = 0.01

#: Figures of reconstruction, more sensitive to faults than scores. :data:`RATIOS` are compared by
#: their ratio.
PASSES, WEIGHT, ERROR = FIGURES = ("fisher_passes", "fisher_weight", "block_error")
RATIOS = (WEIGHT, ERROR)

#: Known standard deviations: of the logarithm of a ratio (calibration on another processor may
#: find another range, which moves it by some percent), of a number of passes, of a median rank,
#: and of the score after a search among ranges that are nearly as good as each other.
_RATIO_SD, _PASSES_SD, _RANK_SD, _SEARCH_SD = 0.02, 0.1, 0.5, 0.2

#: Stands for zero in a logarithm.
_TINY = 1e-30

#: Kinds of methods by the cause of spread between processors: a search of ranges has near-ties,
#: rounding has hardly any. All other methods are reconstruction.
_KINDS = dict.fromkeys(CALIBRATION_ONLY, "calibration")
_KINDS |= {"rtn": "rounding", "fp": "full precision"}

_POOL = ["pool", "kind", "bits", "metric"]


def observations(measured: Items) -> pd.DataFrame:
    """Return one row per cell and metric, with the processor and the figures of reconstruction.

    Returns:
        Columns ``COLUMNS`` of the scores, ``bits`` and ``processor``. The :data:`FIGURES` of a
        cell are the number of its Fisher passes, the mean diagonal Fisher weight of its first
        block (where rounding has not spread yet), and the relative error of the blocks' outputs
        (geometric mean).
    """
    table = score_table(measured)[[*COLUMNS, "bits", "item"]]
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
    passes, blocks = float(sum(record.fisher_passes.values())), record.blocks.values()
    found = {PASSES: passes} if record.fisher_passes else {}
    if blocks:
        weights = [block.fisher for block in blocks if block.fisher is not None]
        if passes or weights:
            found[WEIGHT] = max(weights[0] if weights else 0.0, _TINY)
        found[ERROR] = float(stats.gmean([max(block.error, _TINY) for block in blocks]))
    return found


def compared(reference: pd.DataFrame, mine: pd.DataFrame) -> pd.DataFrame:
    """Test every cell that both tables have for a difference beyond that between processors.

    A difference of a cell (with its seed) is ``d = mine - mean over the reference's processors``.
    Its variance is ``s² (1 + 1/k)``: k processors in the reference, and ``s²`` the variance over
    processors within a cell, pooled over the cells of the same data, scope, bits, metric and kind
    of method (full precision, rounding, calibration, reconstruction), plus a known variance, such
    as that of one sample more or less. So ``d`` has Student's t distribution, with Satterthwaite's
    degrees of freedom. Without a cell from two processors, the variance over seeds stands in;
    without that, the standard error of a score. The p-values are Holm's, for all rows.

    Both tables are those of :func:`observations`.

    Returns:
        One row per comparison: the cell, ``mean_ref``, ``mean_mine``, ``difference``, ``p``
        (Holm's). :data:`RATIOS` are compared as logarithms.
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
    """Return the rows to compare, with the compared value ``x``, ``pool`` and ``kind``.

    Figures share one pool for all data: another processor rarely finds other ranges in
    calibration, but then they show it.
    """
    pairs = [metric for pair in PAIRS.values() for metric in pair]
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
    """Return the known standard deviation of each row; of a percentage that of one sample."""
    metric, one = rows["metric"], 100 / rows["n"].astype(float)
    one = one.clip(lower=_SEARCH_SD).where(rows["kind"] == "calibration", one)
    kinds = [metric.isin(RATIOS), metric == PASSES, metric.map(is_percent).astype(bool)]
    return np.select(kinds, [_RATIO_SD, _PASSES_SD, one], _RANK_SD)
