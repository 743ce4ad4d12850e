"""The view of a running grid where there is no terminal: lines."""

import time

from rich.console import Console

from benchmarks.board import Board
from benchmarks.cells import Cell, Key
from benchmarks.display import Outcome
from benchmarks.estimate import time_left
from fimaq_core.progress import Progress


class PlainView(Board):
    """One line when a cell starts, one when it ends or goes back to those that wait, and one a minute while it runs."""

    def __init__(self, console: Console, every: float = 60.0) -> None:
        super().__init__()
        self._console, self._every = console, every
        self._spoke: dict[Key, float] = {}

    def _say(self, cell: Cell, text: str) -> None:
        self._spoke[cell.key] = time.monotonic()
        self._console.print(self.line(cell, text), markup=False, soft_wrap=True)

    def started(self, cell: Cell, done: int, where: str) -> None:
        super().started(cell, done, where)
        self._say(cell, f"started ({where})" if where else "started")

    def progress(self, cell: Cell, progress: Progress) -> None:
        super().progress(cell, progress)
        if time.monotonic() - self._spoke.get(cell.key, 0.0) >= self._every:
            place = " ".join(part for part in (progress.stage, progress.block) if part)
            loss = "" if progress.loss is None else f", loss {progress.loss:.4g}"
            self._say(cell, f"{place} {progress.done}/{progress.total}{loss}")

    def retried(self, cell: Cell, reason: str) -> None:
        super().retried(cell, reason)
        self._say(cell, f"waits again: {reason}")

    def ended(self, cell: Cell, outcome: Outcome, done: int, left: float | None) -> None:
        super().ended(cell, outcome, done, left)
        self._say(cell, outcome.line if self.over else f"{outcome.line}, {time_left(self.left)}")
