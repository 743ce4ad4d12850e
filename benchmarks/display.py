"""What a running grid shows, and where: a terminal, lines of a log, a file that other processes read."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from rich.console import Console

from benchmarks.cells import Cell, Key
from fimaq_core.progress import Progress


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        kind: ``elsewhere``: another runner measured it.
        text: what was measured, why it failed, or who measured it.
        log: where the details of a failure are.
    """

    kind: Literal["finished", "failed", "elsewhere"]
    text: str
    log: Path | None = None

    @property
    def line(self) -> str:
        """The text as it stands behind the cell's name."""
        return f"FAILED: {self.text}" if self.kind == "failed" else self.text


class Display(Protocol):
    """Told by the runner what happens."""

    def begin(self, done: int, total: int) -> None:
        """The grid starts; ``done`` of ``total`` cells were finished before."""

    def started(self, cell: Cell, done: int, where: str) -> None:
        """A cell is started; ``where`` says on what, for people. ``done`` cells are over by now, well or not."""

    def progress(self, cell: Cell, progress: Progress) -> None:
        """A running cell says where it is."""

    def retried(self, cell: Cell, reason: str) -> None:
        """A running cell was lost and goes back to those that wait."""

    def ended(self, cell: Cell, outcome: Outcome, done: int, left: float | None) -> None:
        """A cell is over, well or not; ``left`` is the estimate in seconds for the rest of the grid."""

    def tick(self, left: float | None, cells: Mapping[Key, float | None]) -> None:
        """Time has passed; ``cells`` are the seconds left of each running cell, None where nothing is known."""

    def close(self) -> None:
        """The grid is over, or was broken off."""


def make_display(console: Console, state: Path | None = None, engine: str = "") -> Display:
    """Return the display that suits where the output goes.

    Args:
        console: where people read.
        state: folder (``<results>/runs/.state``) for the file from which ``python -m benchmarks status`` reads; None: no file.
        engine: what runs the cells, for that file.
    """
    from benchmarks.live_view import LiveView
    from benchmarks.plain_view import PlainView
    from benchmarks.status.writer import StateWriter

    view: Display = LiveView(console) if console.is_terminal else PlainView(console)
    if state is None:
        return view

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    return Several([view, StateWriter(state, say, engine)])


class Several:
    """Several displays as one."""

    def __init__(self, displays: Sequence[Display]) -> None:
        self._displays = displays

    def begin(self, done: int, total: int) -> None:
        for display in self._displays:
            display.begin(done, total)

    def started(self, cell: Cell, done: int, where: str) -> None:
        for display in self._displays:
            display.started(cell, done, where)

    def progress(self, cell: Cell, progress: Progress) -> None:
        for display in self._displays:
            display.progress(cell, progress)

    def retried(self, cell: Cell, reason: str) -> None:
        for display in self._displays:
            display.retried(cell, reason)

    def ended(self, cell: Cell, outcome: Outcome, done: int, left: float | None) -> None:
        for display in self._displays:
            display.ended(cell, outcome, done, left)

    def tick(self, left: float | None, cells: Mapping[Key, float | None]) -> None:
        for display in self._displays:
            display.tick(left, cells)

    def close(self) -> None:
        with ExitStack() as stack:  # one that cannot close must not keep the others open
            for display in reversed(self._displays):
                stack.callback(display.close)
