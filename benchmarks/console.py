"""Texts in the output of all commands: sizes, durations, cells of Markdown and CSV tables."""

import math
import sys

from rich.console import Console

from fimaq_core.terminal import one_line

#: Sign that makes a text of a cell in a spreadsheet, and the first signs of texts that need it.
_TEXT = "'"
_SIGNS = tuple(f"=+-@\t\r\n＝＋－＠{_TEXT}")


def terminal_width() -> int | None:
    """Return the columns of the terminal; None if the output is no terminal."""
    return Console().width if sys.stdout.isatty() else None


def size_text(size: float) -> str:
    """Return bytes as text, such as ``1.6 GB`` (1 GB is 10⁹ bytes)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """Return seconds as text: ``0.05 s``, ``24 s``, ``6 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{round(seconds, 2):.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def share_text(percent: float) -> str:
    """Return a percentage with one decimal, ``100.0`` only if nothing is missing."""
    return f"{math.floor(10 * percent) / 10:.1f}"


def markdown_cell(text: object) -> str:
    """Return a text as one line that stays in its cell of a Markdown table."""
    return one_line(str(text)).replace("|", r"\|")


def csv_cell(value: object) -> object:
    """Return a value for a CSV file. Spreadsheets take no text for a formula; see `csv_value`."""
    if isinstance(value, str) and value.startswith(_SIGNS):
        return _TEXT + value
    return value


def csv_value(cell: object) -> object:
    """Return the value of a cell that `csv_cell` made."""
    if isinstance(cell, str) and cell.startswith(_TEXT) and cell[1:].startswith(_SIGNS):
        return cell[1:]
    return cell
