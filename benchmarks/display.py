"""What a running grid shows: bars in a terminal, plain lines elsewhere."""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from benchmarks.cells import Cell, Key
from benchmarks.estimate import duration
from fimaq_core.progress import Progress


class Display(Protocol):
    """Told by the runner what happens."""

    def begin(self, done: int, total: int) -> None:
        """The grid starts; ``done`` of ``total`` cells were finished before."""

    def started(self, cell: Cell, done: int) -> None:
        """A worker starts on a cell."""

    def progress(self, cell: Cell, progress: Progress) -> None:
        """A running cell says where it is."""

    def ended(self, cell: Cell, outcome: str, done: int, left: float | None) -> None:
        """A cell is over, well or not; ``left`` is the estimate in seconds."""

    def tick(self, left: float | None) -> None:
        """Time has passed."""

    def close(self) -> None:
        """The grid is over, or was broken off."""


def make_display(console: Console) -> Display:
    """Return the display that suits where the output goes."""
    return BarDisplay(console) if console.is_terminal else PlainDisplay(console)


def _left(left: float | None) -> str:
    return "time left not known yet" if left is None else f"about {duration(left)} left"


def _place(progress: Progress) -> str:
    return " ".join(part for part in (progress.stage, progress.block) if part)


def _loss(progress: Progress, before: str) -> str:
    return "" if progress.loss is None else f"{before}loss {progress.loss:.4g}"


class PlainDisplay:
    """One line when a cell starts, one when it ends, and one a minute while it runs."""

    def __init__(self, console: Console, every: float = 60.0) -> None:
        self._console, self._every = console, every
        self._total = self._done = 0
        self._spoke: dict[Key, float] = {}

    def _line(self, cell: Cell, text: str) -> None:
        self._spoke[cell.key] = time.monotonic()
        width = len(str(self._total))
        self._console.print(f"[{self._done:{width}d}/{self._total}] {cell.label}: {text}", markup=False, soft_wrap=True)

    def begin(self, done: int, total: int) -> None:
        self._done, self._total = done, total

    def started(self, cell: Cell, done: int) -> None:
        self._done = done
        self._line(cell, "started")

    def progress(self, cell: Cell, progress: Progress) -> None:
        if time.monotonic() - self._spoke.get(cell.key, 0.0) >= self._every:
            self._line(cell, f"{_place(progress)} {progress.done}/{progress.total}{_loss(progress, ', ')}")

    def ended(self, cell: Cell, outcome: str, done: int, left: float | None) -> None:
        self._done = done
        self._line(cell, outcome + (f", {_left(left)}" if done < self._total else ""))

    def tick(self, left: float | None) -> None:
        pass

    def close(self) -> None:
        pass


class BarDisplay:
    """A bar for the grid and one for each running cell; ended cells scroll by above."""

    def __init__(self, console: Console) -> None:
        self._overall = Bars(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"), console=console,
        )  # fmt: skip
        self._task = self._overall.add_task("cells", total=None, note="")
        self._rows: dict[Key, TaskID] = {}
        self._width = 1
        self._total = 0

    def begin(self, done: int, total: int) -> None:
        self._total, self._width = total, len(str(total))
        self._overall.update(self._task, completed=done, total=total, note=_left(None))
        self._overall.start()

    def started(self, cell: Cell, done: int) -> None:
        row = self._overall.add_task(cell.label, total=None, note="starting")
        self._rows[cell.key] = row

    def progress(self, cell: Cell, progress: Progress) -> None:
        row = self._rows.get(cell.key)
        if row is not None:
            self._overall.update(row, completed=progress.done, total=progress.total, note=_place(progress) + _loss(progress, " "))

    def ended(self, cell: Cell, outcome: str, done: int, left: float | None) -> None:
        row = self._rows.pop(cell.key, None)
        if row is not None:
            self._overall.remove_task(row)
        self._overall.console.print(f"[{done:{self._width}d}/{self._total}] {cell.label}: {outcome}", markup=False)
        self._overall.update(self._task, completed=done, note=_left(left) if done < self._total else "")

    def tick(self, left: float | None) -> None:
        if self._rows:
            self._overall.update(self._task, note=_left(left))

    def close(self) -> None:
        for row in self._rows.values():
            self._overall.remove_task(row)
        self._rows.clear()
        self._overall.stop()
