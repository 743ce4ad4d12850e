"""Events of a run, the state that follows from them, and the file of a run's events.

The terminal of a run and ``python -m benchmarks status`` show the same state. Each run appends its
events to a new file, ``<results>/runs/.state/*.jsonl``, one event per line. Only ``status`` reads
the file, and checks its content. The file stays; when the run has ended, it names no machine and no
process any more.
"""

import os
import secrets
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fimaq_core.files import cause_of, open_regular
from fimaq_core.terminal import one_line
from tasks.common.cell.lease import is_running

#: Least and most seconds between two ``progress`` lines of a cell, and between two ``tick`` lines.
#: In between, the seconds are this share of the run's time so far, so that files stay small.
_LEAST, _MOST, _SHARE = 1.0, 15.0, 0.02
#: Seconds without a line after which a run on another machine counts as ended.
SILENCE = 45.0
#: Number of ended runs whose files are kept.
_KEPT = 5
#: Bounds on the bytes of a file, and of a line: longer lines are skipped.
_MOST_BYTES, _LONGEST = 2**30, 2**20
#: Fields that tell machines and processes apart while a run goes on.
_PLACE = {"host": "", "pid": 0, "process_started": 0.0, "where": ""}

# Fields of events have bounds that no grid reaches.
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Name = Annotated[str, AfterValidator(lambda text: one_line(text, 200))]
Text = Annotated[str, AfterValidator(lambda text: one_line(text, 2000))]


class Event(BaseModel):
    """An event of a run, or of the cell `label`.

    Example:
        >>> Event(kind="started", time=1.8e9, label="vit_small rtn w4a4", where="worker 1").where
        'worker 1'
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # newer versions may have more fields

    #: Events of the run are begin, tick (twice per second) and close. ``retried``: the cell waits
    #: again.
    kind: Literal["begin", "started", "progress", "retried", "ended", "tick", "close"]
    time: Seconds  #: Unix time
    label: Name = ""
    #: ``begin``: process of the run. A later process may have the same id, but not the same start.
    host: Name = ""
    pid: Annotated[int, Field(ge=0, lt=2**31)] = 0
    process_started: Seconds = 0.0  #: Unix time
    engine: Name = ""
    over: Count = 0  #: number of cells with a record and of failed cells
    total: Count = 0  #: number of cells (``begin``), or units of the stage (``progress``)
    #: ``started``: identity of the cell, and its slot or machine.
    key: dict[Name, int | Name | None] = {}
    where: Name = ""
    #: ``progress``; see `fimaq_core.progress.Progress`.
    stage: Name = ""
    block: Name = ""
    done: Count = 0
    loss: float | None = Field(None, allow_inf_nan=False)
    #: ``ended``; ``elsewhere``: another runner measured the cell.
    outcome: Literal["finished", "failed", "elsewhere"] = "finished"
    text: Text = ""  #: result or reason
    log: Text | None = None  #: file with the details of a failure
    left: Seconds | None = None  #: estimated seconds until the grid is done
    cells: dict[Name, Seconds] = {}  #: ``tick``: the same for each running cell, by label


@dataclass
class State:
    """State of a run after some of its events. The thread of the terminal's view reads it."""

    begin: Event | None = None
    over: int = 0
    total: int = 0
    failures: int = 0
    running: dict[str, Event] = field(default_factory=dict)  #: last start of each running cell
    progress: dict[str, Event] = field(default_factory=dict)  #: last progress of these cells
    attempts: Counter[str] = field(default_factory=Counter)  #: number of starts of each cell
    failed: deque[Event] = field(default_factory=lambda: deque(maxlen=100))
    ended: deque[Event] = field(default_factory=lambda: deque(maxlen=10))
    #: Estimated ends of the running cells by label, and of the grid by "" (Unix time).
    ends: dict[str, float] = field(default_factory=dict)
    is_finished: bool = False  #: True after ``close``, which is missing if the run was killed

    def apply(self, event: Event) -> None:
        """Update the state by an event."""
        label = event.label
        if event.kind == "begin":
            self.begin, self.over, self.total = event, event.over, event.total
        elif event.kind == "started":
            self.attempts[label] += 1
            self.progress[label] = event.model_copy(update={"stage": "starting"})
            self.running[label] = event
        elif event.kind == "progress" and label in self.running:
            self.progress[label] = event
        elif event.kind == "tick":
            self.ends = {name: event.time + left for name, left in event.cells.items()}
        elif event.kind in ("retried", "ended"):
            self.running.pop(label, None)
        elif event.kind == "close":
            self.running, self.is_finished = {}, True
        if event.kind in ("tick", "ended"):
            self.ends.pop("", None)
            if event.left is not None:
                self.ends[""] = event.time + event.left
        if event.kind == "ended":
            self.over = event.over
            self.ended.append(event)
            if event.outcome == "failed":
                self.failures += 1
                self.failed.append(event)

    @property
    def done(self) -> int:
        """Number of cells with a record."""
        return max(self.over - self.failures, 0)

    def left(self, now: float, label: str = "") -> float | None:
        """Return the estimated seconds from `now` to the end of a cell or of the grid ("")."""
        end = self.ends.get(label)
        return None if end is None else max(end - now, 0.0)


