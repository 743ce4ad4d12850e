"""Terminal output of all commands: user errors, unprintable text, sizes and durations."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console

from fimaq_core.errors import FimaqError


@contextmanager
def user_errors(context: click.Context, interrupted: str) -> Iterator[None]:
    """Print the message of user errors on stderr and exit with 2; exit with 130 after Ctrl-C.

    ``interrupted`` is the sentence that Ctrl-C prints.
    """
    try:
        yield
        return
    except FimaqError as error:
        click.echo(f"error: {error}", err=True)
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted. {interrupted}", err=True)
        context.exit(130)
    except BrokenPipeError:
        # The reader of the output is gone (`| head`); without this, Python complains at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    context.exit(2)


def plain(text: str, most: int | None = None) -> str:
    """Return ``text`` as one printable line of at most ``most`` (None: any) characters."""
    line = printable(" ".join(text.split()))
    return line if most is None or len(line) <= most else line[: most - 1] + "…"


def printable(line: str) -> str:
    """Return a line with U+FFFD in place of each unprintable character, such as ESC."""
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


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
