"""Tables of axes: the score of each point, and its difference to the grid's own settings."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.grid.schema import Axes
from benchmarks.results import scores
from benchmarks.results.outcomes import compare, mean_difference
from benchmarks.results.scores import Cells, Items, unique

NOTE = (
    "`- base`: difference to the grid's own settings (`base`), mean ± standard error over (number "
    "of) pairs of model and seed. `se (samples)`: the standard error of the same mean from its "
    "finite number of samples, paired sample by sample within each model; it knows nothing of "
    "seeds."
)


def axis_tables(axes: Axes, metric: str, measured: Items, cells: Cells) -> dict[str, pd.DataFrame]:
    """Return the tables of a section's axes by their titles, one per axis and method."""
    return {
        f"{axis}: {method}, one setting at a time": axis_table(
            axis, list(points), metric, measured, [cell for cell in cells if cell.method == method]
        )
        for axis, points in axes.items()
        for method in methods_on(axis, cells)
    }


def methods_on(axis: str, cells: Cells) -> list[str]:
    """Return the methods with cells on an axis."""
    return unique(
        cell.method for cell in cells if any(name == axis for name, _ in cell.axis_points)
    )


def axis_table(
    axis: str, points: Sequence[str], metric: str, measured: Items, cells: Cells
) -> pd.DataFrame:
    """Return the table of one axis and method.

    Args:
        cells: all cells of the method, measured or not, with those of the grid's own settings.

    Returns:
        A row per point. Columns: ``subject bits`` with the scores; for each bits and scope the
        difference to the grid's own settings, a mean over models, and its error over samples.
    """
    keys = {cell.key for cell in cells}
    items = [item for item in measured if item.cell.key in keys]
    table = scores.scores(items)
    table = table[table["metric"] == metric]
    rows = []
    for point in points:
        on = [cell for cell in cells if (axis, point) in cell.axis_points]
        is_base = bool(on) and not any(cell.point for cell in on)
        here = [index for index, item in enumerate(items) if (axis, point) in item.cell.axis_points]
        mine = table[table["item"].isin(here)]
        stats, row = scores.over_seeds(mine, ["subject", "bits"]), {}
        texts = {(r.subject, r.bits): scores.value_text(r.mean, r.sd) for r in stats.itertuples()}
        for subject, _, bits in scores.columns_of(cells):
            row[f"{subject} {bits}"] = texts.get((subject, bits), "-")
        for bits, mark in dict.fromkeys((cell.bits, cell.mark) for cell in cells):
            same = [t[(t["bits"] == bits) & (t["mark"] == mark)] for t in (mine, table)]
            found, base = same[0], same[1][same[1]["point"] == ""]
            gaps = scores.differences(found, base)
            text = f"{scores.difference_text(gaps)} ({len(gaps)})" if len(gaps) else "-"
            row[f"{bits}{mark} - base"] = "base" if is_base else text
            row[f"{bits}{mark} se (samples)"] = "-" if is_base else _error(found, base, items)
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(list(points), name=axis))


def _error(rows: pd.DataFrame, base: pd.DataFrame, items: Items) -> str:
    """Return the error of the mean over models; ``-`` unless all models have outcomes."""
    pairs = [
        compare([items[index] for index in own["item"]], [items[index] for index in theirs["item"]])
        for model, own in rows.groupby("model", sort=False)
        for theirs in [base[base["model"] == model]]
    ]
    known = [pair for pair in pairs if pair is not None]
    return f"{mean_difference(known)[1]:.2f}" if known and len(known) == len(pairs) else "-"
