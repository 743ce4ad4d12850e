"""``python -m benchmarks`` with fake cells that hold their lease for a moment."""

import time
from pathlib import Path

import benchmark_fakes as fakes

from benchmarks.faults.audit import write_note
from benchmarks.grid.cell import Adapter
from fimaq_core.progress import OnProgress
from tasks.common.cell.identity import planned_folder
from tasks.common.cell.lease import acquire
from tasks.common.record import write_record
from tasks.common.request import CellRequest


def run_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    """Write a record under a lease, unless another process has written it."""
    path = planned_folder(request) / "result.json"
    results, name = request.results.parent, str(path.parent.relative_to(request.results))
    with acquire(path) as lease:
        if path.is_file():
            return path
        write_note(results, "begun", name)
        time.sleep(0.3)
        lease.check()
        write_record(fakes.placed_record(request, 50.0), path.parent)
        write_note(results, "measured", name)
    return path


if __name__ == "__main__":
    import leased_cells  # worker processes import the adapter by this name

    from benchmarks.cli import cli

    cli.main(obj=Adapter(leased_cells.run_cell, planned_folder, fakes.preflight))
