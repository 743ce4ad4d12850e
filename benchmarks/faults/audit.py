"""Adapter that notes which process measures which cell, in one file beside the results.

``python -m benchmarks.faults.audit`` is ``python -m benchmarks`` with this adapter.
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


class Note(NamedTuple):
    """Note of a process (id, start) at a cell.

    The kinds are ``begun``, ``measured``, and ``overlap``: another living process was at the cell.
    """

    kind: str
    cell: str
    pid: int
    started: float


def read_notes(results: Path) -> list[Note]:
    """Return all notes in the folder `results` in their order."""
    file = results / "audit.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [Note(*json.loads(line)) for line in lines]


def write_note(results: Path, kind: str, cell: str) -> None:
    """Append a note of this process."""
    with (results / "audit.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([kind, cell, *this_process()[1:]]) + "\n")


def doubled(notes: Sequence[Note]) -> set[str]:
    """Return the cells that were measured twice, or by two processes at the same time."""
    measured = Counter(note.cell for note in notes if note.kind == "measured")
    overlaps = {note.cell for note in notes if note.kind == "overlap"}
    return overlaps | {cell for cell, count in measured.items() if count > 1}


def run_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    """Measure a cell and write notes about it."""
    from tasks.common.cell.identity import planned_folder
    from tasks.common.cell.run import run_cell as real

    results = request.results.parent
    cell = str(planned_folder(request).relative_to(request.results))
    seen: set[str] = set()

    def noted(progress: Progress) -> None:
        # A cell begins with its first work: before, another process may have measured it.
        if not progress.stage.startswith("wait"):
            if not seen:
                before = [note for note in read_notes(results) if note.cell == cell][-1:]
                write_note(results, "begun", cell)
                for kind, _, pid, started in before:
                    if kind == "begun" and pid != os.getpid() and is_running(pid, started):
                        write_note(results, "overlap", cell)
            seen.add(progress.stage)
        on_progress(progress)

    path = real(request, noted)
    if "evaluate" in seen:
        write_note(results, "measured", cell)
    return path


if __name__ == "__main__":
    from benchmarks.cli import cli
    from benchmarks.faults.audit import run_cell as importable  # other processes import it

    cli.main(obj=replace(default_adapter(), run_cell=importable))
