"""Text of a grid: a table per section, and below it settings, spreads, means, expected orders."""

from collections.abc import Callable

import pandas as pd

from benchmarks.grid.schema import Axes
from benchmarks.results.scores import (
    FULL,
    PAIRS,
    Cells,
    Items,
    by_section,
    columns_of,
    count,
    in_order,
    main_metric,
    metric_title,
    over_seeds,
    sample_counts,
    scores,
    unique,
    value_text,
)
from benchmarks.tables.ablation import axis_parts
from benchmarks.tables.expected_orders import order_lines
from benchmarks.tables.markdown import fitting, markdown
from benchmarks.tables.settings import MARKS, marks, settings_lines


def report(
    title: str, measured: Items, cells: Cells, width: int | None = None, axes: Axes | None = None
) -> str:
    """Return the Markdown text of ``cells``, measured or not.

    Tables wider than a terminal's ``width`` are in several parts. ``axes`` has the order of the
    grid's axes.
    """
    parts = [f"# {title}"]
    for section, mine, planned in by_section(measured, cells):
        if mine:
            parts += _section_parts(section, mine, planned, width, axes or {})
        else:
            parts.append(f"{section}: nothing is measured yet.")
    return "\n\n".join(parts) + "\n"


def _section_parts(
    section: str, mine: Items, planned: Cells, width: int | None, axes: Axes
) -> list[str]:
    every = scores(mine)
    metric = main_metric(planned[0].task, every)
    # The main table and its lines show the grid's own settings; axis points have own tables.
    own, cells = every[every["point"] == ""], [cell for cell in planned if not cell.point]
    table = own[own["metric"] == metric]
    # Seeds and towers are shared between scopes, so that means and orders are of one scope each.
    scopes = {scope: table[table["scope"] == scope] for scope in unique(_quantized(table)["scope"])}
    by_mark = {f" [{scope}]" if scope else "": rows for scope, rows in scopes.items()}
    by_mark = by_mark or {"": table}
    lines = [
        *data_lines(mine),
        *settings_lines([item for item in mine if not item.cell.point]),
        *_spread_lines(by_mark, table),
    ]
    if any(cell.scope for cell in planned):
        brackets = "In brackets what of a model is quantized"
        lines.insert(0, f"{brackets}; full precision, the whole model, stands beside each.")
    for mark, rows in by_mark.items():
        lines += order_lines(rows, mine, mark)
    unfinished = len({cell.key for cell in planned}) - len(mine)
    if unfinished > 0:
        lines.append(f"{unfinished} of {len(planned)} cells are not measured: `-`.")
    parts = [
        f"## {section}: {metric_title(metric)}, mean ± sd over seeds",
        *fitting(marks(cells).join(wide(table, cells)), width, MARKS),
        *_pair_parts(own, cells, width),
        "\n".join(f"- {line}" for line in lines),
    ]
    means = [_mean_over_models(rows, mark) for mark, rows in by_mark.items()]
    means = [columns for columns in means if not columns.empty]
    if means and len({cell.model for cell in cells}) > 1:
        whole = pd.concat(means, axis=1)
        parts += ["Mean over models:", markdown(whole.loc[in_order(whole.index)].fillna("-"))]
    return [*parts, *axis_parts(axes, metric, mine, planned, width)]


def wide(
    table: pd.DataFrame, cells: Cells, text: Callable[[float, float], str] = value_text
) -> pd.DataFrame:
    """Return methods × ``subject bits``, with ``-`` where nothing is measured.

    A method without bits shows its value under all bits of its subject; full precision, which has
    no scope either, under all subjects of its model. ``table`` has one section and metric, ``text``
    prints a mean and a standard deviation (NaN for one seed).
    """
    stats = over_seeds(table, ["subject", "method", "bits"])
    texts = {(r.subject, r.method, r.bits): text(r.mean, r.sd) for r in stats.itertuples()}
    methods = in_order(cell.method for cell in cells)
    without_bits = {cell.method for cell in cells if cell.bits == FULL}
    columns: dict[str, list[str]] = {}
    for subject, model, bits in columns_of(cells):
        column = columns.setdefault(f"{subject} {bits}" if bits != FULL else subject, [])
        for method in methods:
            of = model if method == "fp" else subject
            key = (of, method, FULL if method in without_bits else bits)
            column.append(texts.get(key, "-"))
    return pd.DataFrame(columns, index=pd.Index(methods, name="method"))


