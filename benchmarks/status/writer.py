"""Writes what a runner does into its state file. Losing the file costs the view of others, never the run."""

import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks.board import MESSAGE, NAME, Board
from benchmarks.cells import Cell, Key
from benchmarks.display import Outcome
from benchmarks.status.reader import remove_old
from benchmarks.status.state import EndedCell, FailedCell, RunnerFacts, State
from benchmarks.terminal import plain
from fimaq_core.errors import FimaqError
from fimaq_core.files import replaced_whole
from fimaq_core.progress import Progress

#: Failed and ended cells that the file names.
_FAILED, _ENDED = 100, 10


class StateWriter(Board):
    """See the module."""

    def __init__(self, folder: Path, say: Callable[[str], None], engine: str = "", every: float = 1.0) -> None:
        """Make a writer; nothing is written before the grid begins.

        Args:
            folder: of the state files of all runners.
            say: tells people, once, if the file cannot be written.
            engine: what runs the cells.
            every: seconds between two writings at least, but for ends of cells.
        """
        super().__init__()
        now = datetime.now(UTC)
        self.path = folder / f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.json"
        self._say, self._every, self._engine = say, every, plain(engine, NAME)
        self._written: float | None = None
        self._broken = False
        self._started = now.timestamp()
        self._process_started = psutil.Process().create_time()
        self._failures: deque[FailedCell] = deque(maxlen=_FAILED)
        self._last: deque[EndedCell] = deque(maxlen=_ENDED)

    def begin(self, done: int, total: int) -> None:
        super().begin(done, total)
        remove_old(self.path.parent)
        self._write()

    def started(self, cell: Cell, done: int, where: str) -> None:
        super().started(cell, done, where)
        self._write_if_due()

    def progress(self, cell: Cell, progress: Progress) -> None:
        super().progress(cell, progress)
        self._write_if_due()

    def retried(self, cell: Cell, reason: str) -> None:
        super().retried(cell, reason)
        self._write_if_due()

    def ended(self, cell: Cell, outcome: Outcome, done: int, left: float | None) -> None:
        super().ended(cell, outcome, done, left)
        label, text = plain(cell.label, NAME), plain(outcome.text, MESSAGE)
        self._last.append(EndedCell(label=label, kind=outcome.kind, text=text))
        if outcome.kind == "failed":
            log = None if outcome.log is None else plain(str(outcome.log))
            self._failures.append(FailedCell(label=label, message=text, log=log))
        if outcome.kind == "elsewhere":  # thousands may be found at once
            self._write_if_due()
        else:
            self._write()

    def tick(self, left: float | None, cells: Mapping[Key, float | None]) -> None:
        super().tick(left, cells)
        self._write_if_due()

    def close(self) -> None:
        super().close()
        self._write(finished=True)

    def _write_if_due(self) -> None:
        if self._written is None or time.monotonic() - self._written >= self._every:
            self._write()

    def _write(self, finished: bool = False) -> None:
        self._written = time.monotonic()
        runner = RunnerFacts(
            host=plain(socket.gethostname(), NAME), pid=os.getpid(), process_started=self._process_started,
            started=self._started, heartbeat=time.time(), engine=self._engine, finished=finished,
        )  # fmt: skip
        state = State(
            runner=runner, counts=self.counts(), left=self.left, running=self.running(), failed=list(self._failures),
            ended=list(self._last),
        )  # fmt: skip
        try:
            # Not forced to the disk: that would wait for gigabytes that cells write, and the file is old in a second.
            with replaced_whole(self.path, durable=False) as temporary:
                temporary.write_text(state.model_dump_json(), encoding="utf-8")
        except FimaqError as error:
            if not self._broken:
                self._broken = True
                self._say(f"warning: `python -m benchmarks status` will not show this run as it is. {error}")
