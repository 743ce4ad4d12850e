"""Tables of axes: score of each axis point and difference to the grid's own settings."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.grid.schema import Axes
from benchmarks.results import scores
from benchmarks.results.outcomes import CompareError, compare, mean_difference
from benchmarks.results.scores import Cells, Items, unique

NOTE = (
    "`- base`: difference to the grid's own settings (`base`): mean ± standard error over pairs of "
    "model and seed, whose number is in brackets. `se (samples)`: standard error of the same mean "
    "from the finite number of samples, paired within each model. It does not include the spread "
    "over seeds."
)


def axis_tables(axes: Axes, metric: str, measured: Items, cells: Cells) -> dict[str, pd.DataFrame]:
    """Return one table per axis and method of a section, by its title."""
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
        cells: all cells of the method, measured or not, also those of the grid's own settings.

    Returns:
        One row per point. Columns: ``subject bits`` with scores; for each bits and scope the
        difference to the grid's own settings, averaged over models, and its error over samples.
    """
    keys = {cell.key for cell in cells}
    items = [item for item in measured if item.cell.key in keys]
    table = scores.scores(items, fidelity=True)
    # Errors over samples are known for the main metric only.
    judged = bool(items) and metric == scores.main_metric(items[0].cell.task, scores.scores(items))
    table = table[table["metric"] == metric]
    base, rows = table[table["point"] == ""], []
    for point in points:
        on = [cell for cell in cells if (axis, point) in cell.axis_points]
        is_base = bool(on) and not any(cell.point for cell in on)
        here = [index for index, item in enumerate(items) if (axis, point) in item.cell.axis_points]
        mine = table[table["item"].isin(here)]
        row = {f"{column.subject} {column.bits}": "-" for column in scores.columns_of(cells)}
        for score in scores.over_seeds(mine, ["subject", "bits"]).itertuples():
            row[f"{score.subject} {score.bits}"] = scores.value_text(score.mean, score.sd, metric)
        for bits, mark in dict.fromkeys((cell.bits, cell.mark) for cell in cells):
            own, theirs = (t[(t["bits"] == bits) & (t["mark"] == mark)] for t in (mine, base))
            gaps = scores.differences(own, theirs)
            text = f"{scores.difference_text(gaps, metric)} ({len(gaps)})" if len(gaps) else "-"
            row[f"{bits}{mark} - base"] = "base" if is_base else text
            error = "-" if is_base or not judged else _error(own, theirs, items)
            row[f"{bits}{mark} se (samples)"] = error
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(list(points), name=axis))


def _error(rows: pd.DataFrame, base: pd.DataFrame, items: Items) -> str:
    """Return the error of the mean over models, or ``-`` and the reason why there is none."""
    found = []
    for model, own in rows.groupby("model", sort=False):
        theirs = base[base["model"] == model]
        try:
            pair = compare([items[i] for i in own["item"]], [items[i] for i in theirs["item"]])
        except CompareError as error:
            return f"- ({error})" if len(theirs) else "-"
        found.append(pair)
    return f"{mean_difference(found)[1]:.2f}" if found else "-"
