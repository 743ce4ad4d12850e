"""View of a running grid: a table in a terminal, lines elsewhere."""

import math
import os
import socket
import time
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
from benchmarks.watch.events import Event, EventLog, State
from fimaq_core.progress import Progress

#: Columns of the table of running cells, and the terminal width from which each is shown.
_COLUMNS = {"cell": 0, "where": 100, "stage": 56, "progress": 0, "loss": 72, "left": 0}
#: Fields that identify a cell of the grid.
_KEY = ("section", "model", "scope", "method", "bits", "seed", "point")


class Watch:
    """Shows the events of a run on a console, and writes them to a file for ``status``.

    Example:
        >>> watch = Watch(Console())
        >>> watch.tell("begin", over=0, total=3)
        >>> watch.close()
    """

    def __init__(
        self, console: Console, folder: Path | None = None, engine: str = "", every: float = 60.0
    ) -> None:  # fmt: skip
        """Make a watch. Events go to a new file in `folder`; None: no file.

        `engine` is the name of the cell executor. `every` is the number of seconds between two
        lines about a running cell if there is no terminal.
        """
        self.state = State()
        self._console, self._engine, self._every = console, engine, every
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(self, console=console, refresh_per_second=2, vertical_overflow="crop")
        self._log = None if folder is None else EventLog(folder, self._print)
        self._last_lines: dict[str, float] = {}  # Unix times by label

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # In a narrow terminal the counts take up to three lines, and the cursor takes one.
        lines = max(console.size.height - 4, 1)
        yield state_view(self.state, time.time(), options.max_width, lines)

    def tell(self, kind: str, cell: Cell | None = None, **facts: Any) -> None:
        """Take an event of a cell, or of the run. `facts` are fields of `events.Event`."""
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
        if text := self._text(event):
            self._last_lines[event.label] = event.time
            total = str(self.state.total)
            self._print(f"[{self.state.over:{len(total)}d}/{total}] {event.label}: {text}")

    def progress(self, cell: Cell, progress: Progress) -> None:
        """Take the progress of a running cell."""
        loss = progress.loss if math.isfinite(progress.loss or 0.0) else None
        done, total = max(progress.done, 0), max(progress.total, 0)
        place = {"stage": progress.stage, "block": progress.block}
        self.tell("progress", cell, **place, done=done, total=total, loss=loss)

    def close(self) -> None:
        """End the view, because the run has ended or was stopped."""
        try:
            self.tell("close")
        finally:
            if self._live is not None:
                self._live.stop()

    def _text(self, event: Event) -> str:
        """Return the text of a line about a cell; empty if the event is not printed."""
        has_lines = self._live is None
        if event.kind == "retried":
            return f"waits again: {event.text}"
        if event.kind == "ended":
            text = f"FAILED: {event.text}" if event.outcome == "failed" else event.text
            is_last = not has_lines or self.state.over >= self.state.total
            return text if is_last else f"{text}, {time_left(event.left)}"
        if event.kind == "started" and has_lines:
            return f"started ({event.where})" if event.where else "started"
        last = self._last_lines.get(event.label, 0.0)
        if event.kind == "progress" and has_lines and event.time - last >= self._every:
            loss = "" if event.loss is None else f", loss {event.loss:.4g}"
            return f"{_place(event)} {event.done}/{event.total}{loss}"
        return ""

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=self._live is None)


def state_view(state: State, now: float, width: int, lines: int | None = None) -> RenderableType:
    """Return the counts of a grid and the table of its running cells at the Unix time `now`.

    `width` is the number of columns. `lines` limits the lines of the table; None: one per cell.
    """
    began = now if state.begin is None else state.begin.time
    words = (
        f"{state.done} done, {len(state.running)} running, {state.failures} failed of "
        f"{state.total} cells, {duration(max(now - began, 0.0))}"
    )
    if state.over < state.total:
        words += f", {time_left(state.left(now))}"
    counts = Table.grid(padding=(0, 1, 0, 0))
    room = min(max(width - len(words) - 2, 4), 40)
    bar = ProgressBar(max(state.total, 1), min(state.over, state.total), width=room)
    counts.add_row(bar, Text(words, style="bold"))
    cells = list(state.running.values())
    shown = cells if lines is None or len(cells) <= lines else cells[: max(lines - 1, 0)]
    rows = [_row(state, started, now) for started in shown]
    columns = [name for name, least in _COLUMNS.items() if width >= least]
    columns = [name for name in columns if any(row[name] for row in rows)]
    table = Table.grid(padding=(0, 2, 0, 0))
    for name in columns:  # in a narrow terminal, rich shortens texts but not numbers
        is_number = name in ("progress", "loss", "left")
        table.add_column(no_wrap=is_number, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(Text(row[name], no_wrap=True, overflow="ellipsis") for name in columns))
    parts: list[RenderableType] = [counts, table] if rows else [counts]
    if len(shown) < len(cells):
        parts.append(Text(f"… and {len(cells) - len(shown)} more"))
    return Group(*parts)


def _row(state: State, started: Event, now: float) -> dict[str, str]:
    """Return the texts of a running cell, by column."""
    label = started.label
    at, left, attempts = state.progress[label], state.left(now, label), state.attempts[label]
    return {
        "cell": f"{label} ×{attempts}" if attempts > 1 else label,
        "where": started.where,
        "stage": _place(at),
        "progress": f"{at.done}/{at.total}" if at.total else "",
        "loss": "" if at.loss is None else f"{at.loss:.4g}",
        "left": "" if left is None else duration(left),
    }


def _place(event: Event) -> str:
    return " ".join(part for part in (event.stage, event.block) if part)
