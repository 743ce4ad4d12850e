"""Tables of axes: the score of each point, and its difference to the grid's own settings."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.grid.schema import Axes
from benchmarks.results.outcomes import compare, mean_difference
from benchmarks.results.scores import (
    Cells,
    Items,
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


def axis_parts(
    axes: Axes, metric: str, measured: Items, cells: Cells, width: int | None
) -> list[str]:
    """Return the Markdown of a section's axes: a table per axis and method, and a note."""
    parts = []
    for axis, points in axes.items():
        for method in methods_on(axis, cells):
            mine = [cell for cell in cells if cell.method == method]
            table = axis_table(axis, list(points), metric, measured, mine)
            parts += [f"### {axis}: {method}, one setting at a time", *fitting(table, width)]
    return [*parts, _NOTE] if parts else []


def methods_on(axis: str, cells: Cells) -> list[str]:
    """Return the methods with cells on an axis."""
    return unique(cell.method for cell in cells if any(name == axis for name, _ in cell.places))


def axis_table(
    axis: str, points: Sequence[str], metric: str, measured: Items, cells: Cells
) -> pd.DataFrame:
    """Return an axis's table of one method.

    Points are rows. Columns are ``subject bits``, and for bits and scope the differences, which
    are means over models. ``cells`` are the method's, measured or not, with those of the grid's own
    settings.
    """
    keys = {cell.key for cell in cells}
    items = [item for item in measured if item.cell.key in keys]
    table = scores(items)
    table["mark"] = [items[place].cell.mark for place in table["item"]]
    table = table[table["metric"] == metric]
    base = table[table["point"] == ""]
    rows = []
    for point in points:
        on = [cell for cell in cells if (axis, point) in cell.places]
        is_base = bool(on) and not any(cell.point for cell in on)
        here = {place for place, item in enumerate(items) if (axis, point) in item.cell.places}
        mine = table[table["item"].isin(here)]
        stats, row = over_seeds(mine, ["subject", "bits"]), {}
        means = {(r.subject, r.bits): value_text(r.mean, r.sd) for r in stats.itertuples()}
        for subject in unique(cell.subject for cell in cells):
            for bits in unique(cell.bits for cell in cells if cell.subject == subject):
                row[f"{subject} {bits}"] = means.get((subject, bits), "-")
        for bits, mark in dict.fromkeys((cell.bits, cell.mark) for cell in cells):
            found, own = (t[(t["bits"] == bits) & (t["mark"] == mark)] for t in (mine, base))
            row[f"{bits}{mark} - base"] = "base" if is_base else _pairs(found, own)
            row[f"{bits}{mark} se (samples)"] = "-" if is_base else _error(found, own, items)
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(list(points), name=axis))


def _pairs(rows: pd.DataFrame, base: pd.DataFrame) -> str:
    gaps = differences(rows, base)
    return f"{difference_text(gaps)} ({len(gaps)})" if len(gaps) else "-"


def _error(rows: pd.DataFrame, base: pd.DataFrame, items: Items) -> str:
    """Return the error of the mean over models; ``-`` unless all models' outcomes are there."""
    parts = []
    for model in unique(rows["model"]):
        places = (table.loc[table["model"] == model, "item"] for table in (rows, base))
        mine, own = ([items[place] for place in found] for found in places)
        parts.append(compare(mine, own))
    known = [part for part in parts if part is not None]
    return f"{mean_difference(known)[1]:.2f}" if known and len(known) == len(parts) else "-"
