"""Whether many workers stay busy: cells of one second that do the input and output of real ones."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.cells import Cell, RunOptions
from benchmarks.faults.audit import Event
from benchmarks.grid import Filters, expand, parse_grid

#: Workers, and cells of each.
WORKERS, ROUNDS = 8, 30


def cells(results: Path, count: int) -> list[Cell]:
    """Return ``count`` cells that share nothing, each with a seed of its own."""
    grid = parse_grid({
        "name": "busy", "tasks": {"classification": {"dataset": "none", "models": ["demo_vit"]}}, "methods": ["rtn"],
        "bits": ["w4a4"], "seeds": list(range(count)), "threads": 1,
    })  # fmt: skip
    return expand(grid, Filters(), RunOptions(results))


def worker_busy(events: Sequence[Event], workers: int) -> float:
    """Return the share of the workers' time, from the first cell's start to the last one's end, that is spent in cells."""
    begun = {event.cell: event.time for event in events if event.kind == "begun"}
    ended = {event.cell: event.time for event in events if event.kind == "measured"}
    spent = sum(ended[cell] - begun[cell] for cell in ended)
    return spent / (workers * (max(ended.values()) - min(begun.values())))
