"""Terminal of all commands: errors with exit code 2, text from elsewhere, sizes, durations."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console

from fimaq_core.errors import FimaqError


class NotReady(FimaqError):
    """The run cannot start; the text holds whole error lines, printed as they are."""


@contextmanager
def user_errors(context: click.Context, broken_off: str) -> Iterator[None]:
    """Turn such an error into one line on stderr and exit code 2; a command that is broken off exits with 130.

    Args:
        context: of the command.
        broken_off: what is kept then.
    """
    try:
        yield
        return
    except NotReady as error:
        click.echo(str(error), err=True)
    except FimaqError as error:
        click.echo(f"error: {error}", err=True)
    except KeyboardInterrupt:
        click.echo(f"\nBroken off. {broken_off}", err=True)
        context.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (such as `| head`); Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    context.exit(2)


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


def size_text(size: float) -> str:
    """Return bytes as text, such as ``1.6 GB`` (of 10⁹ bytes)."""
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
