"""Stages of a cell: all together for ``run``, or one by one from checkpoint to checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fimaq_core.checkpoint import Fingerprint, load_checkpoint
from fimaq_core.errors import CheckpointError
from fimaq_core.files import is_there, remove, remove_leftovers
from fimaq_core.layers import set_quantized
from fimaq_core.mixed_bits import apply_bits_map
from fimaq_core.pipeline import CALIBRATE, MLPS, RECONSTRUCT, STAGES, load_mlps
from fimaq_core.progress import OnProgress, silent
from fimaq_core.recipe import OFF, Recipe, make_recipe
from fimaq_core.reconstruction.mlp import mlps, use_relu
from fimaq_core.store import Address, Part, Pieces, Stage
from tasks.common.cell.lease import Lease
from tasks.common.cell.origin import Origin, read_origin, with_origin
from tasks.common.cell.prepare import PreparedCell, all_segments, prepare, whole_module
from tasks.common.models.facts import joined_facts, model_facts
from tasks.common.models.inspection import Inspection
from tasks.common.preprocessing import replaced_fields
from tasks.common.registry import defaults
from tasks.common.request import CellRequest
from tasks.common.task import Chains, Evaluation

#: Recipe fields of a model without quantizers.
FULL_PRECISION = {
    **dict.fromkeys(("w_bits", "a_bits", "patch_input_bits"), OFF),
    **dict.fromkeys(("s_bits", "head_bits", "bits_map")),
}


def run_stages(cell: PreparedCell, lease: Lease) -> None:
    """Run all stages of a cell, and write the checkpoint of the whole model into its folder.

    Cells share the files of stages. Finished blocks of a model of one chain are not shared; they
    stay in the cell's folder until the record is written.
    """
    folder = lease.path.parent

    def address(stage: Stage, part: Part) -> Address:
        if not stage.kind:
            return Address()
        if stage is RECONSTRUCT and not part.name:
            return Address(None, folder / "blocks")
        return Address.beside(cell.shared_file(stage, part), stage)

    if cell.request.mlp_checkpoint is not None:
        cell.clock.lap(f"{MLPS.name} (reused)")
    remove_leftovers(folder / "blocks")
    cell.run(STAGES, address)
    lease.check()
    done = RECONSTRUCT if any(map(RECONSTRUCT.wanted, cell.parts)) else CALIBRATE
    cell.save(folder / "quantized.safetensors", whole_module(cell.chains), done.mark)


def mlp_stage(request: CellRequest, out: Path, on_progress: OnProgress) -> list[str]:
    """Reconstruct the MLPs of a model into ``out``; return notes for the user.

    An ``out`` of an equal run is kept.
    """
    # The recipe is made again, which refuses fields that do not fit MLP reconstruction.
    given = request.recipe.model_dump(mode="json", exclude={"revision"})
    recipe = make_recipe(request.recipe.method, given, {"reconstruct_mlp": True})
    made = out if is_there(out) else None
    cell = prepare(replace(request, recipe=recipe, mlp_checkpoint=made), on_progress)
    run_stage(MLPS, cell, out)
    join_parts(cell, out, mlps(all_segments(cell.chains)), MLPS.mark)
    return cell.notes


def calibrate_stage(request: CellRequest, out: Path, on_progress: OnProgress) -> list[str]:
    """Calibrate a model into the checkpoint ``out``; return notes for the user.

    An ``out`` of an equal run is kept. Reconstructed MLPs are kept in a file beside ``out``.
    """
    cell = prepare(request, on_progress)
    run_stage(MLPS, cell, beside(out, "mlp"))
    if is_there(out):
        holds = {"stage": CALIBRATE.mark}
        load_checkpoint(out, whole_module(cell.chains), cell.fingerprint, CALIBRATE.fields, holds)
        return cell.notes
    run_stage(CALIBRATE, cell, out)
    join_parts(cell, out, whole_module(cell.chains), CALIBRATE.mark)
    return cell.notes


def reconstruct_stage(
    request: CellRequest, source: Path, out: Path, given: dict[str, Any], on_progress: OnProgress
) -> list[str]:
    """Reconstruct the calibrated checkpoint ``source`` into ``out``; return notes for the user.

    The checkpoint gives the model's name, its arguments and the recipe; ``given`` recipe fields
    have priority. Finished blocks lie beside ``out`` until ``out`` is written. Raises
    CheckpointError if the checkpoint belongs to another run, or if ``given`` changes its ranges.
    """
    fingerprint, origin = read_origin(source, request.task)
    if origin.stage != CALIBRATE.mark:
        raise CheckpointError(
            f"The checkpoint {source} is of stage '{origin.stage}': reconstruct needs a calibrated "
            "one."
        )
    recipe = changed_recipe(fingerprint.recipe, given, request.task)
    cell = prepare(with_origin(request, origin, recipe), on_progress)
    if recipe.reconstruct_mlp:
        cell.keep_teachers()
        use_relu(all_segments(cell.chains))
    load_checkpoint(source, whole_module(cell.chains), cell.fingerprint, CALIBRATE.fields)
    check_shapes(cell, cell.chains, source)

    def blocks(part: Part) -> Pieces:
        folder = Address.beside(beside(out, part.name), RECONSTRUCT).pieces
        return Pieces(folder, RECONSTRUCT.piece, part.fingerprint, RECONSTRUCT.fields)

    for part in cell.parts:  # also if the recipe has no reconstruction: the user asks for it
        RECONSTRUCT.make(part, cell.resources, blocks(part))
    cell.save(out, whole_module(cell.chains), RECONSTRUCT.mark)
    for part in cell.parts:
        blocks(part).remove()
    return [*cell.notes, *cell.log.sentences()]


def evaluate_stage(request: CellRequest, checkpoint: Path, on_progress: OnProgress) -> Evaluation:
    """Evaluate a checkpoint of any stage; the checkpoint gives the model's name and arguments."""
    fingerprint, origin = read_origin(checkpoint, request.task)
    cell = prepare(with_origin(request, origin), on_progress)
    evaluation = cell.evaluate(restored(cell, checkpoint, fingerprint, origin))
    replaced = replaced_fields(origin.preprocessing.fields(), request.model.preprocessing)
    finished = [] if origin.finishing is None else [origin.finishing.sentence()]
    return replace(evaluation, notes=[*cell.notes, *finished, *replaced, *evaluation.notes])


