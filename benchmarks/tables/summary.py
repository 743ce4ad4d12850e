"""Tables of a grid: Markdown with settings, spreads, means and expected orders; LaTeX."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd

from benchmarks.grid.cell import EXPORT, Cell
from benchmarks.grid.schema import Axes
from benchmarks.results import scores
from benchmarks.results.scores import (
    FULL,
    METRIC_PAIRS,
    Cells,
    Damaged,
    Items,
    in_order,
    over_seeds,
    unique,
)
from benchmarks.tables.ablation import NOTE, axis_tables
from benchmarks.tables.expected_orders import order_lines
from benchmarks.tables.exports import NOTE as EXPORTS_NOTE
from benchmarks.tables.exports import TITLE, export_table
from benchmarks.tables.formats import PREAMBLE, escape, latex, markdown
from benchmarks.tables.settings import MARKS, marks, settings_lines
from fimaq_core.terminal import one_line
from tasks.common.fidelity import UNITS


def grid_markdown(
    title: str,
    measured: Items,
    cells: Cells,
    width: int | None = None,
    axes: Axes | None = None,
    damaged: Sequence[Damaged] = (),
    *,
    metric: str | None = None,
) -> str:
    """Return the tables of ``cells``, measured or not, as Markdown.

    Tables wider than the ``width`` of a terminal are split. ``axes`` are those of the grid. The
    main table shows ``metric`` in sections that have it; None: the main metric of the task.
    ``damaged`` are cells with unreadable records, which are named below the tables.
    """
    parts = [f"# {title}"]
    for section, mine, planned in scores.by_section(measured, cells):
        lines = [one.line for one in damaged if one.cell.section == section]
        if mine:
            parts += _section_parts(section, mine, planned, width, axes or {}, lines, metric)
        elif lines:
            parts += [f"{section}: nothing can be shown.", "\n".join(f"- {it}" for it in lines)]
        else:
            parts.append(f"{section}: nothing is measured yet.")
    return "\n\n".join(parts) + "\n"


def grid_latex(
    name: str,
    measured: Items,
    cells: Cells,
    axes: Axes | None = None,
    damaged: Sequence[Damaged] = (),
) -> str:
    """Return the tables of ``cells`` in measured sections as LaTeX.

    There is one table of scores per bit-width. Its columns are models; the best score of each
    column is bold. ``damaged`` are cells with unreadable records, named below the tables.
    """
    parts = [PREAMBLE]
    for section, mine, planned in scores.by_section(measured, cells):
        notes = " ".join(one.line for one in damaged if one.cell.section == section)
        if not mine:
            parts += [f"% {section}: {escape(notes)}"] if notes else []
            continue
        metric, ((title, main), *rest) = _tables(mine, planned)
        tables = _by_bits("", title, _best_bold(main, planned))
        for title, pair in rest:
            tables += _by_bits(f"-{title.split('(')[0].strip()}", title, pair)
        exports = export_table(metric, mine)
        if not exports.empty:
            tables.append(("-exports", TITLE, exports))
        for title, points in axis_tables(axes or {}, metric, mine, planned).items():
            label = f"-{re.split('[,(]', title)[0].strip()}"
            tables.append((label, f"{title}, {scores.metric_title(metric)}", points))
        seeds = ", ".join(map(str, scores.seeds_of(mine)))
        about = [*data_lines(mine), *([f"Seeds: {seeds}."] if seeds else [])]
        for label, title, table in tables:
            words = [f"{section}: {title}.", *about]
            if any("**" in text for text in table.to_numpy().ravel()):
                words.append("Bold: the best quantized method of a column.")
            but = "" if exports.empty else f", except in rows of {EXPORT}"
            words.append(f"Quantization is simulated{but}.")
            parts.append(latex(table, " ".join(words), f"{name}-{section}{label}", notes))
    return "\n\n".join(parts) + "\n"


def _by_bits(label: str, title: str, table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Split a table by bits; return the label, the title and the subjects' columns of each part."""
    found: dict[str, dict[str, pd.Series[str]]] = {}
    for column in table.columns:
        subject, _, bits = column.rpartition(" ")
        found.setdefault(bits if subject else "", {})[subject or bits] = table[column]
    parts = []
    for bits, columns in found.items():
        part = pd.DataFrame(columns)
        ends = (f"-{bits}", f", {bits}") if bits else ("", "")
        parts.append((label + ends[0], title + ends[1], part[~part.eq("-").all(axis=1)]))
    return parts


