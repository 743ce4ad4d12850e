"""The pipeline of a cell: identity, model, stages, evaluation, record."""

from dataclasses import replace
from pathlib import Path

from fimaq_core.files import remove_leftovers
from fimaq_core.progress import OnProgress, silent
from tasks.common.cell.identity import planned_place, recipe_digest, resolved
from tasks.common.cell.lease import acquire, awaited
from tasks.common.cell.outputs import write_outputs
from tasks.common.cell.prepare import prepare
from tasks.common.cell.stages import run_stages
from tasks.common.record import has_record, read_record
from tasks.common.request import CellRequest


def run_cell(request: CellRequest, on_progress: OnProgress = silent, *, wait: bool = False) -> Path:
    """Measure one cell and write its record; a cell with a valid record is not measured again.

    The full-precision model of a quantized cell is measured first, as a cell of its own. The folder
    of a cell also has ``outcomes.npz`` and, if the model is quantized, ``quantized.safetensors``.

    Returns the path of ``result.json``. Raises Busy if another process measures the cell now,
    unless ``wait`` is True. Raises another FimaqError for a problem that the user can solve;
    finished cells and blocks are kept.
    """
    request = resolved(request)
    folder, identity = planned_place(request)
    path = folder / "result.json"
    digest = recipe_digest(request)
    if not has_record(path, digest):
        with awaited(path, on_progress) if wait else acquire(path) as lease:
            if has_record(path, digest):  # another process has just measured the cell
                return path
            remove_leftovers(path.parent)
            full = None
            if request.recipe is not None:
                plain = replace(request, recipe=None, mlp_checkpoint=None, variant=None)
                full = read_record(run_cell(plain, on_progress, wait=True)).metrics
            cell = prepare(request, on_progress)
            if request.recipe is not None:
                run_stages(cell, lease)
            write_outputs(cell, cell.evaluate(cell.chains), full, lease, identity)
        read_record(path, digest)
    return path
