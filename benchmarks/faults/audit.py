"""The real adapter with a witness: which process measured which cell, and overlaps.

The process that measures writes each event as a file beside the results, so that events outlive
any process.
"""

import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.cells import Adapter, default_adapter
from fimaq_core.files import replaced_whole
from fimaq_core.progress import Progress, Report
from tasks.common.lease import is_running, this_process
from tasks.common.request import CellRequest


@dataclass(frozen=True)
class Event:
    """``begun``, ``measured``, or ``overlap`` (another living process was at the cell)."""

    kind: str
    cell: str
    pid: int
    time: float


def read_events(results: Path) -> list[Event]:
    """Return all events below ``results`` (root of a run) in the order of their times."""
    files = (results / "audit").glob("*.json")
    events = [Event(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return sorted(events, key=lambda event: event.time)


def doubled(events: Sequence[Event]) -> set[str]:
    """Return the cells measured more than once, or by two processes at the same time."""
    measured = Counter(event.cell for event in events if event.kind == "measured")
    overlaps = {event.cell for event in events if event.kind == "overlap"}
    return overlaps | {cell for cell, count in measured.items() if count > 1}


def note(results: Path, kind: str, cell: str) -> None:
    """Write an event."""
    event = Event(kind, cell, os.getpid(), time.time())
    path = results / "audit" / f"{secrets.token_hex(8)}.json"
    with replaced_whole(path) as temporary:
        temporary.write_text(json.dumps(asdict(event)), encoding="utf-8")


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
    note(results, "begun", cell)
    at_work = results / "audit" / f"{cell.replace('/', '|')}.at-work"
    if at_work.is_file() and not (results / "runs" / cell / "result.json").is_file():
        pid, started = json.loads(at_work.read_text(encoding="utf-8"))
        if pid != os.getpid() and is_running(pid, started):
            note(results, "overlap", cell)
    with replaced_whole(at_work) as temporary:
        temporary.write_text(json.dumps(this_process()[1:]), encoding="utf-8")


def audited() -> Adapter:
    """Return the real adapter with this module's ``run_cell``."""
    return replace(default_adapter(), run_cell=run_cell)
