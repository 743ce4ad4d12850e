"""Tables as papers print them: LaTeX with booktabs, a table a section and axis; methods by bits are rows, models columns."""

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from benchmarks.cells import Cell
from benchmarks.schema import Axes
from benchmarks.summary import PAIRS
from benchmarks.tables import FULL, Measured, frame, in_order, is_percent, main_metric, sample_counts, unique

#: What is not measured.
MISSING = "--"
#: Characters of \footnotesize that a line of an article holds, and rows that its page does; a larger table goes on in another.
WIDTH, HEIGHT = 80, 46
#: Characters of a number, and of the space between columns.
_NUMBER, _SPACE = 6, 2

_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "√": r"\ensuremath{\surd}", "±": r"\ensuremath{\pm}", "→": r"\ensuremath{\to}",
    "↑": r"\ensuremath{\uparrow}", "↓": r"\ensuremath{\downarrow}", "×": r"\ensuremath{\times}",
    "°": r"\ensuremath{^\circ}", "–": "--",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip
#: How metrics are headed whose names are not what papers print.
_HEADS = {"top1": "Top-1", "AP_box": "AP box", "AP_mask": "AP mask", "i2t_R@1": "I→T", "t2i_R@1": "T→I"}

_Column = tuple[str, str]
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Row:
    """A line: its scope where there are several, bits, name, and mean values by column (model and metric)."""

    scope: str
    bits: str
    name: str
    values: Mapping[_Column, float]

    def text(self, column: _Column) -> str:
        return f"{self.values[column]:.2f}" if column in self.values else MISSING


@dataclass(frozen=True)
class _Table:
    """A table: ``head`` is above the names of its rows."""

    label: str
    caption: str
    head: str
    rows: Sequence[_Row]
    models: Sequence[str]
    metrics: Sequence[str]


def escape(text: str) -> str:
    """Return text such that LaTeX prints it as it is."""
    return "".join(_SPECIAL.get(sign, _plain(sign)) for sign in re.sub(r"\s+", " ", text))


def _plain(sign: str) -> str:
    """A character as LaTeX knows it without packages: of others their number, since it would stop at them."""
    return sign if sign.isprintable() and ord(sign) < 256 else f"U+{ord(sign):04X}"


def report(name: str, measured: Sequence[Measured], cells: Sequence[Cell], axes: Axes | None = None) -> str:
    """Return the LaTeX of ``cells``: a table a section that has anything measured, and one an axis and method of it.

    Args:
        name: of the profile, for labels.
        measured: the finished cells.
        cells: the cells the tables cover, measured or not.
        axes: the grid's axes, for the order of their points; None for grids without.
    """
    parts = ["% Made by python -m benchmarks from its records. In the preamble: \\usepackage{booktabs}"]
    for section in unique(cell.section for cell in cells):
        mine = [item for item in measured if item.cell.section == section]
        planned = [cell for cell in cells if cell.section == section]
        if mine:
            tables = [_section_table(name, section, mine, planned), *_axis_tables(name, section, axes or {}, mine, planned)]
            parts += [text for table in tables for text in _texts(table)]
    return "\n\n".join(parts) + "\n"


def _section_table(name: str, section: str, mine: Sequence[Measured], planned: Sequence[Cell]) -> _Table:
    own, cells = [item for item in mine if not item.cell.point], [cell for cell in planned if not cell.point]
    known = frame(mine)
    metrics = [main_metric(cells[0].task, known)]
    for pair in PAIRS.values():
        if set(pair) <= set(known["metric"]):
            metrics = unique([*metrics, *pair])
    rows = _rows(own, cells, in_order(cell.method for cell in cells), lambda cell: [cell.method])
    return _Table(
        f"{name}-{section}",
        _caption(section, metrics, own or mine, rows),
        "Method",
        rows,
        unique(c.model for c in cells),
        metrics,
    )


def _axis_tables(name: str, section: str, axes: Axes, mine: Sequence[Measured], planned: Sequence[Cell]) -> list[_Table]:
    tables = []
    metrics = [main_metric(planned[0].task, frame(mine))]
    for axis, points in axes.items():
        here = [cell for cell in planned if any(place[0] == axis for place in cell.places)]
        for method in unique(cell.method for cell in here):
            cells = [cell for cell in here if cell.method == method]
            keys = {cell.key: cell for cell in cells}
            own = [item for item in mine if item.cell.key in keys]
            if own:
                rows = _rows(own, cells, list(points), functools.partial(_points, axis))
                about = f"{section}, {method} with one setting changed at a time ({axis})"
                caption, models = _caption(about, metrics, own, rows), unique(cell.model for cell in cells)
                tables.append(_Table(f"{name}-{section}-{axis}-{method}", caption, axis, rows, models, metrics))
    return tables


def _points(axis: str, cell: Cell) -> list[str]:
    """Where on an axis a cell stands."""
    return [point for name, point in cell.places if name == axis]


def _rows(
    items: Sequence[Measured], cells: Sequence[Cell], names: Sequence[str], names_of: Callable[[Cell], Sequence[str]]
) -> list[_Row]:
    """Rows of all that is planned: what has no bits first, then by scope, bits and ``names``."""
    values: dict[tuple[str, str, str], dict[_Column, list[float]]] = {}
    for cell in cells:
        for name in names_of(cell):
            values.setdefault((cell.scope, cell.bits, name), {})
    for item in items:
        for name in names_of(item.cell):
            row = values.setdefault((item.cell.scope, item.cell.bits, name), {})
            for metric, found in item.record.metrics.items():
                row.setdefault((item.cell.model, metric), []).append(found.value)
    scopes = unique(scope for scope, bits, _ in values if bits != FULL)
    widths = unique(bits for _, bits, _ in values if bits != FULL)
    order = [("", FULL), *((scope, FULL) for scope in scopes if scope), *((scope, bits) for scope in scopes for bits in widths)]
    shown = len(scopes) > 1
    return [
        _Row(scope if shown and bits != FULL else "", bits, _name(name, scope if shown and bits == FULL else ""),
             {column: fmean(found) for column, found in values[scope, bits, name].items()})
        for scope, bits in order for name in names if (scope, bits, name) in values
    ]  # fmt: skip


