"""The stages of a run one by one, each from checkpoint to checkpoint."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fimaq_core.checkpoint import Fingerprint, load_checkpoint, save_checkpoint
from fimaq_core.errors import CheckpointError
from fimaq_core.files import remove
from fimaq_core.layers import set_quantized
from fimaq_core.pipeline import (
    Resources,
    blocks_beside,
    calibrate_or_load,
    finish,
    load_mlps,
    reconstruct_with_checkpoints,
    remove_blocks,
)
from fimaq_core.progress import Report
from fimaq_core.recipe import OFF, Recipe, make_recipe
from fimaq_core.reconstruction.mlp import mlps, use_relu
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from tasks.common.environment import resolve_device
from tasks.common.facts import joined_facts, model_facts
from tasks.common.inspection import Inspection
from tasks.common.modules import merge_logs
from tasks.common.origin import read_origin
from tasks.common.prepare import (
    Part,
    all_segments,
    chains_of,
    check_request,
    checkpoint_facts,
    fingerprint_of,
    make_parts,
    start,
    whole,
)
from tasks.common.preprocessing import replaced
from tasks.common.registry import defaults, get_task
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.common.task import Chains, Evaluation, LoadedModel, Task

#: Recipe fields of a model without quantizers.
_FULL_PRECISION = {"w_bits": OFF, "a_bits": OFF, "s_bits": None, "head_bits": None, "patch_input_bits": OFF}


def mlp_stage(request: CellRequest, out: Path, report: Report) -> list[str]:
    """Reconstruct the MLPs of the model of ``request`` and write them to ``out``.

    An ``out`` of the same run is kept.

    Returns:
        Notes on the weights and the calibration images.
    """
    assert request.recipe is not None
    # Merged anew, so that fields that do not go with MLP reconstruction are refused before it starts.
    recipe = make_recipe(request.recipe.method, request.recipe.model_dump(mode="json"), {"reconstruct_mlp": True})
    request = replace(request, recipe=recipe, mlp_checkpoint=out if out.is_file() else None)
    begun = _begin(request, report, lambda part: _beside(out, part.name) if part.name else out)
    if not out.is_file():
        segments = all_segments(chains_of(begun.parts))
        save_checkpoint(out, mlps(segments).state_dict(), begun.fingerprint, {**begun.facts, "stage": "mlp"})
    for part in begun.parts:
        if part.name:
            remove(_beside(out, part.name))
    return begun.notes


def calibrate_stage(request: CellRequest, out: Path, report: Report) -> list[str]:
    """Calibrate the model of ``request`` and write the checkpoint ``out``; an ``out`` of the same run is kept.

    MLPs that are reconstructed on the way are kept beside it.

    Returns:
        Notes on the weights and the calibration images.
    """
    begun = _begin(request, report, lambda part: _beside(_beside(out, "mlp"), part.name))
    chains = chains_of(begun.parts)
    if out.is_file():
        load_checkpoint(out, whole(chains), begun.fingerprint, "ranges")
        return begun.notes
    for part in begun.parts:
        kept = _beside(out, part.name) if part.name else None
        calibrate_or_load(part.chain, part.inputs, part.recipe, begun.resources, kept, part.fingerprint, begun.facts)
    save_checkpoint(out, whole(chains).state_dict(), begun.fingerprint, {"stage": "calibrated", **begun.facts})
    for part in begun.parts:
        if part.name:
            remove(_beside(out, part.name))
    return begun.notes


def _beside(path: Path, name: str) -> Path:
    """The file that belongs to ``path`` and has ``name`` in its own; ``path`` itself for no name."""
    return path.with_name(f"{path.stem}.{name}{path.suffix}") if name else path


@dataclass(frozen=True)
class _Begun:
    """Everything up to calibration."""

    parts: list[Part]
    resources: Resources
    fingerprint: Fingerprint
    facts: dict[str, Any]
    notes: list[str]


def _begin(request: CellRequest, report: Report, kept: Callable[[Part], Path | None]) -> _Begun:
    request = check_request(request)
    assert request.recipe is not None
    device = _start(request.device, request.threads)
    task = get_task(request.task)
    loaded = task.load(request.model)
    images = task.calibration(loaded, request.data, request.recipe)
    resources = Resources(report, request.placement, request.eval_batch, request.step_engine)
    parts = start(request, task, loaded, images, device, resources, kept)
    facts = checkpoint_facts(request.task, request.model, loaded)
    fingerprint = fingerprint_of(request.model, loaded, images, request.recipe)
    return _Begun(parts, resources, fingerprint, facts, [*_notes(loaded), *images.notes])


def reconstruct_stage(
    task_name: str, checkpoint: Path, out: Path, given: dict[str, Any], data: DataRequest, options: dict[str, Any], report: Report
) -> ReconstructionLog:
    """Reconstruct a calibrated checkpoint and write ``out``; finished blocks are kept beside it until it is whole.

    Args:
        given: recipe fields that replace the checkpoint's.
        options: device, threads, eval_batch, placement, step_engine, workers, weights, weights_folder;
            weights_entry and preprocessing replace what the checkpoint was made with.

    Raises:
        CheckpointError: the checkpoint is of another run, or given fields would change its ranges.
    """
    fingerprint, facts = read_origin(checkpoint, task_name)
    if facts["stage"] != "calibrated":
        raise CheckpointError(f"The checkpoint {checkpoint} is of stage '{facts['stage']}': reconstruct needs a calibrated one.")
    recipe = _changed(fingerprint.recipe, given, defaults(task_name))
    device = _start(options["device"], options["threads"])
    task, model, loaded = _load(task_name, facts, options)
    calibration = task.calibration(loaded, data, recipe)
    expected = fingerprint_of(model, loaded, calibration, recipe)
    parts = make_parts(task, model, loaded, calibration, recipe, device, options["eval_batch"])
    chains = chains_of(parts)
    if recipe.reconstruct_mlp:
        parts = [replace(part, teacher=copy.deepcopy(part.chain)) for part in parts]
        use_relu(all_segments(chains))
    load_checkpoint(checkpoint, whole(chains), expected, "ranges")
    resources = Resources(report, options["placement"], options["eval_batch"], options["step_engine"])
    log = ReconstructionLog(notes=[*_notes(loaded), *calibration.notes])
    for part in parts:
        blocks = blocks_beside(_beside(out, part.name))
        made = part.chain, part.inputs, part.recipe, part.divergence, resources
        merge_logs(log, part.name, reconstruct_with_checkpoints(*made, blocks, part.fingerprint, part.teacher))
        finish(part.chain)
    facts = {**checkpoint_facts(task_name, model, loaded), "stage": "reconstructed"}
    save_checkpoint(out, whole(chains).state_dict(), expected, facts)
    for part in parts:
        remove_blocks(blocks_beside(_beside(out, part.name)))
    return log


def evaluate_stage(task_name: str, checkpoint: Path, data: DataRequest, options: dict[str, Any], report: Report) -> Evaluation:
    """Evaluate a checkpoint of any stage. ``options`` as in :func:`reconstruct_stage`."""
    fingerprint, facts = read_origin(checkpoint, task_name)
    device = _start(options["device"], options["threads"])
    task, _, loaded = _load(task_name, facts, options)
    model = task.assemble(loaded, _restored(task, loaded, checkpoint, fingerprint, facts)).to(device)
    evaluation = task.evaluate(model, loaded, data, device, options["eval_batch"], options["workers"], report)
    said = [*_notes(loaded), *replaced(facts.get("preprocessing", {}), options.get("preprocessing", {}))]
    return replace(evaluation, notes=[*said, *evaluation.notes])


def inspect_stage(task_name: str, checkpoint: Path, options: dict[str, Any]) -> Inspection:
    """Facts about the model in a checkpoint of any stage. Needs its float weights, but no data.

    Args:
        options: weights, weights_folder, weights_entry.

    Raises:
        CheckpointError: no checkpoint, of another task, or made from other weights.
        ModelError: the task does not say what images the model takes.
    """
    fingerprint, facts = read_origin(checkpoint, task_name)
    task, _, loaded = _load(task_name, facts, options)
    chains = _restored(task, loaded, checkpoint, fingerprint, facts)
    inputs, untouched = task.examples(loaded, chains), task.untouched(loaded, chains)
    measured = joined_facts({name: model_facts(chain, inputs[name]) for name, chain in chains.items()}, untouched)
    return Inspection(
        checkpoint,
        task_name,
        loaded.tag,
        facts["stage"],
        fingerprint,
        measured,
        tuple(untouched),
        loaded.entry,
        loaded.preprocessing,
    )


def _restored(task: Task, loaded: LoadedModel, checkpoint: Path, fingerprint: Fingerprint, facts: dict[str, Any]) -> Chains:
    """The model of a checkpoint of any stage, in its quantized form (of stage ``mlp``: with its MLPs, in full precision)."""
    if fingerprint.weights != loaded.sha256:
        raise CheckpointError(
            f"The checkpoint {checkpoint} was made from other weights (sha256 {fingerprint.weights[:12]}) than those found now "
            f"({loaded.sha256[:12]})."
        )
    if facts["stage"] == "mlp":
        chains = task.chains(loaded, fingerprint.recipe.model_copy(update=_FULL_PRECISION))
        load_mlps(all_segments(chains), checkpoint, None)
        return chains
    chains = task.chains(loaded, fingerprint.recipe)
    if fingerprint.recipe.reconstruct_mlp:
        use_relu(all_segments(chains))
    load_checkpoint(checkpoint, whole(chains), None)
    set_quantized(whole(chains), True)
    return chains


def _changed(recipe: Recipe, given: dict[str, Any], usual: dict[str, Any]) -> Recipe:
    """The checkpoint's recipe with ``given`` fields; a given method replaces everything that does not determine ranges.

    Args:
        usual: fields that the task sets for every method alike.
    """
    ranges = {name: getattr(recipe, name) for name in (*recipe.range_fields(), "scope")}
    if given.get("scope", recipe.scope) != recipe.scope:
        raise CheckpointError(f"The checkpoint's scope is '{recipe.scope}', not '{given['scope']}': calibrate for that one.")
    method = given.get("method")
    kept = ranges if method is not None else recipe.model_dump(mode="json", exclude={"method"})
    return make_recipe(method or recipe.method, usual, kept, {name: value for name, value in given.items() if name != "method"})


def _load(task_name: str, facts: dict[str, Any], options: dict[str, Any]) -> tuple[Task, ModelRequest, LoadedModel]:
    task = get_task(task_name)
    request = ModelRequest(
        facts["model"],
        facts["model_args"],
        options["weights"],
        options["weights_folder"],
        options.get("weights_entry") or facts.get("weights_entry"),
        facts.get("preprocessing", {}) | options.get("preprocessing", {}),
    )
    return task, request, task.load(request)


def _notes(loaded: LoadedModel) -> list[str]:
    """Which weights were taken, and how images are prepared."""
    own = loaded.preprocessing
    return [*loaded.weights.notes(), *([] if own is None else [f"preprocessing: {own.text()}"])]


def _start(device: str, threads: int | None) -> torch.device:
    if threads is not None:
        torch.set_num_threads(threads)
    return resolve_device(device)
