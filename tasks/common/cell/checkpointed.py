"""Measurement of the quantized model of another cell on other data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fimaq_core.progress import OnProgress
from tasks.common.cell.identity import variant_name
from tasks.common.cell.origin import read_origin
from tasks.common.cell.prepare import PreparedCell, prepare
from tasks.common.cell.stages import restored
from tasks.common.record import read_record
from tasks.common.request import CellRequest
from tasks.common.task import Evaluation

#: Fields of the record of a quantized cell that do not depend on the evaluated data.
SAME = (
    "method", "w_bit", "a_bit", "seed", "recipe", "recipe_digest", "calibration", "modules",
    "last_loss", "fisher_passes", "blocks", "step_engine", "artefacts",
)  # fmt: skip


def measure_checkpoint(
    request: CellRequest, base: Path, on_progress: OnProgress
) -> tuple[PreparedCell, Evaluation, dict[str, Any]]:
    """Evaluate the checkpoint beside the record ``base`` on the data of ``request``.

    Returns the cell, its evaluation, and the rest of its record.
    """
    record, checkpoint = read_record(base), base.with_name("quantized.safetensors")
    cell = prepare(replace(request, recipe=None, mlp_checkpoint=None), on_progress)
    chains = restored(cell, checkpoint, *read_origin(checkpoint, request.task))
    changes = {name: getattr(record, name) for name in SAME}
    return cell, cell.evaluate(chains), {**changes, "variant": variant_name(request)}
