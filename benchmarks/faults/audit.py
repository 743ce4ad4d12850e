"""The real adapter with a witness: who measured which cell, and whether two ever did at the same time.

What is seen is written beside the results, a file an event, by the process that measures: it is there whoever is killed later.
"""

import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cells import Adapter, default_adapter
from fimaq_core.files import replaced_whole
from fimaq_core.progress import Progress, Report
from tasks.common.lease import is_running, this_process
from tasks.common.request import CellRequest


@dataclass(frozen=True)
class Event:
    """Something seen: ``begun``, ``measured``, or ``overlap`` (another living process was at it), and when (s)."""

    kind: str
    cell: str
    pid: int
    time: float


def audit_folder(results: Path) -> Path:
    """Where events of ``results`` (root of a run) are."""
    return results / "audit"


def read_events(results: Path) -> list[Event]:
    """Return all events in the order of their times."""
    files = audit_folder(results).glob("*.json")
    return sorted((Event(**json.loads(file.read_text(encoding="utf-8"))) for file in files), key=lambda event: event.time)


def note(results: Path, kind: str, cell: str) -> None:
    """Write an event."""
    event = {"kind": kind, "cell": cell, "pid": os.getpid(), "time": time.time()}
    with replaced_whole(audit_folder(results) / f"{secrets.token_hex(8)}.json") as temporary:
        temporary.write_text(json.dumps(event), encoding="utf-8")


def run_cell(request: CellRequest, report: Report) -> Path:
    """Measure a cell as the real adapter does, and note what happens."""
    from tasks.common.plan import planned_folder
    from tasks.common.run import run_cell as real

    results, cell = request.results.parent, str(planned_folder(request).relative_to(request.results))
    at_work = audit_folder(results) / f"{cell.replace('/', '|')}.at-work"
    seen: set[str] = set()

    def told(progress: Progress) -> None:
        # The first sign of work, not of the call: a cell that another measures, or has measured, is none of this process's.
        if not progress.stage.startswith("wait"):
            if not seen:
                _enter(results, cell, at_work)
            seen.add(progress.stage)
        report(progress)

    path = real(request, told)
    if "evaluate" in seen:
        note(results, "measured", cell)
    return path


def _enter(results: Path, cell: str, at_work: Path) -> None:
    note(results, "begun", cell)
    try:
        pid, started = json.loads(at_work.read_text(encoding="utf-8"))
        if pid != os.getpid() and is_running(pid, started) and not (results / "runs" / cell / "result.json").is_file():
            note(results, "overlap", cell)
    except (OSError, ValueError):
        pass
    with replaced_whole(at_work) as temporary:
        temporary.write_text(json.dumps(this_process()[1:]), encoding="utf-8")


def audited() -> Adapter:
    """The real adapter with this module's ``run_cell``."""
    real = default_adapter()
    return Adapter(run_cell, real.planned_folder, real.preflight)
