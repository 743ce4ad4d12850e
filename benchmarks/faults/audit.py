"""The real adapter with a witness: which process measured which cell, and overlaps.

``python -m benchmarks.faults.audit`` is ``python -m benchmarks`` with it. All processes append
their events to one file beside the results.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.grid.cell import default_adapter
from fimaq_core.progress import OnProgress, Progress
from tasks.common.cell.lease import is_running, this_process
from tasks.common.request import CellRequest


class Event(NamedTuple):
    """``begun``, ``measured``, or ``overlap``: another living process was at the cell."""

    kind: str
    cell: str
    pid: int
    started: float


def read_events(results: Path) -> list[Event]:
    """Return all events below ``results`` (root of a run) in their order."""
    file = results / "audit.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [Event(*json.loads(line)) for line in lines]


def note(results: Path, kind: str, cell: str) -> None:
    """Write an event."""
    with (results / "audit.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([kind, cell, *this_process()[1:]]) + "\n")


def doubled(events: Sequence[Event]) -> set[str]:
    """Return the cells measured more than once, or by two processes at the same time."""
    measured = Counter(event.cell for event in events if event.kind == "measured")
    overlaps = {event.cell for event in events if event.kind == "overlap"}
    return overlaps | {cell for cell, count in measured.items() if count > 1}


def run_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    """Measure a cell as the real adapter does, and note what happens."""
    from tasks.common.cell.identity import planned_folder
    from tasks.common.cell.run import run_cell as real

    results = request.results.parent
    cell = str(planned_folder(request).relative_to(request.results))
    seen: set[str] = set()

    def told(progress: Progress) -> None:
        # The first sign of work counts, not the call: another process may have measured the cell.
        if not progress.stage.startswith("wait"):
            if not seen:
                before = [event for event in read_events(results) if event.cell == cell][-1:]
                note(results, "begun", cell)
                for _, _, pid, started in [event for event in before if event.kind == "begun"]:
                    if pid != os.getpid() and is_running(pid, started):
                        note(results, "overlap", cell)
            seen.add(progress.stage)
        on_progress(progress)

    path = real(request, told)
    if "evaluate" in seen:
        note(results, "measured", cell)
    return path


if __name__ == "__main__":
    from benchmarks.cli import cli
    from benchmarks.faults.audit import run_cell as known  # by this name, to other processes too

    cli.main(obj=replace(default_adapter(), run_cell=known))