def _tables(
    mine: Items, planned: Cells, asked: str | None = None
) -> tuple[str, list[tuple[str, pd.DataFrame]]]:
    """Return the main metric, and titles and tables of the grid's own settings, the main first."""
    table, cells = scores.scores(mine, fidelity=asked is not None), _without_axes(planned)
    own = table[table["point"].isin(["", EXPORT])]
    metric = scores.main_metric(mine[0].cell.task, table, asked)
    title = f"{scores.metric_title(metric)}, mean ± sd over seeds"
    text = partial(scores.value_text, metric=metric)
    tables = [(title, wide(own[own["metric"] == metric], cells, text))]
    for title, metrics in METRIC_PAIRS.items():
        if set(metrics) <= set(own["metric"]):
            pair = (own[own["metric"] == name] for name in metrics)
            first, second = (wide(rows, cells, lambda mean, _: f"{mean:.2f}") for rows in pair)
            both = first.where(first == "-", first + " / " + second)
            tables.append((f"{title} (percent), mean over seeds", both))
    return metric, tables


def _without_axes(cells: Cells) -> list[Cell]:
    """Return the cells in the grid's own settings, and their exports."""
    return [cell for cell in cells if cell.point in ("", EXPORT)]


def _best_bold(table: pd.DataFrame, cells: Cells) -> pd.DataFrame:
    """Return the table with the best of several quantized methods in bold in each column."""
    full = {cell.method for cell in cells if cell.bits == FULL}
    texts = table[~table.index.isin(full)]
    numbers = texts.apply(lambda own: pd.to_numeric(own.str.split().str[0], errors="coerce"))
    best = (numbers == numbers.max()) & (numbers.count() > 1)
    best = best.reindex(table.index, fill_value=False)
    return table.where(~best, "**" + table + "**")


def _section_parts(
    section: str,
    mine: Items,
    planned: Cells,
    width: int | None,
    axes: Axes,
    damaged: Sequence[str],
    asked: str | None,
) -> list[str]:
    """Return the tables of a section and the lines below them, as Markdown.

    ``damaged`` has one line per cell with an unreadable record.
    """
    # The lines are on the grid's own settings; axes and exports have their own tables.
    own, cells = [it for it in mine if not it.cell.point], [c for c in planned if not c.point]
    metric, ((title, main), *tables) = _tables(mine, planned, asked)
    table = scores.scores(own, fidelity=asked is not None)
    table = table[table["metric"] == metric]
    # Each mean and each order covers one scope, since scopes have the same seeds and models.
    marks_here = unique(table.loc[table["method"] != "fp", "mark"])
    by_mark = {mark: table[table["mark"] == mark] for mark in marks_here} or {"": table}
    lines = []
    if any(cell.scope for cell in planned):
        brackets = "Brackets name the quantized parts of a model"
        lines.append(f"{brackets}. The score in full precision is repeated in each of its columns.")
    lines += [*data_lines(mine), *settings_lines(own), *_spread_lines(by_mark, table)]
    if metric == scores.main_metric(mine[0].cell.task, scores.scores(mine)):
        for mark, rows in by_mark.items():
            lines += order_lines(rows, own, mark)
    unfinished = len({cell.key for cell in planned}) - len(mine) - len(damaged)
    if unfinished > 0:
        lines.append(f"{unfinished} of {len(planned)} cells are not measured: `-`.")
    lines += damaged
    named = marks(_without_axes(planned))
    parts = [f"## {section}: {title}", *markdown(named.join(main), width, MARKS)]
    for title, pair in tables:
        parts += [f"{title}:", *markdown(pair, width)]
    exports = export_table(metric, mine)
    if not exports.empty:
        parts += [f"{TITLE}:", *markdown(exports, width), EXPORTS_NOTE]
    parts.append("\n".join(f"- {one_line(line)}" for line in lines))
    means = pd.concat([_mean_over_models(rows, mark) for mark, rows in by_mark.items()], axis=1)
    if not means.empty and len({cell.model for cell in cells}) > 1:
        parts += ["Mean over models:", *markdown(means.loc[in_order(means.index)].fillna("-"))]
    by_axis = axis_tables(axes, metric, mine, planned)
    for title, points in by_axis.items():
        parts += [f"### {title}", *markdown(points, width)]
    return [*parts, NOTE] if by_axis else parts


