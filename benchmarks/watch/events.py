"""Events of a run, and the state that follows from them.

The view in the run's own terminal and ``python -m benchmarks status`` draw the same state.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from benchmarks.console import plain

#: Bounds keep what is read from a file printable; they are far beyond any grid.
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Name = Annotated[str, AfterValidator(lambda text: plain(text, 200))]
Text = Annotated[str, AfterValidator(lambda text: plain(text, 2000))]


class Event(BaseModel):
    """Something that happened in a run, at a Unix time.

    Attributes:
        kind: ``begin`` and ``close`` of the run, ``tick`` of its clock; of a cell: ``started``,
            ``progress``, ``retried`` (it waits again) and ``ended``.
        label: the cell, for people; empty for the whole run.
        host, pid, process_started, engine: of ``begin``: where it runs. A later process may have
            the same ``pid``, but was created at another time.
        over: cells that are over, well or not.
        total: cells of the grid (``begin``), or units of the stage (``progress``, 0: not known).
        key, where: of ``started``: the cell, and what it runs on, for people.
        stage, block, done, loss: of ``progress``; see `fimaq_core.progress.Progress`.
        outcome: of ``ended``; ``elsewhere``: another runner measured the cell.
        text, log: reason or result, and the file with the details of a failure.
        left: seconds until the grid is done; None where nothing is known.
        cells: of ``tick``: seconds until running cells are done, by label.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may have more fields

    kind: Literal["begin", "started", "progress", "retried", "ended", "tick", "close"]
    time: Seconds
    label: Name = ""
    host: Name = ""
    pid: Annotated[int, Field(ge=0, lt=2**31)] = 0
    process_started: Seconds = 0.0
    engine: Name = ""
    over: Count = 0
    total: Count = 0
    key: dict[Name, int | Name | None] = {}
    where: Name = ""
    stage: Name = ""
    block: Name = ""
    done: Count = 0
    loss: float | None = Field(None, allow_inf_nan=False)
    outcome: Literal["finished", "failed", "elsewhere"] = "finished"
    text: Text = ""
    log: Text | None = None
    left: Seconds | None = None
    cells: dict[Name, Seconds] = {}


@dataclass
class Running:
    """A cell at work: its last ``progress``, how often it was started, its expected end."""

    started: Event
    attempts: int
    progress: Event
    until: float | None = None


@dataclass
class State:
    """State of a run after some of its events.

    Another thread may read it: each value is replaced as a whole.

    Attributes:
        begin: the first event.
        over, total, failures: cells that are over, all cells, cells that failed.
        running: cells at work by label, the longest at work first.
        failed, ended: the latest of these events, oldest first.
        until: expected end of the grid.
        finished: the run ended by itself.
    """

    begin: Event | None = None
    over: int = 0
    total: int = 0
    failures: int = 0
    running: dict[str, Running] = field(default_factory=dict)
    attempts: Counter[str] = field(default_factory=Counter)
    failed: deque[Event] = field(default_factory=lambda: deque(maxlen=100))
    ended: deque[Event] = field(default_factory=lambda: deque(maxlen=10))
    until: float | None = None
    finished: bool = False

    def apply(self, event: Event) -> None:
        """Change by an event."""
        row = self.running.get(event.label)
        if event.kind in ("tick", "ended"):
            self.until = None if event.left is None else event.time + event.left
        if event.kind == "begin":
            self.begin, self.over, self.total = event, event.over, event.total
        elif event.kind == "started":
            self.attempts[event.label] += 1
            first = event.model_copy(update={"stage": "starting"})
            self.running[event.label] = Running(event, self.attempts[event.label], first)
        elif event.kind == "progress" and row is not None:
            row.progress = event
        elif event.kind == "tick":
            for label, running in self.running.items():
                left = event.cells.get(label)
                running.until = None if left is None else event.time + left
        elif event.kind in ("retried", "ended"):
            self.running.pop(event.label, None)
        elif event.kind == "close":
            self.running, self.finished = {}, True
        if event.kind == "ended":
            self.over = event.over
            self.ended.append(event)
            if event.outcome == "failed":
                self.failures += 1
                self.failed.append(event)

    @property
    def done(self) -> int:
        """Cells with a record."""
        return max(self.over - self.failures, 0)


def left(of: State | Running, now: float) -> float | None:
    """Return the expected seconds until the end of a grid or cell."""
    return None if of.until is None else max(of.until - now, 0.0)
