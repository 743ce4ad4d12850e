"""What the runner and its engines say to each other.

An engine provides slots; a slot measures one cell at a time, each in a process of its own, and tells what happens. What runs
where and when, and what is tried again, is the runner's business.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from fimaq_core.progress import Progress, Report

if TYPE_CHECKING:
    from tasks.common.request import CellRequest

RunCell = Callable[["CellRequest", Report], Path]

#: ``user``: an error with a message for the user, the same however often one tries. ``error``: any other exception.
#: ``memory``: memory ran out. ``died``: the process ended without a word. ``busy``: another process measures this cell.
Kind = Literal["user", "error", "memory", "died", "busy"]


@dataclass(frozen=True)
class Job:
    """A cell to measure, as it travels to its process.

    Attributes:
        work: the pickled function that measures, request and path of the error log (or None); empty to import only.
        imports: modules that are imported once, before the processes of cells part from their host.
        label: names the cell in the log of what it prints.
    """

    work: bytes
    imports: tuple[str, ...] = ()
    label: str = ""


def make_job(
    run_cell: RunCell, request: CellRequest, error_log: Path | None, imports: Sequence[str] = (), label: str = ""
) -> Job:
    """Pack a cell. ``run_cell`` must be importable by name."""
    return Job(pickle.dumps((run_cell, request, error_log)), tuple(imports), label)


@dataclass(frozen=True)
class Finished:
    """A cell is measured: its record, and how long it took."""

    path: Path
    seconds: float


@dataclass(frozen=True)
class Failed:
    """An attempt at a cell has failed: why, and where the details are."""

    kind: Kind
    message: str
    log: Path | None = None


Message = Progress | Finished | Failed


class Slot(Protocol):
    """Measures one cell at a time."""

    @property
    def where(self) -> str:
        """Name for people: ``worker 1``, ``node-name gpu 0``."""

    def assign(self, job: Job) -> None:
        """Start on a cell. :meth:`Engine.wait` gives its messages: progress, then one Finished or Failed."""


class Engine(Protocol):
    """Provides slots."""

    def slots(self) -> Sequence[Slot]:
        """The slots that can take cells now or are at one; they may come and go."""

    def wait(self, timeout: float) -> list[tuple[Slot, Message]]:
        """Wait for something to happen, at most ``timeout`` seconds, and return what the slots say.

        A slot that goes away while it is at a cell says Failed (``died``) for it.
        """

    def close(self) -> None:
        """End all processes, whatever they do."""
