"""Text from elsewhere (names of models, messages of libraries, files) as a terminal may show it."""

import sys

from rich.console import Console


def plain(text: str, most: int | None = None) -> str:
    """Return ``text`` in one line and without control characters, cut to ``most`` characters.

    Blanks of all kinds become one blank; what else is not printable (escape sequences, marks that turn the writing's direction,
    halves of surrogate pairs) becomes U+FFFD.
    """
    line = printable(" ".join(text.split()))
    return line if most is None or len(line) <= most else line[: most - 1] + "…"


def printable(line: str) -> str:
    """Return a line with U+FFFD for every character that is not printable; blanks stay as they are."""
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def terminal_width() -> int | None:
    """Return the terminal's width; None where the output goes elsewhere."""
    return Console().width if sys.stdout.isatty() else None
