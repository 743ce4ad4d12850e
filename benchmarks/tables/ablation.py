"""Tables of axes: the score of each point, and its difference to the grid's own settings."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.axes import Axes
from benchmarks.cells import Cell
from benchmarks.results.outcomes import compare, mean_difference
from benchmarks.results.scores import (
    Measured,
    difference_text,
    differences,
    over_seeds,
    scores,
    unique,
    value_text,
)
from benchmarks.tables.markdown import fitting

_NOTE = (
    "`- base`: difference to the grid's own settings (`base`), mean ± standard error over (number "
    "of) pairs of model and seed. `se (samples)`: the standard error of the same mean from its "
    "finite number of samples, paired sample by sample within each model; it knows nothing of "
    "seeds."
)


def axis_parts(axes: Axes, metric: str, measured: Sequence[Measured], cells: Sequence[Cell], width: int | None) -> list[str]:
    """Return the Markdown of a section's axes: a table per axis and method, and a note.

    Args:
        axes: the axes in order.
        metric: the metric to show.
        measured: the section's finished cells.
        cells: the section's cells, measured or not.
        width: a terminal's width; None keeps tables whole.
    """
    parts = []
    for axis, points in axes.items():
        for method in methods_on(axis, cells):
            mine = [cell for cell in cells if cell.method == method]
            table = axis_table(axis, list(points), metric, measured, mine)
            heading = f"### {axis}: {method}, one setting at a time"
            parts += [heading, *fitting(table, width)]
    return [*parts, _NOTE] if parts else []


def methods_on(axis: str, cells: Sequence[Cell]) -> list[str]:
    """Return the methods with cells on an axis."""
    return unique(cell.method for cell in cells if any(name == axis for name, _ in cell.places))


def axis_table(
    axis: str,
    points: Sequence[str],
    metric: str,
    measured: Sequence[Measured],
    cells: Sequence[Cell],
) -> pd.DataFrame:
    """Return an axis's table of one method.

    Points are rows. Columns are ``subject bits``, and for bits and scope the differences, which
    are means over models.

    Args:
        axis: its name.
        points: its points in order.
        metric: the metric to show.
        measured: finished cells.
        cells: the method's cells, measured or not, with those of the grid's own settings.
    """
    keys = {cell.key for cell in cells}
    items = [item for item in measured if item.cell.key in keys]
    table = scores(items)
    table = table[table["metric"] == metric]
    table["place"] = [f"{items[place].cell.bits}{items[place].cell.mark}" for place in table["item"]]
    base = table[table["point"] == ""]
    rows = {point: table[[(axis, point) in items[place].cell.places for place in table["item"]]] for point in points}
    on = {point: [cell for cell in cells if (axis, point) in cell.places] for point in points}
    is_base = {point: bool(mine) and not any(c.point for c in mine) for point, mine in on.items()}
    columns: dict[str, list[str]] = {}
    for subject in unique(cell.subject for cell in cells):
        for bits in unique(cell.bits for cell in cells if cell.subject == subject):
            columns[f"{subject} {bits}"] = [
                _mean(mine[(mine["subject"] == subject) & (mine["bits"] == bits)]) for mine in rows.values()
            ]
    for place in unique(f"{cell.bits}{cell.mark}" for cell in cells):
        here = {point: mine[mine["place"] == place] for point, mine in rows.items()}
        own = base[base["place"] == place]
        columns[f"{place} - base"] = ["base" if is_base[point] else _over_pairs(mine, own) for point, mine in here.items()]
        columns[f"{place} se (samples)"] = [
            "-" if is_base[point] else _over_samples(mine, own, items) for point, mine in here.items()
        ]
    return pd.DataFrame(columns, index=pd.Index(list(points), name=axis))


def _mean(rows: pd.DataFrame) -> str:
    return "-" if rows.empty else value_text(*over_seeds(rows, ["metric"]).loc[0, ["mean", "sd"]])


def _over_pairs(rows: pd.DataFrame, base: pd.DataFrame) -> str:
    gaps = differences(rows, base)
    return f"{difference_text(gaps)} ({len(gaps)})" if len(gaps) else "-"


def _over_samples(rows: pd.DataFrame, base: pd.DataFrame, items: Sequence[Measured]) -> str:
    """Return the error of the mean over models; ``-`` unless all models' outcomes are there."""
    parts = []
    for model in unique(rows["model"]):
        mine, own = ([items[place] for place in table.loc[table["model"] == model, "item"]] for table in (rows, base))
        parts.append(compare(mine, own))
    known = [part for part in parts if part is not None]
    return f"{mean_difference(known)[1]:.2f}" if known and len(known) == len(parts) else "-"
