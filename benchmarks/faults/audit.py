"""The real adapter with a witness: which process measured which cell, and overlaps.

``python -m benchmarks.faults.audit`` is ``python -m benchmarks`` with it. Each process appends its
events to one file beside the results, so that they outlive it.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.cells import Adapter, default_adapter
from fimaq_core.progress import Progress, Report
from tasks.common.lease import is_running, this_process
from tasks.common.request import CellRequest


@dataclass(frozen=True)
class Event:
    """``begun``, ``measured``, or ``overlap`` (another living process was at the cell).

    ``pid`` and ``started`` are id and start time of the process.
    """

    kind: str
    cell: str
    pid: int
    started: float
    time: float


def read_events(results: Path) -> list[Event]:
    """Return all events below ``results`` (root of a run) in their order."""
    file = results / "audit.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [Event(**json.loads(line)) for line in lines]


def note(results: Path, kind: str, cell: str) -> None:
    """Write an event."""
    event = Event(kind, cell, *this_process()[1:], time.time())
    with (results / "audit.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(event)) + "\n")


def doubled(events: Sequence[Event]) -> set[str]:
    """Return the cells measured more than once, or by two processes at the same time."""
    measured = Counter(event.cell for event in events if event.kind == "measured")
    overlaps = {event.cell for event in events if event.kind == "overlap"}
    return overlaps | {cell for cell, count in measured.items() if count > 1}


def run_cell(request: CellRequest, report: Report) -> Path:
    """Measure a cell as the real adapter does, and note what happens."""
    from tasks.common.plan import planned_folder
    from tasks.common.run import run_cell as real

    results = request.results.parent
    cell = str(planned_folder(request).relative_to(request.results))
    seen: set[str] = set()

    def told(progress: Progress) -> None:
        # The first sign of work counts, not the call: another process may have measured the cell.
        if not progress.stage.startswith("wait"):
            if not seen:
                _begin(results, cell)
            seen.add(progress.stage)
        report(progress)

    path = real(request, told)
    if "evaluate" in seen:
        note(results, "measured", cell)
    return path


def _begin(results: Path, cell: str) -> None:
    """Note the begin, and an overlap if the process that began before is alive and not done."""
    before = [event for event in read_events(results) if event.cell == cell][-1:]
    note(results, "begun", cell)
    for event in before:
        other = event.kind == "begun" and event.pid != this_process()[1]
        if other and is_running(event.pid, event.started):
            note(results, "overlap", cell)


def audited() -> Adapter:
    """Return the real adapter with this module's ``run_cell``."""
    return replace(default_adapter(), run_cell=run_cell)


if __name__ == "__main__":
    from benchmarks.cli import cli
    from benchmarks.faults.audit import audited as adapter  # other processes know it by this name

    cli.main(obj=adapter())