def inspect_stage(request: CellRequest, checkpoint: Path) -> Inspection:
    """Return facts about the model in a checkpoint of any stage, without reading data.

    Raises CheckpointError if the checkpoint belongs to another task or to other weights, and
    ModelError if the task does not tell the model's image size.
    """
    fingerprint, origin = read_origin(checkpoint, request.task)
    cell = prepare(with_origin(request, origin), silent)
    chains, loaded = restored(cell, checkpoint, fingerprint, origin), cell.loaded
    inputs = cell.task.examples(loaded, chains)
    untouched = cell.task.untouched(loaded, chains)
    facts = {name: model_facts(chain, inputs[name]) for name, chain in chains.items()}
    found = loaded.tag, origin.stage, fingerprint, joined_facts(facts, untouched), tuple(untouched)
    return Inspection(checkpoint, request.task, *found, loaded.entry, loaded.preprocessing)


def run_stage(stage: Stage, cell: PreparedCell, out: Path) -> None:
    """Run a stage. A model of one chain is kept in ``out``, several parts in files beside it."""
    cell.run([stage], lambda stage, part: Address.beside(beside(out, part.name), stage))


def join_parts(cell: PreparedCell, out: Path, module: nn.Module, mark: str) -> None:
    """Write ``module``, with all parts, to ``out`` if it is absent; remove the parts' files."""
    if not is_there(out):
        cell.save(out, module, mark)
    for part in cell.parts:
        if part.name:
            remove(beside(out, part.name))


def beside(path: Path, name: str) -> Path:
    """Return ``path`` with ``name`` before the suffix; an empty name changes nothing."""
    return path.with_name(f"{path.stem}.{name}{path.suffix}") if name else path


def restored(
    cell: PreparedCell, checkpoint: Path, fingerprint: Fingerprint, origin: Origin
) -> Chains:
    """Return the chains of a checkpoint, in full precision if its stage is ``mlp``."""
    if fingerprint.weights != cell.loaded.sha256:
        other, own = fingerprint.weights[:12], cell.loaded.sha256[:12]
        raise CheckpointError(
            f"The checkpoint {checkpoint} was made from other weights (sha256 {other}) than those "
            f"found now ({own})."
        )
    recipe = fingerprint.recipe
    if origin.stage == MLPS.mark:
        chains = cell.task.chains(cell.loaded, recipe.model_copy(update=FULL_PRECISION))
        load_mlps(all_segments(chains), checkpoint, None)
        return chains
    chains = cell.task.chains(cell.loaded, recipe)
    apply_bits_map(chains, recipe.bits_map)
    if recipe.reconstruct_mlp:
        use_relu(all_segments(chains))
    load_checkpoint(checkpoint, whole_module(chains), None)
    check_shapes(cell, chains, checkpoint)
    return chains


@torch.no_grad()
def check_shapes(cell: PreparedCell, chains: Chains, checkpoint: Path) -> None:
    """Run an input through each quantized chain: only this shows if the shapes of ranges fit."""
    if cell.loaded.input_shape is None:
        return
    set_quantized(whole_module(chains), True)
    for name, example in cell.task.examples(cell.loaded, chains).items():
        try:
            chains[name].to(cell.device)(example.to(cell.device))
        except RuntimeError as error:
            if "match" not in str(error):  # such as too little memory
                raise
            text = " ".join(str(error).split())
            raise CheckpointError(
                f"The checkpoint {checkpoint} does not fit the model: {text}."
            ) from error


def changed_recipe(recipe: Recipe, given: dict[str, Any], task: str) -> Recipe:
    """Return a checkpoint's recipe with the ``given`` fields.

    A given method replaces all fields except those of the ranges. Raises CheckpointError for
    another scope, and RecipeError.
    """
    if given.get("scope", recipe.scope) != recipe.scope:
        raise CheckpointError(
            f"The checkpoint's scope is '{recipe.scope}', not '{given['scope']}': calibrate for "
            "the other scope first."
        )
    method, rest = recipe.method, dict(given)
    kept = recipe.model_dump(mode="json", exclude={"method"})
    if "method" in rest:
        method = rest.pop("method")
        kept = {name: kept[name] for name in (*recipe.names_of("ranges"), "scope")}
    return make_recipe(method, defaults(task), kept, rest)
