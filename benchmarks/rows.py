"""Running cells and their counts as a terminal of any width and height shows them."""

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from benchmarks.estimate import time_left
from benchmarks.status.state import Counts, RunningCell
from benchmarks.terminal import plain
from benchmarks.units import duration

#: Columns of words, which give way where the terminal is narrow: to the first widths, then to the second. Numbers do not.
_WORDS = ({"cell": 30, "where": 7, "stage": 9, "block": 6}, {"cell": 16, "where": 5, "stage": 6, "block": 6})
_NUMBERS = ("progress", "loss", "left")

#: What is left out of rows that are too long all the same, in this order.
_LEAST = ("where", "block", "loss", "stage", "progress", "left")

_GAP = 2

#: Width of a row's bar, where the terminal has room for it.
_BAR = 16


def counts_line(counts: Counts, elapsed: float, left: float | None, width: int) -> RenderableType:
    """Return a bar and what it means, side by side, or below each other in a narrow terminal."""
    ended = counts.done + counts.failed
    words = f"{counts.done} done, {counts.running} running, {counts.failed} failed of {counts.total} cells, {duration(elapsed)}"
    if ended < counts.total:
        words += f", {time_left(left)}"
    text = Text(words, style="bold")
    room = width - cell_len(words) - 1
    bar = ProgressBar(max(counts.total, 1), min(ended, counts.total), width=min(max(room, 10), 40, width))
    table = Table.grid(padding=(0, 1, 0, 0))
    if room < 10:
        table.add_row(bar)
        table.add_row(text)
    else:
        table.add_row(bar, text)
    return table


def running_table(cells: Sequence[RunningCell], width: int, lines: int | None = None) -> RenderableType:
    """Return a row a cell, one line each, in at most ``width`` columns; ``×2`` behind a name: its second attempt.

    Args:
        cells: the cells, which may hold anything: it is shown as text.
        width: of the terminal.
        lines: that there is room for; the last tells how many cells have none. None: for all.
    """
    shown = cells if lines is None or len(cells) <= lines else cells[: max(lines - 1, 0)]
    rows = [_texts(cell) for cell in shown]
    widths = _widths(rows, width)
    bars = bool(widths) and sum(widths.values()) + _GAP * len(widths) + _BAR <= width
    table = Table.grid(padding=(0, _GAP, 0, 0))
    for name, wide in widths.items():
        table.add_column(width=wide, no_wrap=True, justify="right" if name in _NUMBERS else "left")
        if bars and name == "progress":
            table.add_column(width=_BAR)
    for cell, row in zip(shown, rows, strict=True):
        parts: list[RenderableType] = []
        for name, wide in widths.items():
            parts.append(Text(_fit(row[name], wide)))
            if bars and name == "progress":
                known = cell.total > 0
                parts.append(ProgressBar(max(cell.total, 1), min(cell.done, cell.total), width=_BAR) if known else Text())
        table.add_row(*parts)
    rest = len(cells) - len(shown)
    return Group(table, Text(f"… and {rest} more")) if rest else table


def _texts(cell: RunningCell) -> dict[str, str]:
    again = f" ×{cell.attempts}" if cell.attempts > 1 else ""
    return {
        "cell": plain(cell.label) + again,
        "where": plain(cell.where),
        "stage": plain(cell.stage),
        "block": plain(cell.block),
        "progress": f"{cell.done}/{cell.total}" if cell.total else "",
        "loss": "" if cell.loss is None else f"{cell.loss:.4g}",
        "left": "" if cell.left is None else duration(cell.left),
    }


def _widths(rows: Sequence[dict[str, str]], width: int) -> dict[str, int]:
    """Widths of the columns that hold something: the widest words give way first."""
    widths = {name: max((cell_len(row[name]) for row in rows), default=0) for name in (*_WORDS[0], *_NUMBERS)}
    widths = {name: wide for name, wide in widths.items() if wide}

    def excess() -> int:
        return sum(widths.values()) + _GAP * (len(widths) - 1) - width

    for floors in _WORDS:
        while excess() > 0 and (words := [name for name in widths if widths[name] > floors.get(name, widths[name])]):
            widths[max(words, key=lambda name: widths[name] - floors[name])] -= 1
    for name in _LEAST:
        if excess() > 0:
            widths.pop(name, None)
    return widths


def _fit(text: str, wide: int) -> str:
    return text if cell_len(text) <= wide else set_cell_size(text, max(wide - 1, 0)) + "…"