class EventLog:
    """Writes the events of a run to a new file in `folder`; passes one warning to `warn`."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.jsonl"
        self._warn, self._is_broken = warn, False
        self._began = time.time()
        self._last: dict[str, float] = {}  # Unix time of the last line, by label

    def add(self, event: Event) -> None:
        """Write an event. Most ``progress`` and ``tick`` events are left out."""
        pause = min(max(_LEAST, _SHARE * (event.time - self._began)), _MOST)
        if event.kind in ("progress", "tick"):
            if event.time - self._last.get(event.label, 0.0) < pause:
                return
            self._last[event.label] = event.time
        try:
            if event.kind == "begin":
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _remove_old(self.path.parent)
            # Closed after each line, so that other machines see it on a network file system.
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{event.model_dump_json(exclude_defaults=True)}\n")
            if event.kind == "close":
                _forget_place(self.path)
        except OSError as error:
            if not self._is_broken:
                self._warn(
                    "warning: `python -m benchmarks status` will not show this run correctly. "
                    f"Cannot write {self.path}: {error.strerror}."
                )
            self._is_broken = True


@dataclass
class Run:
    """State of a run according to its file of events."""

    path: Path
    state: State = field(default_factory=State)
    heartbeat: float = 0.0  #: Unix time of the last line
    offset: int = 0  #: number of bytes that were read

    def read(self) -> None:
        """Apply the new complete lines of the file. Lines without a valid event are skipped."""
        with open_regular(self.path, _MOST_BYTES) as file:
            file.seek(self.offset)
            while line := file.readline(_LONGEST):
                if not line.endswith(b"\n") and len(line) < _LONGEST:
                    break  # the rest is not written yet
                self.offset += len(line)
                with suppress(ValidationError):
                    self.state.apply(Event.model_validate_json(line))
            self.heartbeat = os.fstat(file.fileno()).st_mtime

    @property
    def is_alive(self) -> bool:
        """True while the run goes on: its process runs, or on another machine, it writes lines."""
        begin = self.state.begin
        if begin is None or self.state.is_finished or not begin.host:
            return False
        if begin.host == socket.gethostname():
            return is_running(begin.pid, begin.process_started)
        return time.time() - self.heartbeat < SILENCE


def read_runs(folder: Path, known: dict[Path, Run] | None = None) -> tuple[list[Run], list[str]]:
    """Return the runs of a folder, the latest first, and one problem per unreadable file.

    Pass the same dict `known` to each call, so that only new lines are read.
    """
    runs, found, problems = {} if known is None else known, [], []
    for path in sorted(folder.glob("*.jsonl")):
        run = runs.setdefault(path, Run(path))
        try:
            run.read()
        except FileNotFoundError:
            continue  # a new run has just removed the file
        except OSError as error:
            problems.append(f"Skipped {path}: {cause_of(error, path)}.")
            continue
        if run.state.begin is not None:
            found.append((run.state.begin.time, path.name, run))
        elif run.offset:
            problems.append(f"Skipped {path}: it has no events of this version.")
    return [run for *_, run in sorted(found, key=lambda item: item[:2], reverse=True)], problems


def _remove_old(folder: Path) -> None:
    """Remove the files of ended runs, except the latest ones, which name no process then."""
    ended = [run for run in read_runs(folder)[0] if not run.is_alive]
    for run in ended[:_KEPT]:
        if run.state.begin is not None and run.state.begin.host:
            with suppress(OSError):
                _forget_place(run.path)
    for run in ended[_KEPT:]:
        with suppress(OSError):  # another user's file, or a read-only file system
            run.path.unlink(missing_ok=True)


def _forget_place(path: Path) -> None:
    """Blank out machines and processes in the file of an ended run; all bytes keep their place."""
    with path.open("r+b") as file:
        times = os.fstat(file.fileno())
        while line := file.readline(_LONGEST):
            with suppress(ValidationError):
                event = Event.model_validate_json(line)
                blank = event.model_copy(update=_PLACE)
                text = blank.model_dump_json(exclude_defaults=True).encode()
                if blank != event and len(text) < len(line):
                    file.seek(-len(line), os.SEEK_CUR)
                    file.write(text.ljust(len(line) - 1) + b"\n")
                    file.flush()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time of the last event
