"""A grid's text: its tables and what they say below themselves: settings, spread, means over models, expected orders."""

import math
from collections.abc import Sequence

import pandas as pd

from benchmarks.ablation import axis_parts
from benchmarks.axes import Axes
from benchmarks.cells import Cell
from benchmarks.marks import MARKS, marks
from benchmarks.orders import count, order_lines
from benchmarks.settings import settings_lines
from benchmarks.tables import FULL, Measured, fitting, frame, in_order, main_metric, markdown, over_seeds, quantized, unique, wide


def report(
    title: str, measured: Sequence[Measured], cells: Sequence[Cell], width: int | None = None, axes: Axes | None = None
) -> str:
    """Return the Markdown text for ``cells``: a table a task, what it rests on, and a table an axis.

    Args:
        title: the heading.
        measured: the finished cells.
        cells: the cells the table covers, measured or not.
        width: a terminal's width; a wider table is printed in several parts. None keeps it whole.
        axes: the grid's axes, for the order of their tables; None for grids without.
    """
    parts = [f"# {title}"]
    for task in unique(cell.task for cell in cells):
        mine = [item for item in measured if item.cell.task == task]
        planned = [cell for cell in cells if cell.task == task]
        if not mine:
            parts.append(f"{task}: nothing is measured yet.")
            continue
        parts.extend(_task_parts(task, mine, planned, width, axes or {}))
    return "\n\n".join(parts) + "\n"


def _task_parts(task: str, mine: Sequence[Measured], planned: Sequence[Cell], width: int | None, axes: Axes) -> list[str]:
    metric = main_metric(task, frame(mine))
    # The main table and its lines are about the grid's own settings; axis points have tables of their own.
    own, own_cells = [item for item in mine if not item.cell.point], [cell for cell in planned if not cell.point]
    table = frame(own)
    table = table[table["metric"] == metric]
    lines = [*_data_lines(mine), *settings_lines(own), *_spread_lines(table), *order_lines(table, own)]
    unfinished = len({cell.key for cell in planned}) - len(mine)
    if unfinished > 0:
        lines.append(f"{unfinished} of {len(planned)} cells are not measured: `-`.")
    parts = [
        f"## {task}: {metric} (percent), mean ± sd over seeds",
        *fitting(marks(own_cells).join(wide(table, own_cells)), width, MARKS),
        "\n".join(f"- {line}" for line in lines),
    ]
    means = mean_over_models(table)
    if not means.empty:
        parts += ["Mean over models:", markdown(means)]
    return [*parts, *axis_parts(axes, metric, mine, planned, width)]


def _data_lines(mine: Sequence[Measured]) -> list[str]:
    lines = []
    for name, split in sorted({(item.record.dataset.name, item.record.dataset.split) for item in mine}):
        counts = sorted({i.record.n for i in mine if (i.record.dataset.name, i.record.dataset.split) == (name, split)})
        lines.append(f"Data: {name}, split {split}, n = {', '.join(map(str, counts))} samples.")
    return lines


def pooled_sd(stats: pd.DataFrame) -> float:
    """Return the standard deviation over seeds pooled over the rows of :func:`over_seeds`; NaN where no row has two seeds."""
    rows = stats[stats["k"] > 1]
    freedom = (rows["k"] - 1).sum()
    return math.sqrt(float(((rows["k"] - 1) * rows["sd"] ** 2).sum()) / freedom) if freedom else math.nan


def _spread_lines(table: pd.DataFrame) -> list[str]:
    if table.empty:
        return []
    stats = over_seeds(table)
    texts = []
    for bits in unique(stats["bits"]):
        here = stats[(stats["bits"] == bits) & (stats["k"] > 1)]
        spreads = [f"{method} {pooled_sd(here[here['method'] == method]):.2f}" for method in in_order(here["method"])]
        if spreads:
            texts.append(f"{'full precision' if bits == FULL else bits}: {', '.join(spreads)}")
    lines = []
    if texts:
        lines.append(f"Sd over seeds, pooled over models, in points: {'; '.join(texts)}.")
    elif (table["method"] != "fp").any():
        lines.append("Sd over seeds: not known, there is one seed only.")
    low, high = table["stderr"].min(), table["stderr"].max()
    lines.append(
        f"Standard error of one cell from its finite number of samples: {low:.2f} to {high:.2f} points. Methods are measured "
        "on the same samples, so their differences are surer than that."
    )
    return lines


def mean_over_models(table: pd.DataFrame) -> pd.DataFrame:
    """Return methods × bits: the mean over models of the mean over seeds, over the models that all methods have.

    Bits for which no model has all methods are left out, since means over different models do not compare.
    """
    stats = over_seeds(quantized(table))
    columns: dict[str, dict[str, str]] = {}
    for bits in unique(stats["bits"]):
        here = stats[stats["bits"] == bits].pivot(index="model", columns="method", values="mean").dropna()
        if len(here):
            columns[f"{bits} ({count(len(here), 'model')})"] = {str(name): f"{value:.2f}" for name, value in here.mean().items()}
    order = in_order(stats["method"])
    return pd.DataFrame(columns, index=pd.Index(order, name="method")).fillna("-") if columns else pd.DataFrame()
