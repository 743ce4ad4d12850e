"""What is known of a running grid at a moment: the bookkeeping behind the views."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.cells import Cell, Key
from benchmarks.display import Outcome
from benchmarks.status.state import CellKey, Counts, RunningCell
from benchmarks.terminal import plain
from fimaq_core.progress import Progress

#: Characters of a name and of a message that are kept.
NAME, MESSAGE = 200, 2000


@dataclass
class _Row:
    cell: Cell
    where: str
    since: float
    progress: Progress | None = None
    left: float | None = None


class Board:
    """Keeps count of what a runner says; a :class:`~benchmarks.display.Display` that shows nothing by itself.

    Another thread may read it: each value is replaced as a whole.
    """

    def __init__(self) -> None:
        self._rows: dict[Key, _Row] = {}
        self._attempts: Counter[Key] = Counter()
        self._over = self._total = self._failed = 0
        self._left: float | None = None
        self._began = time.monotonic()

    def begin(self, done: int, total: int) -> None:
        self._over, self._total, self._began = done, total, time.monotonic()

    def started(self, cell: Cell, done: int, where: str) -> None:
        self._over = done
        self._attempts[cell.key] += 1
        self._rows[cell.key] = _Row(cell, where, time.monotonic())

    def progress(self, cell: Cell, progress: Progress) -> None:
        row = self._rows.get(cell.key)
        if row is not None:
            row.progress = progress

    def retried(self, cell: Cell, reason: str) -> None:
        self._rows.pop(cell.key, None)

    def ended(self, cell: Cell, outcome: Outcome, done: int, left: float | None) -> None:
        self._rows.pop(cell.key, None)
        self._over, self._left = done, left
        self._failed += outcome.kind == "failed"

    def tick(self, left: float | None, cells: Mapping[Key, float | None]) -> None:
        self._left = left
        for key, seconds in cells.items():
            row = self._rows.get(key)
            if row is not None:
                row.left = seconds

    def close(self) -> None:
        self._rows.clear()

    @property
    def elapsed(self) -> float:
        """Seconds since the grid began."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float | None:
        """Seconds until the grid is done; None where nothing is known."""
        return _known(self._left)

    @property
    def over(self) -> bool:
        """Whether no cell is left."""
        return self._over >= self._total

    def counts(self) -> Counts:
        """Return how many cells are how far."""
        return Counts(
            done=max(self._over - self._failed, 0), running=len(self._rows), failed=self._failed, total=max(self._total, 0)
        )

    def running(self) -> list[RunningCell]:
        """Return the running cells, the longest at work first."""
        now = time.monotonic()
        return [_running(row, now, self._attempts[key]) for key, row in list(self._rows.items())]

    def line(self, cell: Cell, text: str) -> str:
        """Return a line about a cell behind the count: ``[ 3/10] label: text``."""
        width = len(str(self._total))
        return f"[{self._over:{width}d}/{self._total}] {plain(cell.label, NAME)}: {plain(text, MESSAGE)}"


def _running(row: _Row, now: float, attempts: int) -> RunningCell:
    cell, place = row.cell, row.progress or Progress("starting", 0, 0)
    key = CellKey(
        section=plain(cell.section), model=plain(cell.model), scope=plain(cell.scope), method=plain(cell.method), bits=cell.bits,
        seed=cell.seed, point=plain(cell.point),
    )  # fmt: skip
    return RunningCell(
        label=plain(cell.label, NAME), key=key, where=plain(row.where, NAME), stage=plain(place.stage, NAME),
        block=plain(place.block, NAME), done=max(place.done, 0), total=max(place.total, 0),
        loss=place.loss if place.loss is not None and math.isfinite(place.loss) else None,
        seconds=max(now - row.since, 0.0), left=_known(row.left), attempts=attempts,
    )  # fmt: skip


def _known(seconds: float | None) -> float | None:
    return max(seconds, 0.0) if seconds is not None and math.isfinite(seconds) else None