def wide(
    table: pd.DataFrame, cells: Cells, text: Callable[[float, float], str] = scores.value_text
) -> pd.DataFrame:
    """Return rows × ``subject bits``, with ``-`` for missing scores.

    The score of a method without bits is repeated at all bits of its subject. The score in full
    precision is repeated for all subjects of its model.

    Args:
        table: scores of one section and metric.
        text: formats a mean and a standard deviation (NaN for one seed).
    """
    stats = over_seeds(table, ["subject", "method", "row", "bits"])
    stats["text"] = [text(row.mean, row.sd) for row in stats.itertuples()]
    columns = {}
    for subject, model, bits in scores.columns_of(cells):
        subjects = np.where(stats["method"] == "fp", model, subject)
        own = (stats["subject"] == subjects) & stats["bits"].isin([bits, FULL])
        name = f"{subject} {bits}" if bits != FULL else subject
        columns[name] = stats[own].set_index("row")["text"]
    rows = pd.Index(scores.rows_of(cells), name="method")
    return pd.DataFrame(columns, index=rows).fillna("-")


def data_lines(measured: Items) -> list[str]:
    """Return one line per data set and split, with the numbers of samples."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for record in sorted((item.record for item in measured), key=lambda record: record.n):
        text = scores.sample_counts(record.n, record.dataset.captions)
        found.setdefault((record.dataset.name, record.dataset.split), {})[text] = None
    return [
        f"Data: {name}, split {split}, n = {'; '.join(texts)}."
        for (name, split), texts in sorted(found.items())
    ]


def _spread_lines(by_mark: dict[str, pd.DataFrame], table: pd.DataFrame) -> list[str]:
    """Return lines on the spread over seeds by scope, and on the error of one cell."""
    if table.empty:
        return []
    texts = []
    form, unit = _form(table["metric"].iloc[0])
    for mark, rows in by_mark.items():
        stats = over_seeds(rows)
        stats = stats[stats["seeds"] > 1].assign(freedom=lambda found: found["seeds"] - 1)
        stats["squares"] = stats["freedom"] * stats["sd"] ** 2
        for bits, group in stats.groupby("bits", sort=False):
            sums = group.groupby("method")[["squares", "freedom"]].sum()
            pooled = (sums["squares"] / sums["freedom"]) ** 0.5
            spreads = [f"{method} {pooled[method]:{form}}" for method in in_order(pooled.index)]
            name = "full precision" if bits == FULL else bits
            texts.append(f"{name}{mark}: {', '.join(spreads)}")
    lines = []
    if texts:
        named = f", in {unit}" if unit else ""
        lines.append(f"Sd over seeds, pooled over models{named}: {'; '.join(texts)}.")
    elif (table["method"] != "fp").any():
        lines.append("Sd over seeds: unknown, since there is only one seed.")
    return [*lines, sampling_line(table["stderr"], table["metric"].iloc[0])]


def _form(metric: str) -> tuple[str, str]:
    """Return the format and the unit of errors of a metric."""
    return (".2g", UNITS[metric]) if metric in UNITS else (".2f", "points")


def sampling_line(errors: "pd.Series[float]", metric: str = "") -> str:
    """Return the line on the standard errors of single cells."""
    form, unit = _form(metric)
    most = f"{errors.max():{form}} {unit}".rstrip()
    return (
        f"Standard error of one cell from its finite number of samples: {errors.min():{form}} to "
        f"{most}. Methods are measured on the same samples, so the errors of "
        "their differences are smaller."
    )


def _mean_over_models(table: pd.DataFrame, mark: str) -> pd.DataFrame:
    """Return methods × bits: means over the models that have all methods, for a fair comparison."""
    stats = over_seeds(table[table["bits"] != FULL])
    columns = {}
    for bits, here in stats.groupby("bits", sort=False):
        means = here.pivot(index="model", columns="method", values="mean").dropna()
        if len(means):
            name = f"{bits}{mark} ({scores.count(len(means), 'model')})"
            form = "{:.3g}" if stats["metric"].iloc[0] in UNITS else "{:.2f}"
            columns[name] = means.mean().map(form.format)
    return pd.DataFrame(columns)
