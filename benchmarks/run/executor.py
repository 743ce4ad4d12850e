"""Messages between the runner and an executor.

An executor has slots. A slot measures one cell at a time, in a process of its own. The runner
decides which cell runs next and what is tried again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from fimaq_core.progress import Progress

#: ``user``: an error that the user must mend. ``error``: any other exception. ``memory``: memory
#: ran out. ``died``: the process ended without a word. ``busy``: another process measures the cell.
Kind = Literal["user", "error", "memory", "died", "busy"]


@dataclass(frozen=True)
class Started:
    """The cell's process has begun; ``where`` says on what, for people."""

    where: str


@dataclass(frozen=True)
class Finished:
    """The cell is measured: its record, and how long it took."""

    path: Path
    seconds: float


@dataclass(frozen=True)
class Failed:
    """An attempt at the cell has failed: why, and where the details are."""

    kind: Kind
    message: str
    log: Path | None = None


Message = Started | Progress | Finished | Failed


class Executor(Protocol):
    """Runs cells in slots, which have names."""

    def slots(self) -> Sequence[str]:
        """Return the slots that can take a cell now or are at one; they may come and go."""

    def start(self, slot: str, label: str, work: bytes) -> None:
        """Start a cell. `wait` returns its messages, the last of them Finished or Failed.

        Args:
            slot: an idle one.
            label: name of the cell in the log of its output.
            work: pickled function that measures, request, and path of the error log (or None).
        """

    def wait(self, timeout: float) -> list[tuple[str, Message]]:
        """Wait for messages, at most ``timeout`` seconds."""

    def close(self) -> None:
        """End all processes, whatever they do."""


#: Makes an executor for so many cells, which need these modules.
MakeExecutor = Callable[[int, Sequence[str]], Executor]
