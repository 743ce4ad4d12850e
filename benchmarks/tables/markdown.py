"""Tables as Markdown, for files and terminals."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import pandas as pd

T = TypeVar("T")


def markdown(table: pd.DataFrame, words: Sequence[str] = ()) -> str:
    """Return a table as Markdown; the columns ``words`` hold words, all others numbers."""
    sides = ["left" if name in words else "right" for name in table.columns]
    align = ("left", *sides)
    return str(table.to_markdown(disable_numparse=True, stralign="right", colalign=align))


def fitting(table: pd.DataFrame, width: int | None, words: Sequence[str] = ()) -> list[str]:
    """Return a table as Markdown in as few parts as fit ``width`` (None: one part)."""
    return [markdown(part, words) for part in cut(table, width, words)]


def cut(table: pd.DataFrame, width: int | None, words: Sequence[str] = ()) -> list[pd.DataFrame]:
    """Return the parts of a table whose Markdown fits ``width``; see :func:`fitting`."""

    def fits(columns: list[str]) -> bool:
        return width is None or len(markdown(table[columns], words).split("\n")[0]) <= width

    return [table[part] for part in runs(list(table.columns), fits)]


def runs(items: Sequence[T], fits: Callable[[list[T]], bool]) -> list[list[T]]:
    """Return items in the longest runs that fit, or of one item that does not fit by itself."""
    parts: list[list[T]] = [[]]
    for item in items:
        if parts[-1] and not fits([*parts[-1], item]):
            parts.append([])
        parts[-1].append(item)
    return parts