def _name(name: str, scope: str) -> str:
    return "Full precision" if name == "fp" else f"{name} [{scope}]" if scope else name


def _caption(about: str, metrics: Sequence[str], items: Sequence[Measured], rows: Sequence[_Row]) -> str:
    sets = unique(
        f"{item.record.dataset.name}, split {item.record.dataset.split} "
        f"({sample_counts(item.record.n, item.record.dataset.captions)})"
        for item in items
    )
    seeds = sorted({item.record.seed for item in items if item.record.seed is not None})
    scopes = unique(item.cell.scope for item in items if item.cell.scope)
    heads = ", ".join(_HEADS.get(metric, metric) for metric in metrics)
    unit = " in percent" if all(is_percent(metric) for metric in metrics) else ""
    parts = [f"{about}: {heads}{unit} on {'; '.join(sets)}."]
    if len(scopes) == 1:
        parts.append(f"Quantized is of each model: {scopes[0]}.")
    if seeds:
        listed = ", ".join(map(str, seeds))
        parts.append(f"Mean over seeds {listed}, as far as each was run." if len(seeds) > 1 else f"Seed {listed}.")
    parts.append("Quantization is simulated.")
    if any(row.bits != FULL for row in rows):
        parts.append("Bold: the best at these bits.")
    return " ".join(parts)


def _texts(table: _Table) -> list[str]:
    """The table, cut between models and bits into as few as fit :data:`WIDTH` and :data:`HEIGHT`."""
    first = max([len("Bits (W/A)") + _SPACE + len(row.name) for row in table.rows], default=0)
    heads = sum(max(_NUMBER, len(_HEADS.get(metric, metric))) + _SPACE for metric in table.metrics)
    widths = [max(len(model) + _SPACE, heads if len(table.metrics) > 1 else _NUMBER + _SPACE) for model in table.models]
    groups = [list(rows) for _, rows in itertools.groupby(table.rows, lambda row: (row.scope, row.bits))]
    parts = itertools.product(_cut(table.models, widths, WIDTH - first), _cut(groups, [len(rows) for rows in groups], HEIGHT))
    return [_text(table, models, rows, number) for number, (models, rows) in enumerate(parts)]


def _cut(items: Sequence[_T], sizes: Sequence[int], limit: int) -> list[list[_T]]:
    """Items in runs of at most ``limit`` together, or of one that is larger."""
    parts: list[list[_T]] = []
    used = 0
    for item, size in zip(items, sizes, strict=True):
        if not parts or used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(item)
        used += size
    return parts


def _text(table: _Table, models: Sequence[str], groups: Sequence[Sequence[_Row]], number: int) -> str:
    columns = [(model, metric) for model in models for metric in table.metrics]
    safe = re.sub(r"[^A-Za-z0-9-]+", "-", table.label) + (f"-{number + 1}" if number else "")
    lines = [
        r"\begin{table}[t]", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{escape(table.caption)}{' Continued.' if number else ''}}}", rf"\label{{tab:{safe}}}", r"\smallskip",
        rf"\begin{{tabular}}{{ll{'r' * len(columns)}}}", r"\toprule", *_head(table, models),
    ]  # fmt: skip
    scope = ""
    for rows in groups:
        lines.append(r"\midrule")
        if rows[0].scope != scope:
            scope = rows[0].scope
            lines.append(rf"\multicolumn{{{len(columns) + 2}}}{{l}}{{\emph{{{escape(scope)}}}}} \\")
        best = _best(rows, columns) if rows[0].bits != FULL else {}
        for place, row in enumerate(rows):
            texts = [row.text(column) for column in columns]
            marked = [
                rf"\textbf{{{text}}}" if text == best.get(column) else text for text, column in zip(texts, columns, strict=True)
            ]
            lines.append(" & ".join(["" if place else _bits(row.bits), escape(row.name), *marked]).strip() + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _head(table: _Table, models: Sequence[str]) -> list[str]:
    metrics = table.metrics
    if len(metrics) == 1:
        return [" & ".join(["Bits (W/A)", escape(table.head), *map(escape, models)]) + r" \\"]
    above = [rf"\multicolumn{{{len(metrics)}}}{{c}}{{{escape(model)}}}" for model in models]
    rules = [rf"\cmidrule(lr){{{3 + len(metrics) * index}-{2 + len(metrics) * (index + 1)}}}" for index in range(len(models))]
    below = [escape(_HEADS.get(metric, metric)) for _ in models for metric in metrics]
    return [
        " & ".join(["", "", *above]) + r" \\",
        "".join(rules),
        " & ".join(["Bits (W/A)", escape(table.head), *below]) + r" \\",
    ]


def _bits(name: str) -> str:
    return "32/32" if name == FULL else name.removeprefix("w").replace("a", "/")


def _best(rows: Sequence[_Row], columns: Sequence[_Column]) -> dict[_Column, str]:
    """The highest value of each column as it is printed, so that equal ones look equal; only where there is a choice."""
    found = {column: [row.text(column) for row in rows if column in row.values] for column in columns}
    return {column: max(texts, key=float) for column, texts in found.items() if len(texts) > 1}
