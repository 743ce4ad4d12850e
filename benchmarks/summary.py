"""A grid's text: the tables of its sections and what they say below themselves: settings, spread, means, expected orders."""

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from benchmarks.ablation import axis_parts
from benchmarks.axes import Axes
from benchmarks.cells import Cell
from benchmarks.marks import MARKS, marks
from benchmarks.orders import count, order_lines
from benchmarks.settings import settings_lines
from benchmarks.tables import (
    FULL,
    Measured,
    fitting,
    frame,
    in_order,
    is_percent,
    main_metric,
    markdown,
    over_seeds,
    quantized,
    sample_counts,
    unique,
    wide,
)

#: Metrics shown side by side in a small table: of retrieval those whose mean the main table has, of detection boxes and masks.
PAIRS = {"Image to text / text to image R@1": ("i2t_R@1", "t2i_R@1"), "Box / mask AP": ("AP_box", "AP_mask")}


def report(
    title: str, measured: Sequence[Measured], cells: Sequence[Cell], width: int | None = None, axes: Axes | None = None
) -> str:
    """Return the Markdown text for ``cells``: a table a section, what it rests on, and a table an axis.

    Args:
        title: the heading.
        measured: the finished cells.
        cells: the cells the table covers, measured or not.
        width: a terminal's width; a wider table is printed in several parts. None keeps it whole.
        axes: the grid's axes, for the order of their tables; None for grids without.
    """
    parts = [f"# {title}"]
    for section in unique(cell.section for cell in cells):
        mine = [item for item in measured if item.cell.section == section]
        planned = [cell for cell in cells if cell.section == section]
        if not mine:
            parts.append(f"{section}: nothing is measured yet.")
            continue
        parts.extend(_section_parts(section, mine, planned, width, axes or {}))
    return "\n\n".join(parts) + "\n"


def _section_parts(section: str, mine: Sequence[Measured], planned: Sequence[Cell], width: int | None, axes: Axes) -> list[str]:
    metric = main_metric(planned[0].task, frame(mine))
    # The main table and its lines are about the grid's own settings; axis points have tables of their own.
    own, own_cells = [item for item in mine if not item.cell.point], [cell for cell in planned if not cell.point]
    # Means, spreads and orders are of one scope each: seeds and towers are shared between scopes, so they are not independent.
    scopes = {items[0].cell.mark: items for items in _by_scope(own)}
    tables = {mark: _of_metric(frame(items), metric) for mark, items in scopes.items()}
    table = _of_metric(frame(own, subjects=True), metric)
    lines = [*data_lines(mine), *settings_lines(own), *_spread_lines(tables, table)]
    if any(cell.scope for cell in planned):
        lines.insert(0, "In brackets what of a model is quantized; full precision, the whole model, stands beside each.")
    lines += [line for mark, items in scopes.items() for line in order_lines(tables[mark], items, mark)]
    unfinished = len({cell.key for cell in planned}) - len(mine)
    if unfinished > 0:
        lines.append(f"{unfinished} of {len(planned)} cells are not measured: `-`.")
    unit = " (percent)" if is_percent(metric) else ""
    parts = [
        f"## {section}: {metric}{unit}, mean ± sd over seeds",
        *fitting(marks(own_cells).join(wide(table, own_cells)), width, MARKS),
        *_pair_parts(own, own_cells, width),
        "\n".join(f"- {line}" for line in lines),
    ]
    means = [columns for mark, rows in tables.items() if not (columns := mean_over_models(rows, mark)).empty]
    if means and len({cell.model for cell in own_cells}) > 1:
        whole = pd.concat(means, axis=1)
        parts += ["Mean over models:", markdown(whole.loc[in_order(whole.index)].fillna("-"))]
    return [*parts, *axis_parts(axes, metric, mine, planned, width)]


def _by_scope(own: Sequence[Measured]) -> list[list[Measured]]:
    """Cells of each scope; of full precision, which has none, where the others have none either."""
    scopes = unique(item.cell.scope for item in own if item.cell.method != "fp") or [""]
    return [items for scope in scopes if (items := [item for item in own if item.cell.scope == scope])]


def _of_metric(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    return table[table["metric"] == metric]


def _pair_parts(own: Sequence[Measured], cells: Sequence[Cell], width: int | None) -> list[str]:
    """Return the table of each of :data:`PAIRS` that was measured, below its title."""
    table, parts = frame(own, subjects=True), []
    for title, metrics in PAIRS.items():
        if set(metrics) <= set(table["metric"]):
            first, second = (wide(_of_metric(table, metric), cells, lambda mean, sd: f"{mean:.2f}") for metric in metrics)
            both = first.where(first == "-", first + " / " + second)
            parts += [f"{title} (percent), mean over seeds:", *fitting(both, width)]
    return parts


def data_lines(mine: Sequence[Measured]) -> list[str]:
    """Return a line per data set and split with the numbers of samples."""
    lines = []
    for name, split in sorted({(item.record.dataset.name, item.record.dataset.split) for item in mine}):
        records = [i.record for i in mine if (i.record.dataset.name, i.record.dataset.split) == (name, split)]
        counts = unique(sample_counts(record.n, record.dataset.captions) for record in sorted(records, key=lambda r: r.n))
        lines.append(f"Data: {name}, split {split}, n = {'; '.join(counts)}.")
    return lines


def pooled_sd(stats: pd.DataFrame) -> float:
    """Return the standard deviation over seeds pooled over the rows of :func:`over_seeds`; NaN where no row has two seeds."""
    rows = stats[stats["seeds"] > 1]
    freedom = (rows["seeds"] - 1).sum()
    return math.sqrt(float(((rows["seeds"] - 1) * rows["sd"] ** 2).sum()) / freedom) if freedom else math.nan


def _spread_lines(tables: Mapping[str, pd.DataFrame], table: pd.DataFrame) -> list[str]:
    """Return lines on spreads by scope (``tables`` by its mark) and on the error of one cell (``table``)."""
    if table.empty:
        return []
    texts = []
    for mark, part in tables.items():
        stats = over_seeds(part)
        for bits in unique(stats["bits"]):
            here = stats[(stats["bits"] == bits) & (stats["seeds"] > 1)]
            spreads = [f"{method} {pooled_sd(here[here['method'] == method]):.2f}" for method in in_order(here["method"])]
            if spreads:
                texts.append(f"{'full precision' if bits == FULL else bits}{mark}: {', '.join(spreads)}")
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


def mean_over_models(table: pd.DataFrame, mark: str = "") -> pd.DataFrame:
    """Return methods × bits of a scope with ``mark``: the mean over models of the mean over seeds, over the models that all
    methods have.

    Bits for which no model has all methods are left out, since means over different models do not compare.
    """
    stats = over_seeds(quantized(table))
    columns: dict[str, dict[str, str]] = {}
    for bits in unique(stats["bits"]):
        here = stats[stats["bits"] == bits].pivot(index="model", columns="method", values="mean").dropna()
        if len(here):
            means = {str(name): f"{value:.2f}" for name, value in here.mean().items()}
            columns[f"{bits}{mark} ({count(len(here), 'model')})"] = means
    order = in_order(stats["method"])
    return pd.DataFrame(columns, index=pd.Index(order, name="method")).fillna("-") if columns else pd.DataFrame()
