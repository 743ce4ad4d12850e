"""Tables of axes: what each point scores, and its difference to the grid's own settings."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.axes import Axes
from benchmarks.cells import Cell
from benchmarks.results.outcomes import compare, mean_difference
from benchmarks.tables import Measured, fitting, unique, value_text


class _Row(NamedTuple):
    """The cells of a point, and those of the grid's own settings that they stand beside."""

    point: str
    measured: list[Measured]
    base: list[Measured]
    is_base: bool


_NOTE = (
    "`- base`: difference to the grid's own settings (`base`), mean ± standard error over (number of) pairs of model and "
    "seed. `se (samples)`: the standard error of the same mean from its finite number of samples, paired sample by sample "
    "within each model; it knows nothing of seeds."
)


def axis_parts(axes: Axes, metric: str, measured: Sequence[Measured], cells: Sequence[Cell], width: int | None) -> list[str]:
    """Return the Markdown of a section's axes: for each axis and method a heading and a table, and a note below all.

    Args:
        axes: the axes in order.
        metric: the one to show.
        measured: the section's finished cells.
        cells: the section's cells, measured or not.
        width: a terminal's width; None keeps tables whole.
    """
    parts = []
    for axis, points in axes.items():
        here = [cell for cell in cells if any(place[0] == axis for place in cell.places)]
        for method in unique(cell.method for cell in here):
            table = axis_table(axis, list(points), metric, measured, [cell for cell in cells if cell.method == method])
            parts += [f"### {axis}: {method}, one setting at a time", *fitting(table, width)]
    return [*parts, _NOTE] if parts else []


def axis_table(
    axis: str, points: Sequence[str], metric: str, measured: Sequence[Measured], cells: Sequence[Cell]
) -> pd.DataFrame:
    """Return an axis's table of one method: points as rows; ``subject bits`` and the differences of each bits as columns.

    Differences are means over models, so those of each scope have columns of their own.

    Args:
        axis: its name.
        points: its points in order.
        metric: the one to show.
        measured: finished cells.
        cells: the method's cells, measured or not, with those of the grid's own settings.
    """
    done = {item.cell.key: item for item in measured}
    base = [done[cell.key] for cell in cells if not cell.point and cell.key in done]
    rows = []
    for point in points:
        mine = [cell for cell in cells if (axis, point) in cell.places]
        is_base = bool(mine) and not any(cell.point for cell in mine)
        rows.append(_Row(point, [done[cell.key] for cell in mine if cell.key in done], base, is_base))
    columns: dict[str, list[str]] = {}
    for subject in unique(cell.subject for cell in cells):
        for bits in unique(cell.bits for cell in cells if cell.subject == subject):
            values = [
                [_value(i, metric) for i in row.measured if (i.cell.subject, i.cell.bits) == (subject, bits)] for row in rows
            ]
            columns[f"{subject} {bits}"] = [_mean(found) for found in values]
    for place in unique(_place(cell) for cell in cells):
        columns[f"{place} - base"] = ["base" if row.is_base else _over_pairs(row, place, metric) for row in rows]
        columns[f"{place} se (samples)"] = ["-" if row.is_base else _over_samples(row, place) for row in rows]
    return pd.DataFrame(columns, index=pd.Index(list(points), name=axis))


def _place(cell: Cell) -> str:
    """Bits and scope."""
    return f"{cell.bits}{cell.mark}"


def _value(item: Measured, metric: str) -> float:
    return item.record.metrics[metric].value


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return value_text(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)


def _over_pairs(row: _Row, place: str, metric: str) -> str:
    base = {(item.cell.model, item.cell.seed): _value(item, metric) for item in row.base if _place(item.cell) == place}
    gaps = [
        _value(item, metric) - base[(item.cell.model, item.cell.seed)]
        for item in row.measured
        if _place(item.cell) == place and (item.cell.model, item.cell.seed) in base
    ]
    if not gaps:
        return "-"
    error = f" ± {np.std(gaps, ddof=1) / math.sqrt(len(gaps)):.2f}" if len(gaps) > 1 else ""
    return f"{np.mean(gaps):+.2f}{error} ({len(gaps)})"


def _over_samples(row: _Row, place: str) -> str:
    """Return the error of the mean over models, or ``-`` unless every model's outcomes are there."""
    parts = []
    for model in unique(item.cell.model for item in row.measured if _place(item.cell) == place):
        mine, base = (
            [item for item in items if (item.cell.model, _place(item.cell)) == (model, place)]
            for items in (row.measured, row.base)
        )
        part = compare(mine, base)
        if part is None:
            return "-"
        parts.append(part)
    return f"{mean_difference(parts)[1]:.2f}" if parts else "-"
