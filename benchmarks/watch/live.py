"""The view of a running grid: rows in a terminal, lines elsewhere."""

import math
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from benchmarks.console import duration
from benchmarks.costs.estimate import time_left
from benchmarks.grid.cell import Cell
from benchmarks.watch.events import Event, Running, State, left
from benchmarks.watch.log import EventLog
from fimaq_core.progress import Progress

#: Columns of the running cells, and the width of a terminal from which they are shown.
_COLUMNS = {
    "cell": 0, "where": 100, "stage": 56, "block": 72, "progress": 0, "bar": 120, "loss": 72,
    "left": 0,
}  # fmt: skip

#: Fields that tell a cell from the others of its grid.
_KEY = ("section", "model", "scope", "method", "bits", "seed", "point")


class Watch:
    """Told what a run does; shows it on a console, and writes its events for ``status``."""

    def __init__(
        self, console: Console, folder: Path | None = None, engine: str = "", every: float = 60.0
    ) -> None:  # fmt: skip
        """Make a watch.

        Args:
            console: where people read.
            folder: of the files of events (``<results>/runs/.state``); None: no file.
            engine: what runs the cells, for that file.
            every: seconds between two lines about a running cell, where there is no terminal.
        """
        self.state = State()
        self._console, self._engine, self._every = console, engine, every
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(self, console=console, refresh_per_second=2, vertical_overflow="crop")
        self._log = None if folder is None else EventLog(folder, self._print)
        self._spoke: dict[str, float] = {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now, width = time.time(), options.max_width
        yield counts_line(self.state, now, width)
        if self.state.running:
            # The counts take up to three lines of a narrow terminal, and the cursor one.
            lines = max(console.size.height - 4, 1)
            yield running_table(list(self.state.running.values()), now, width, lines)

    def tell(self, kind: str, cell: Cell | None = None, **facts: Any) -> None:
        """Take an event of a kind, about a cell or the whole run; see `Event`."""
        if kind == "begin":
            facts |= {"host": socket.gethostname(), "pid": os.getpid(), "engine": self._engine}
            facts["process_started"] = psutil.Process().create_time()
        if kind == "started" and cell is not None:
            facts["key"] = {name: getattr(cell, name) for name in _KEY}
        label = "" if cell is None else cell.label
        event = Event.model_validate({"kind": kind, "time": time.time(), "label": label, **facts})
        self.state.apply(event)
        if self._log is not None:
            self._log.add(event)
        if kind == "begin" and self._live is not None:
            self._live.start(refresh=True)
        self._say(event)

    def progress(self, cell: Cell, progress: Progress) -> None:
        """A running cell has come this far."""
        loss = progress.loss if math.isfinite(progress.loss or 0.0) else None
        done, total = max(progress.done, 0), max(progress.total, 0)
        place = {"stage": progress.stage, "block": progress.block}
        self.tell("progress", cell, **place, done=done, total=total, loss=loss)

    def close(self) -> None:
        """The run is over, or was broken off."""
        try:
            self.tell("close")
        finally:
            if self._live is not None:
                self._live.stop()

    def _say(self, event: Event) -> None:
        """Print a line about a cell, if the event is worth one."""
        text, lines = "", self._live is None
        if event.kind == "retried":
            text = f"waits again: {event.text}"
        elif event.kind == "ended":
            text = f"FAILED: {event.text}" if event.outcome == "failed" else event.text
            if lines and self.state.over < self.state.total:
                text += f", {time_left(event.left)}"
        elif event.kind == "started" and lines:
            text = f"started ({event.where})" if event.where else "started"
        elif event.kind == "progress" and lines:
            if event.time - self._spoke.get(event.label, 0.0) < self._every:
                return
            place = " ".join(part for part in (event.stage, event.block) if part)
            loss = "" if event.loss is None else f", loss {event.loss:.4g}"
            text = f"{place} {event.done}/{event.total}{loss}"
        if text:
            self._spoke[event.label] = event.time
            width, total = len(str(self.state.total)), self.state.total
            self._print(f"[{self.state.over:{width}d}/{total}] {event.label}: {text}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=self._live is None)


def counts_line(state: State, now: float, width: int) -> RenderableType:
    """Return a bar and its meaning, side by side, or below each other in a narrow terminal."""
    began = now if state.begin is None else state.begin.time
    words = (
        f"{state.done} done, {len(state.running)} running, {state.failures} failed of "
        f"{state.total} cells, {duration(max(now - began, 0.0))}"
    )
    if state.over < state.total:
        words += f", {time_left(left(state, now))}"
    room = width - len(words) - 1
    size = min(max(room, 10), 40, width)
    bar = ProgressBar(max(state.total, 1), min(state.over, state.total), width=size)
    table = Table.grid(padding=(0, 1, 0, 0))
    text = Text(words, style="bold")
    for row in ([bar, text],) if room >= 10 else ([bar], [text]):
        table.add_row(*row)
    return table


def running_table(
    cells: Iterable[Running], now: float, width: int, lines: int | None = None
) -> RenderableType:  # fmt: skip
    """Return one row per cell, one line each; ``×2`` behind a name: its second attempt.

    Args:
        cells: the cells.
        now: Unix time.
        width: of the terminal.
        lines: room for them; the last line counts the cells without room. None: for all.
    """
    cells = list(cells)
    shown = cells if lines is None or len(cells) <= lines else cells[: max(lines - 1, 0)]
    rows = [_row(cell, now) for cell in shown]
    wide = [name for name, least in _COLUMNS.items() if width >= least]
    columns = [name for name in wide if any(row[name] for row in rows)]
    table = Table.grid(padding=(0, 2, 0, 0))
    for name in columns:
        number = name in ("progress", "loss", "left")
        # Columns that may wrap give way in a narrow terminal, where their text is cut.
        most = 14 if name == "stage" and width < 100 else None
        table.add_column(no_wrap=number, justify="right" if number else "left", max_width=most)
    for row in rows:
        table.add_row(*(row[name] or "" for name in columns))
    rest = len(cells) - len(shown)
    return Group(table, Text(f"… and {rest} more")) if rest else table


def _row(cell: Running, now: float) -> dict[str, RenderableType | None]:
    at, rest = cell.progress, left(cell, now)

    def text(words: str) -> Text | None:
        return Text(words, no_wrap=True, overflow="ellipsis") if words else None

    again = f" ×{cell.attempts}" if cell.attempts > 1 else ""
    return {
        "cell": text(cell.started.label + again),
        "where": text(cell.started.where),
        "stage": text(at.stage),
        "block": text(at.block),
        "progress": text(f"{at.done}/{at.total}" if at.total else ""),
        "bar": ProgressBar(at.total, min(at.done, at.total), width=16) if at.total else None,
        "loss": text("" if at.loss is None else f"{at.loss:.4g}"),
        "left": text("" if rest is None else duration(rest)),
    }
