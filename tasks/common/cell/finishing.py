"""Joint finishing of a quantized model: that of another cell, or a checkpoint alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fimaq_core.checkpoint import load_checkpoint
from fimaq_core.errors import CheckpointError, RecipeError
from fimaq_core.pipeline import CALIBRATE, FINISH, RECONSTRUCT, STAGES, freeze
from fimaq_core.progress import OnProgress
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.mlp import use_relu
from fimaq_core.store import Address, Part, Stage
from tasks.common.cell.lease import Lease
from tasks.common.cell.origin import read_origin, with_origin
from tasks.common.cell.prepare import PreparedCell, all_segments, prepare, whole_module
from tasks.common.cell.stages import changed_recipe, check_shapes, join_parts, run_stage
from tasks.common.record import WAIT, read_record
from tasks.common.request import CellRequest

#: Fields of the record of a cell that hold for the finished model too.
_SAME = ("last_loss", "fisher_passes", "blocks", "step_engine")
#: Stages of a cell that a finished cell runs itself, and those that made nothing.
_OWN = ("load", "evaluate", WAIT)


def finish_cell(
    request: CellRequest, base: Path, lease: Lease, on_progress: OnProgress
) -> tuple[PreparedCell, dict[str, Any]]:
    """Finish the model of another cell; return the finished cell and the rest of its record.

    Args:
        request: the resolved request of the finished cell.
        base: record of the same cell without finishing, with the checkpoint beside it.
        lease: of the record to write; the checkpoint of the whole model is written beside it.
        on_progress: receives progress.
    """
    record, out = read_record(base), lease.path.with_name("quantized.safetensors")
    own = replace(request, mlp_checkpoint=None, notes=(*request.notes, *record.notes))
    cell = prepare(own, on_progress)
    # The base is part of the finished cell's cost.
    pairs = (record.seconds, cell.clock.seconds), (record.stage_memory_bytes, cell.clock.memory)
    for earlier, now in pairs:
        stages = {name.removesuffix(" (reused)"): name for name in earlier if name not in _OWN}
        now.update({f"{plain} (reused)": earlier[name] for plain, name in stages.items()})
    assert cell.request.recipe is not None
    _load(cell, base.with_name(out.name), cell.request.recipe.unfinished())

    def address(stage: Stage, part: Part) -> Address:
        if not stage.kind:
            return Address()
        return Address(cell.shared_file(stage, part) if part.name else out)

    cell.run(STAGES[STAGES.index(FINISH) :], address)
    lease.check()
    if list(cell.chains) != [""]:
        cell.save(out, whole_module(cell.chains), FINISH.mark)
    same = {name: getattr(record, name) for name in _SAME}
    artefacts = dict(sorted({**record.artefacts, **cell.artefacts}.items()))
    return cell, {**same, "artefacts": artefacts}


def finish_stage(
    request: CellRequest, source: Path, out: Path, given: dict[str, Any], on_progress: OnProgress
) -> list[str]:
    """Finish the quantized checkpoint ``source`` into ``out``; return notes for the user.

    The checkpoint gives the model's name, its arguments and the recipe; ``given`` recipe fields
    have priority. An ``out`` of an equal run is kept. Raises CheckpointError if the checkpoint
    belongs to another run or is not ready, and RecipeError if it has nothing to finish.
    """
    fingerprint, origin = read_origin(source, request.task)
    ready = [RECONSTRUCT.mark] if fingerprint.recipe.reconstruct else [CALIBRATE.mark]
    if origin.stage not in ready:
        raise CheckpointError(
            f"The checkpoint {source} is of stage '{origin.stage}', and its recipe needs the stage "
            f"'{ready[0]}' before finishing: give that checkpoint."
        )
    recipe = changed_recipe(fingerprint.recipe, given, request.task)
    if not recipe.finish_steps:
        raise RecipeError("Finishing has no steps: give --finish-steps, such as 500.")
    cell = prepare(with_origin(request, origin, recipe), on_progress)
    _load(cell, source, fingerprint.recipe)
    run_stage(FINISH, cell, out)
    join_parts(cell, out, whole_module(cell.chains), FINISH.mark)
    return [*cell.notes, *cell.log.sentences()]


def _load(cell: PreparedCell, source: Path, recipe: Recipe) -> None:
    """Load the checkpoint ``source`` of ``recipe`` into the float chains, and freeze them."""
    if not any(map(FINISH.wanted, cell.parts)):
        raise RecipeError(
            "Finishing has nothing to train: heads of a detector alone stay as calibrated."
        )
    cell.keep_teachers()
    if recipe.reconstruct_mlp:
        use_relu(all_segments(cell.chains))
    expected = cell.fingerprint.model_copy(update={"recipe": recipe})
    load_checkpoint(source, whole_module(cell.chains), expected)
    check_shapes(cell, cell.chains, source)
    for chain in cell.chains.values():
        freeze(chain)  # rounds the weights of a calibrated checkpoint
