"""Adapter that writes which process measures which cell, to ``audit.jsonl`` beside the results.

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
from fimaq_core.documents import parse_json, read_text
from fimaq_core.errors import FimaqError
from fimaq_core.progress import OnProgress, Progress
from tasks.common.cell.lease import is_running, this_process
from tasks.common.request import CellRequest


class Note(NamedTuple):
    """Note of a process about a cell."""

    kind: str  #: ``begun``, ``measured``, or ``overlap``: another process measures the cell too
    cell: str  #: folder of the cell in the results
    pid: int
    started: float  #: Unix time at which the process started


def read_notes(results: Path) -> list[Note]:
    """Return all notes in the folder `results`, the oldest first."""
    file = results / "audit.jsonl"
    lines = read_text(file, FimaqError).splitlines() if file.is_file() else []
    return [Note(*parse_json(line, str(file), FimaqError)) for line in lines]


def write_note(results: Path, kind: str, cell: str) -> None:
    """Append a note of this process to the file in `results`."""
    with (results / "audit.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([kind, cell, *this_process()[1:]]) + "\n")


def doubled(notes: Sequence[Note]) -> set[str]:
    """Return the cells that were measured twice, or by two processes at the same time."""
    measured = Counter(note.cell for note in notes if note.kind == "measured")
    overlaps = {note.cell for note in notes if note.kind == "overlap"}
    return overlaps | {cell for cell, count in measured.items() if count > 1}


def run_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    """Measure a cell, write notes about it, and return the path of its record."""
    from tasks.common.cell.identity import planned_folder
    from tasks.common.cell.run import run_cell as real

    results = request.results.parent
    cell = str(planned_folder(request).relative_to(request.results))
    stages: set[str] = set()

    def noting(progress: Progress) -> None:
        # While this process waits, another one may measure the cell. Any other stage is own work.
        if not progress.stage.startswith("wait"):
            if not stages:
                earlier = [note for note in read_notes(results) if note.cell == cell][-1:]
                write_note(results, "begun", cell)
                for kind, _, pid, started in earlier:
                    if kind == "begun" and pid != os.getpid() and is_running(pid, started):
                        write_note(results, "overlap", cell)
            stages.add(progress.stage)
        on_progress(progress)

    path = real(request, noting)
    if "evaluate" in stages:
        write_note(results, "measured", cell)
    return path


if __name__ == "__main__":
    from benchmarks.cli import cli
    from benchmarks.faults.audit import run_cell as importable  # by name, in other processes

    cli.main(obj=replace(default_adapter(), run_cell=importable))
