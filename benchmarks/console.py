"""Sizes, durations and the width of the terminal, for the output of all commands."""

import sys

from rich.console import Console


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
