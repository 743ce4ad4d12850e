"""Measuring again what is there: each cell of such a run, and each file that its cells share, is made anew once.

A run that measures again has a name of its own. Beside what it made anew lies a mark with that name, so that other processes of
the run, and those that go on where one was stopped, use it.
"""

import re
import secrets
from collections.abc import Callable
from pathlib import Path

from fimaq_core.files import replaced_whole

_DONE = " done"


def new_name() -> str:
    """A name for a run that measures again."""
    return secrets.token_hex(8)


def is_name(text: str) -> bool:
    """Whether the text is such a name."""
    return re.fullmatch(r"[0-9a-f]{16}", text) is not None


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}.forced")


def _read(path: Path) -> str:
    try:
        return _mark(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _write(path: Path, text: str) -> None:
    with replaced_whole(_mark(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_done(path: Path, force: str) -> bool:
    """Whether the file is there and is not to be made again by the run named ``force``."""
    return path.is_file() and (not force or _read(path) == force + _DONE)


def is_begun(path: Path, force: str) -> bool:
    """Whether nothing is left of ``path`` from before the run named ``force``; without a name nothing need go."""
    return not force or _read(path) in (force, force + _DONE)


def begin(path: Path, force: str, clear: Callable[[], None]) -> None:
    """Let ``clear`` remove what is there from before the run named ``force``, once. Only with the lease of ``path``."""
    if not is_begun(path, force):
        clear()
        _write(path, force)


def end(path: Path, force: str) -> None:
    """Note that the run named ``force`` has made ``path``; nothing without a name."""
    if force:
        _write(path, force + _DONE)
