"""Tables of scores as Markdown."""

from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from benchmarks.cells import Cell
from benchmarks.results.scores import FULL, Measured, in_order, over_seeds, scores, unique, value_text


def frame(measured: Iterable[Measured], subjects: bool = False) -> pd.DataFrame:
    table = scores(measured)
    return table.assign(model=table["subject"]) if subjects else table


def with_bits(table: pd.DataFrame) -> pd.DataFrame:
    from tasks.common.record import bits_name

    names = [bits_name(int(w), int(a)) for w, a in zip(table["w_bit"], table["a_bit"], strict=True)]
    return table.assign(bits=names)


def quantized(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["bits"] != FULL]


def wide(task_table: pd.DataFrame, cells: Sequence[Cell], text: Callable[[float, float], str] = value_text) -> pd.DataFrame:
    """Return the table for people: methods as rows, ``subject bits`` as columns, ``-`` where nothing is measured.

    What has no bits (full precision, methods that quantize nothing) shows its one value under all bits of its subject, and
    full precision, which has no scope, under all subjects of its model.

    Args:
        task_table: rows of one section and metric with subjects (see :func:`frame`), one variant a method and subject.
        cells: the cells the table should cover, measured or not; they give the order.
        text: of a mean and a standard deviation (NaN for one seed).
    """
    texts_by_key = {
        (row["model"], row["method"], row["bits"]): text(row["mean"], row["sd"])
        for row in over_seeds(task_table).to_dict("records")
    }
    methods = in_order(cell.method for cell in cells)
    without_bits = {cell.method for cell in cells if cell.bits == FULL}
    columns: dict[str, list[str]] = {}
    for model in unique(cell.model for cell in cells):
        mine = [cell for cell in cells if cell.model == model]
        for subject in unique(cell.subject for cell in mine if cell.method != "fp") or [model]:
            widths = unique(cell.bits for cell in mine if cell.subject == subject and cell.bits != FULL) or [FULL]
            for bits in widths:
                keys = [
                    (model if method == "fp" else subject, method, FULL if method in without_bits else bits) for method in methods
                ]
                columns[f"{subject} {bits}" if bits != FULL else subject] = [texts_by_key.get(key, "-") for key in keys]
    return pd.DataFrame(columns, index=pd.Index(methods, name="method"))


def markdown(table: pd.DataFrame, words: Sequence[str] = ()) -> str:
    """Return a wide table as Markdown; columns in ``words`` hold words, all others numbers."""
    sides = ["left" if name in words else "right" for name in table.columns]
    return str(table.to_markdown(disable_numparse=True, stralign="right", colalign=("left", *sides)))


def fitting(table: pd.DataFrame, width: int | None, words: Sequence[str] = ()) -> list[str]:
    """Return the table as Markdown, cut between columns into as few parts as fit ``width`` (None: one part)."""
    return [markdown(part, words) for part in cut(table, width, words)]


def cut(table: pd.DataFrame, width: int | None, words: Sequence[str] = ()) -> list[pd.DataFrame]:
    """Return the parts of a table whose Markdown fits ``width``; see :func:`fitting`."""
    parts: list[list[str]] = [[]]
    for column in table.columns:
        wider = [*parts[-1], column]
        if width is not None and parts[-1] and len(markdown(table[wider], words).split("\n")[0]) > width:
            parts.append([column])
        else:
            parts[-1] = wider
    return [table[part] for part in parts]
