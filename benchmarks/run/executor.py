"""Interface of cell executors, and their messages to the runner.

An executor has named slots. A slot measures one cell at a time; each cell has a new process. The
runner decides which cell is next, and which cell is tried again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fimaq_core.progress import Progress

#: Causes of a failure. ``user``: the user must correct something. ``memory``: memory ran out.
#: ``died``: the process ended without a message. ``busy``: another process measures the cell.
#: ``error``: any other exception.
Kind = Literal["user", "error", "memory", "died", "busy"]


@dataclass(frozen=True)
class Started:
    """First message of a cell. `where` is the name of its slot or machine."""

    where: str


@dataclass(frozen=True)
class Finished:
    """Last message of a measured cell: the path of its record, and the seconds it took."""

    path: Path
    seconds: float


@dataclass(frozen=True)
class Failed:
    """Last message of a failed attempt: its cause, a text, and the file with the details."""

    kind: Kind
    message: str
    log: Path | None = None


Message = Started | Progress | Finished | Failed


class Executor(Protocol):
    """Runs cells in slots."""

    def slots(self) -> Sequence[str]:
        """Return all slots, idle and busy. They may change during a run."""

    def start(self, slot: str, label: str, work: bytes) -> None:
        """Start the cell `label` in an idle slot; `wait` returns its messages.

        `work` is a pickled tuple: the function that measures a cell (`Adapter.run_cell`), its
        request, and the path of the error log or None.
        """

    def wait(self, timeout: float) -> list[tuple[str, Message]]:
        """Return (slot, message) pairs. Wait at most `timeout` seconds for the first message."""

    def close(self) -> None:
        """Kill all processes."""


#: Makes an executor from the number of cells and the names of the modules that they import.
MakeExecutor = Callable[[int, Sequence[str]], Executor]
