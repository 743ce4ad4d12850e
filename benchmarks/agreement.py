"""Agreement of measured cells with a reference: one test for the whole family of comparisons.

Rounding differs between processors, and hundreds of optimisation steps turn one rounding into
another result. How far results differ for that reason is measured: a reference holds the same cells
from several processors.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.cells import MAIN_METRIC
from benchmarks.compare.statistics import holm
from benchmarks.orders import CALIBRATION_ONLY
from benchmarks.summary import PAIRS
from benchmarks.tables import COLUMNS, Measured, frame, is_percent, with_bits
from tasks.common.record import ResultRecord

#: Probability that an intact installation is said to differ in any of its comparisons.
ALPHA = 0.01

#: Figures of reconstruction, more sensitive to a fault in it than scores are. Those in
#: :data:`RATIOS` are compared by their ratio.
PASSES, WEIGHT, ERROR = FIGURES = ("fisher_passes", "fisher_weight", "block_error")
RATIOS = (WEIGHT, ERROR)

#: Known standard deviations: of the logarithm of a ratio (calibration may find another range on
#: another processor, and moves it by some percent), of a number of passes, of a median rank, and of
#: the score after a search among ranges that are nearly as good as each other.
_RATIO_SD, _PASSES_SD, _RANK_SD, _SEARCH_SD = 0.02, 0.1, 0.5, 0.2

#: Stands for zero in a logarithm.
_TINY = 1e-30

#: Methods without reconstruction by how far processors spread: a search of ranges has near-ties,
#: rounding has hardly any.
_KINDS = {**dict.fromkeys(CALIBRATION_ONLY, "calibration"), "rtn": "rounding", "fp": "full precision"}

_CELL = ["task", "dataset", "model", "method", "variant", "bits", "metric"]
_POOL = ["pool", "kind", "bits", "metric"]


def observations(measured: Sequence[Measured]) -> pd.DataFrame:
    """Return one row per cell and metric, with the processor and the figures of reconstruction.

    Returns:
        Table with the columns of :data:`benchmarks.tables.COLUMNS` and ``processor``. The
        :data:`FIGURES` of a cell are the number of its Fisher passes, the mean diagonal Fisher
        weight of its first block (before rounding could spread), and the relative error of the
        blocks' outputs (geometric mean).
    """
    scores = frame(measured)[COLUMNS]
    processors = [_processor(item) for item in measured for _ in item.record.metrics]
    figures = [
        {**scores.iloc[place].to_dict(), "metric": name, "value": value, "stderr": 0.0, "processor": _processor(item)}
        for item, place in zip(measured, _starts(measured), strict=True)
        for name, value in _figures(item.record).items()
    ]
    table = scores.assign(processor=processors)
    return pd.concat([table, pd.DataFrame(figures)], ignore_index=True) if figures else table


def _starts(measured: Sequence[Measured]) -> list[int]:
    """The first row of each cell in its frame."""
    return [0, *itertools.accumulate(len(item.record.metrics) for item in measured)][:-1]


def _processor(item: Measured) -> str:
    where = item.record.environment
    return f"{where.device}, {where.instructions}" if where.instructions else where.device


def _figures(record: ResultRecord) -> dict[str, float]:
    passes = float(sum(record.fisher_passes.values()))
    found = {PASSES: passes} if record.fisher_passes else {}
    if record.blocks:
        weights = [block.fisher for block in record.blocks.values() if block.fisher is not None]
        if passes or weights:
            found[WEIGHT] = max(weights[0] if weights else 0.0, _TINY)
        found[ERROR] = float(stats.gmean([max(block.error, _TINY) for block in record.blocks.values()]))
    return found


def compared(reference: pd.DataFrame, mine: pd.DataFrame) -> pd.DataFrame:
    """Test every cell that both tables have for a difference beyond what processors cause.

    A difference of a cell (with its seed) is ``d = mine - mean over the reference's processors``.
    Its variance is ``s² (1 + 1/k)``: k processors in the reference, and ``s²`` the variance over
    processors within a cell, pooled over the cells of the same data, scope, bits, metric and kind
    of method (full precision, rounding, calibration, reconstruction), plus a known variance, such
    as that of one sample more or less. So ``d`` has Student's t distribution, with Satterthwaite's
    degrees of freedom. Where no cell was measured on two processors, the variance over seeds stands
    in; where there is none either, the standard error of a score. The p-values are Holm's, for the
    family of all rows.

    Args:
        reference: table as of :func:`observations`.
        mine: the same of this installation.

    Returns:
        One row per comparison: the cell, ``mean_ref``, ``mean_mine``, ``difference``, ``p``
        (Holm's). :data:`RATIOS` are compared as logarithms.
    """
    theirs, ours = (_prepared(table) for table in (reference, mine))
    same_seed = [*_CELL, "seed"]
    means = theirs.groupby([*same_seed, "pool", "kind"], sort=False, dropna=False).agg(
        mean_ref=("x", "mean"), k=("x", "size"), stderr=("stderr", "mean"), n=("n", "first")
    )
    both = means.reset_index().merge(ours[[*same_seed, "x"]].rename(columns={"x": "mean_mine"}), on=same_seed)
    spread = pd.concat([_pooled(theirs, same_seed), _pooled(theirs, _CELL)]).drop_duplicates(_POOL)
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
    """The rows that are compared, with ``bits``, the compared value ``x``, ``pool`` and ``kind``.

    Figures have one pool for all data, since another processor rarely, but then visibly, finds other
    ranges in calibration.
    """
    shown = {*MAIN_METRIC.values(), *FIGURES, *(name for pair in PAIRS.values() for name in pair)}
    rows = with_bits(table[table["metric"].isin(shown)])
    ratios = rows["metric"].isin(RATIOS)
    kinds = [_KINDS.get(method, "reconstruction") for method in rows["method"]]
    values = rows["value"].astype(float)
    pool = (rows["dataset"] + rows["variant"]).where(~rows["metric"].isin(FIGURES), "")
    return rows.assign(pool=pool, kind=kinds, x=np.log(values.where(ratios, 1.0)).where(ratios, values))


def _pooled(rows: pd.DataFrame, same: list[str]) -> pd.DataFrame:
    """Variance of ``x`` among rows that are the same in ``same``, pooled to :data:`_POOL`."""
    within = rows.groupby([*dict.fromkeys([*same, *_POOL])], sort=False, dropna=False)["x"].agg(["var", "size"])
    within = within[within["size"] > 1].reset_index()
    within["freedom"] = within["size"] - 1
    within["squares"] = within["var"] * within["freedom"]
    pooled = within.groupby(_POOL)[["squares", "freedom"]].sum().reset_index()
    return pooled.assign(variance=pooled["squares"] / pooled["freedom"])


def _known_sd(rows: pd.DataFrame) -> np.ndarray:
    """Known standard deviation of each row; of a percentage that of one sample more or less."""
    metric, one = rows["metric"], 100 / rows["n"].astype(float)
    one = one.clip(lower=_SEARCH_SD).where(rows["kind"] == "calibration", one)
    kinds = [metric.isin(RATIOS), metric == PASSES, metric.map(is_percent).astype(bool)]
    return np.select(kinds, [_RATIO_SD, _PASSES_SD, one], _RANK_SD)
