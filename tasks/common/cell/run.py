"""The pipeline of a cell: identity, model, stages, evaluation, record."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fimaq_core.errors import RecipeError
from fimaq_core.export.opening import open_onnx
from fimaq_core.files import remove_leftovers
from fimaq_core.progress import OnProgress, silent
from tasks.common.cell.checkpointed import measure_checkpoint
from tasks.common.cell.exported import measure_export, measure_file
from tasks.common.cell.finishing import finish_cell
from tasks.common.cell.full_precision import FullPrecision
from tasks.common.cell.identity import Place, planned_place, recipe_digest, resolved, unfinished
from tasks.common.cell.lease import Lease, acquire, awaited
from tasks.common.cell.origin import origin_of_export, with_origin
from tasks.common.cell.outputs import write_outputs
from tasks.common.cell.prepare import prepare
from tasks.common.cell.stages import run_stages
from tasks.common.data.elsewhere import at_home
from tasks.common.preprocessing import replaced_fields
from tasks.common.record import has_record, read_record
from tasks.common.request import CellRequest

#: Function that measures a cell and writes its record. It takes the cell of the full-precision
#: model, None for that cell itself.
Measure = Callable[[FullPrecision | None, Lease], None]


def run_cell(request: CellRequest, on_progress: OnProgress = silent, *, wait: bool = False) -> Path:
    """Measure one cell and write its record; a cell with a valid record is not measured again.

    Measured first, each as a cell of its own, are the full-precision model of a quantized cell, the
    quantized model of an export, the model before joint finishing, and the model at home if the
    cell measures it elsewhere. The folder of a cell also has ``outcomes.npz`` and, if it quantizes
    the model, ``quantized.safetensors`` or the export, ``model.onnx``.

    Returns the path of ``result.json``. Raises Busy if another process measures the cell now,
    unless ``wait`` is True. Raises another FimaqError for a problem that the user can solve;
    finished cells and blocks are kept.
    """
    request = resolved(request)
    place, home = planned_place(request), request
    if request.recipe is not None:
        home = replace(request, data=at_home(request.data))

    def measure(full: FullPrecision | None, lease: Lease) -> None:
        if request.export and full is not None:
            simulated = run_cell(replace(home, export=False), on_progress, wait=True)
            measure_export(request, simulated, full, lease, place.identity, on_progress)
            return
        changes: dict[str, Any] = {}
        if request.recipe is not None and home != request:
            base = run_cell(home, on_progress, wait=True)
            cell, evaluation, changes = measure_checkpoint(request, base, on_progress)
            write_outputs(cell, evaluation, full, lease, place.identity, changes)
            return
        if request.recipe is not None and request.recipe.finish_steps:
            base = run_cell(unfinished(request), on_progress, wait=True)
            cell, changes = finish_cell(request, base, lease, on_progress)
        else:
            cell = prepare(request, on_progress)
            if request.recipe is not None:
                run_stages(cell, lease)
        write_outputs(cell, cell.evaluate(cell.chains), full, lease, place.identity, changes)

    return _measured(request, place, measure, on_progress, wait)


def evaluate_file(request: CellRequest, path: Path, on_progress: OnProgress = silent) -> Path:
    """Measure an exported file as a cell of its own; return the path of its record.

    The file names the model. See :func:`run_cell`, also for the errors.
    """
    file = open_onnx(path)
    recipe, origin = origin_of_export(file, request.task)
    if request.device != "cpu":
        raise RecipeError(f"Exported files run on the CPU: leave --device {request.device} out.")
    replaced = replaced_fields(origin.preprocessing.fields(), request.model.preprocessing)
    request = replace(with_origin(request, origin, recipe), notes=(*request.notes, *replaced))
    request = resolved(replace(request, export=True))
    place = planned_place(request, file.sha256)

    def measure(full: FullPrecision | None, lease: Lease) -> None:
        assert full is not None
        measure_file(request, file, full, lease, place.identity, on_progress)

    return _measured(request, place, measure, on_progress, False)


def _measured(
    request: CellRequest, place: Place, measure: Measure, on_progress: OnProgress, wait: bool
) -> Path:
    """Return the path of the valid record at ``place``; measure the cell if there is none."""
    path, digest = place.folder / "result.json", recipe_digest(request)
    if not has_record(path, digest):
        with awaited(path, on_progress) if wait else acquire(path) as lease:
            if has_record(path, digest):  # another process has just measured the cell
                return path
            remove_leftovers(path.parent)
            full = None
            if request.recipe is not None:
                plain = replace(
                    request, recipe=None, mlp_checkpoint=None, variant=None, export=False
                )
                there = run_cell(plain, on_progress, wait=True)
                full = FullPrecision(read_record(there), there.parent, plain)
            measure(full, lease)
        read_record(path, digest)
    return path