def _quantized(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["method"] != "fp"]


def _pair_parts(own: pd.DataFrame, cells: Cells, width: int | None) -> list[str]:
    """Return the table of each measured pair of :data:`PAIRS` below its title."""
    parts = []
    for title, metrics in PAIRS.items():
        if set(metrics) <= set(own["metric"]):
            tables = (own[own["metric"] == metric] for metric in metrics)
            first, second = (wide(t, cells, lambda mean, _: f"{mean:.2f}") for t in tables)
            both = first.where(first == "-", first + " / " + second)
            parts += [f"{title} (percent), mean over seeds:", *fitting(both, width)]
    return parts


def data_lines(measured: Items) -> list[str]:
    """Return a line per data set and split with the numbers of samples."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for record in sorted((item.record for item in measured), key=lambda record: record.n):
        text = sample_counts(record.n, record.dataset.captions)
        found.setdefault((record.dataset.name, record.dataset.split), {})[text] = None
    return [
        f"Data: {name}, split {split}, n = {'; '.join(texts)}."
        for (name, split), texts in sorted(found.items())
    ]  # fmt: skip


def _spread_lines(by_mark: dict[str, pd.DataFrame], table: pd.DataFrame) -> list[str]:
    """Return lines on spreads by scope, and on the error of one cell of ``table``."""
    if table.empty:
        return []
    texts = []
    for mark, rows in by_mark.items():
        stats = over_seeds(rows)
        stats = stats[stats["seeds"] > 1].assign(freedom=lambda found: found["seeds"] - 1)
        stats["squares"] = stats["freedom"] * stats["sd"] ** 2
        for bits in unique(stats["bits"]):
            sums = stats[stats["bits"] == bits].groupby("method")[["squares", "freedom"]].sum()
            pooled = (sums["squares"] / sums["freedom"]) ** 0.5
            spreads = [f"{method} {pooled[method]:.2f}" for method in in_order(pooled.index)]
            name = "full precision" if bits == FULL else bits
            texts.append(f"{name}{mark}: {', '.join(spreads)}")
    lines = []
    if texts:
        lines.append(f"Sd over seeds, pooled over models, in points: {'; '.join(texts)}.")
    elif not _quantized(table).empty:
        lines.append("Sd over seeds: not known, there is one seed only.")
    return [*lines, sampling_line(table["stderr"])]


def sampling_line(errors: "pd.Series[float]") -> str:
    """Return the sentence on the standard errors of cells."""
    return (
        f"Standard error of one cell from its finite number of samples: {errors.min():.2f} to "
        f"{errors.max():.2f} points. Methods are measured on the same samples, so their "
        "differences are surer than that."
    )


def _mean_over_models(table: pd.DataFrame, mark: str) -> pd.DataFrame:
    """Return methods × bits: means over the models that have all methods, since others mislead."""
    stats = over_seeds(table[table["bits"] != FULL])
    columns: dict[str, dict[str, str]] = {}
    for bits in unique(stats["bits"]):
        here = stats[stats["bits"] == bits]
        means = here.pivot(index="model", columns="method", values="mean").dropna()
        if len(means):
            texts = {str(name): f"{mean:.2f}" for name, mean in means.mean().items()}
            columns[f"{bits}{mark} ({count(len(means), 'model')})"] = texts
    if not columns:
        return pd.DataFrame()
    index = pd.Index(in_order(stats["method"]), name="method")
    return pd.DataFrame(columns, index=index).fillna("-")
