"""Output streams on which no text from a file can control the terminal, and that never fail."""

import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

#: Letters and marks that Unicode counts as printable, but that no font shows.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0]"
)


def printable(text: str) -> str:
    r"""Return ``text`` with an escape in place of each character that is not visible.

    Such characters are control characters, marks of the writing direction, and characters without
    width. Newlines and blanks stay.

    Example:
        >>> printable("\x1b[31m a\u202eb")
        '\\x1b[31m a\\u202eb'
    """
    return "\n".join(
        line if line.isprintable() and not _INVISIBLE.search(line) else "".join(map(_visible, line))
        for line in text.split("\n")
    )


def _visible(sign: str) -> str:
    is_shown = sign.isprintable() and not _INVISIBLE.match(sign)
    if is_shown or unicodedata.category(sign) == "Zs":
        return sign
    return sign.encode("unicode_escape").decode("ascii")


def one_line(text: str, most: int | None = None) -> str:
    """Return ``text`` as one printable line of at most ``most`` (None: any) characters."""
    line = printable(" ".join(text.split()))
    return line if most is None or len(line) <= most else line[: most - 1] + "…"


class Unfailing:
    """Text stream that drops its text when it cannot be written, and notes the first error.

    A character that the encoding lacks becomes a question mark. Nobody misses the text of a closed
    pipe (``| head``), so this is not noted.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # click would write to it directly
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write ``text``."""
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self.stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Send this text and all later text nowhere."""
        if self.error is None and not isinstance(error, BrokenPipeError):
            self.error = error
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


class Guarded(Unfailing):
    """Text stream that shows invisible characters as escapes, see `printable`.

    Attributes:
        direct: the stream without escapes, for `fimaq_core.progress.PrintableConsole`, which makes
            its text printable before it adds colours.
    """

    def __init__(self, stream: TextIO, has_bars: bool) -> None:
        """Guard a stream; ``has_bars`` is True if libraries draw progress bars on it."""
        super().__init__(stream)
        self.direct, self._has_bars = Unfailing(stream), has_bars

    def write(self, text: str) -> int:
        """Write ``text``. Progress bars begin with a carriage return."""
        start = "\r" if self._has_bars and text.startswith("\r") else ""
        return super().write(start + printable(text[len(start) :]))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def problem(self) -> OSError | None:
        """Write what is buffered; return the first error of this stream."""
        self.flush()
        return self.error or self.direct.error


def guard() -> None:
    """Guard the standard output and error streams of this process.

    Closed standard streams become the null device, so that no file opened later gets their text.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
        stream = getattr(sys, name)
        if stream is None:
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
        if number and not isinstance(stream, Guarded):
            stream = Guarded(stream, has_bars=name == "stderr")
        setattr(sys, name, stream)


@contextmanager
def guarded() -> Iterator[None]:
    """Guard the standard streams in this block."""
    before = sys.stdout, sys.stderr
    guard()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
