"""Text of a grid: a table per section, and below it settings, spreads, means, expected orders."""

from collections.abc import Callable

import pandas as pd

from benchmarks.grid.schema import Axes
from benchmarks.results import scores
from benchmarks.results.scores import FULL, PAIRS, Cells, Items, in_order, over_seeds, unique
from benchmarks.tables.ablation import axis_parts
from benchmarks.tables.expected_orders import order_lines
from benchmarks.tables.layout import markdown
from benchmarks.tables.settings import MARKS, marks, settings_lines


def grid_markdown(
    title: str, measured: Items, cells: Cells, width: int | None = None, axes: Axes | None = None
) -> str:
    """Return the Markdown text of ``cells``, measured or not.

    Tables wider than a terminal's ``width`` come in several parts. ``axes`` has the order of the
    grid's axes.
    """
    parts = [f"# {title}"]
    for section, mine, planned in scores.by_section(measured, cells):
        if mine:
            parts += _section_parts(section, mine, planned, width, axes or {})
        else:
            parts.append(f"{section}: nothing is measured yet.")
    return "\n\n".join(parts) + "\n"


def _section_parts(
    section: str, mine: Items, planned: Cells, width: int | None, axes: Axes
) -> list[str]:
    every = scores.scores(mine)
    metric = scores.main_metric(planned[0].task, every)
    # The main table and its lines show the grid's own settings; points of axes have own tables.
    own, cells = every[every["point"] == ""], [cell for cell in planned if not cell.point]
    table = own[own["metric"] == metric]
    # Scopes share seeds and models, so each mean and each order is of one scope.
    marks_here = unique(table.loc[table["method"] != "fp", "mark"])
    by_mark = {mark: table[table["mark"] == mark] for mark in marks_here} or {"": table}
    lines = []
    if any(cell.scope for cell in planned):
        brackets = "In brackets what of a model is quantized"
        lines.append(f"{brackets}; full precision, the whole model, stands beside each.")
    lines += data_lines(mine)
    lines += settings_lines([item for item in mine if not item.cell.point])
    lines += _spread_lines(by_mark, table)
    for mark, rows in by_mark.items():
        lines += order_lines(rows, mine, mark)
    unfinished = len({cell.key for cell in planned}) - len(mine)
    if unfinished > 0:
        lines.append(f"{unfinished} of {len(planned)} cells are not measured: `-`.")
    parts = [
        f"## {section}: {scores.metric_title(metric)}, mean ± sd over seeds",
        *markdown(marks(cells).join(wide(table, cells)), width, MARKS),
    ]
    for title, metrics in PAIRS.items():
        if set(metrics) <= set(own["metric"]):
            tables = (own[own["metric"] == name] for name in metrics)
            first, second = (wide(rows, cells, lambda mean, _: f"{mean:.2f}") for rows in tables)
            both = first.where(first == "-", first + " / " + second)
            parts += [f"{title} (percent), mean over seeds:", *markdown(both, width)]
    parts.append("\n".join(f"- {line}" for line in lines))
    means = pd.concat([_mean_over_models(rows, mark) for mark, rows in by_mark.items()], axis=1)
    if not means.empty and len({cell.model for cell in cells}) > 1:
        parts += ["Mean over models:", *markdown(means.loc[in_order(means.index)].fillna("-"))]
    return [*parts, *axis_parts(axes, metric, mine, planned, width)]


def wide(
    table: pd.DataFrame, cells: Cells, text: Callable[[float, float], str] = scores.value_text
) -> pd.DataFrame:
    """Return methods × ``subject bits``, with ``-`` where nothing is measured.

    A method without bits shows its value under all bits of its subject. Full precision has no scope
    either, so it stands under all subjects of its model.

    Args:
        table: scores of one section and metric.
        text: prints a mean and a standard deviation (NaN for one seed).
    """
    stats = over_seeds(table, ["subject", "method", "bits"])
    stats["text"] = [text(row.mean, row.sd) for row in stats.itertuples()]
    columns = {}
    for subject, model, bits in scores.columns_of(cells):
        own = stats["subject"].isin([subject, model]) & stats["bits"].isin([bits, FULL])
        name = f"{subject} {bits}" if bits != FULL else subject
        columns[name] = stats[own].set_index("method")["text"]
    methods = pd.Index(in_order(cell.method for cell in cells), name="method")
    return pd.DataFrame(columns, index=methods).fillna("-")


def data_lines(measured: Items) -> list[str]:
    """Return a line per data set and split with the numbers of samples."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for record in sorted((item.record for item in measured), key=lambda record: record.n):
        text = scores.sample_counts(record.n, record.dataset.captions)
        found.setdefault((record.dataset.name, record.dataset.split), {})[text] = None
    return [
        f"Data: {name}, split {split}, n = {'; '.join(texts)}."
        for (name, split), texts in sorted(found.items())
    ]


def _spread_lines(by_mark: dict[str, pd.DataFrame], table: pd.DataFrame) -> list[str]:
    """Return lines on spreads over seeds by scope, and on the error of one cell of ``table``."""
    if table.empty:
        return []
    texts = []
    for mark, rows in by_mark.items():
        stats = over_seeds(rows)
        stats = stats[stats["seeds"] > 1].assign(freedom=lambda found: found["seeds"] - 1)
        stats["squares"] = stats["freedom"] * stats["sd"] ** 2
        for bits, group in stats.groupby("bits", sort=False):
            sums = group.groupby("method")[["squares", "freedom"]].sum()
            pooled = (sums["squares"] / sums["freedom"]) ** 0.5
            spreads = [f"{method} {pooled[method]:.2f}" for method in in_order(pooled.index)]
            name = "full precision" if bits == FULL else bits
            texts.append(f"{name}{mark}: {', '.join(spreads)}")
    lines = []
    if texts:
        lines.append(f"Sd over seeds, pooled over models, in points: {'; '.join(texts)}.")
    elif (table["method"] != "fp").any():
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
    columns = {}
    for bits, here in stats.groupby("bits", sort=False):
        means = here.pivot(index="model", columns="method", values="mean").dropna()
        if len(means):
            name = f"{bits}{mark} ({scores.count(len(means), 'model')})"
            columns[name] = means.mean().map("{:.2f}".format)
    return pd.DataFrame(columns)
