"""The stages of a run one by one, each from checkpoint to checkpoint."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint, load_checkpoint, read_header, save_checkpoint
from fimaq_core.errors import CheckpointError, ModelError
from fimaq_core.layers import set_quantized
from fimaq_core.progress import Report
from fimaq_core.quantize import Resources, calibrate_or_load, finish, load_mlps, reconstruct_with_checkpoints
from fimaq_core.recipe import OFF, Recipe, make_recipe
from fimaq_core.reconstruction.mlp import use_relu
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from tasks.common.environment import resolve_device
from tasks.common.facts import model_facts
from tasks.common.inspection import Inspection
from tasks.common.prepare import Start, checkpoint_facts, fingerprint_of, start
from tasks.common.registry import get_task
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.common.task import CalibrationSet, Evaluation, LoadedModel, Task

#: Recipe fields of a model without quantizers.
_FULL_PRECISION = {"w_bits": OFF, "a_bits": OFF, "s_bits": None, "head_bits": None, "patch_input_bits": OFF}


def mlp_stage(request: CellRequest, out: Path, report: Report) -> None:
    """Reconstruct the MLPs of the model of ``request`` and write them to ``out``; an ``out`` of the same run is kept."""
    assert request.recipe is not None
    # Merged anew, so that fields that do not go with MLP reconstruction are refused before it starts.
    recipe = make_recipe(request.recipe.method, request.recipe.model_dump(mode="json"), {"reconstruct_mlp": True})
    request = replace(request, recipe=recipe)
    _begin(request, report, out)


def calibrate_stage(request: CellRequest, out: Path, report: Report) -> None:
    """Calibrate the model of ``request`` and write the checkpoint ``out``; an ``out`` of the same run is kept.

    MLPs that are reconstructed on the way are kept beside it.
    """
    begun = _begin(request, report, out.with_name(f"{out.stem}.mlp.safetensors"))
    calibrate_or_load(begun.start.chain, begun.images.images, begun.recipe, begun.resources, out, begun.fingerprint, begun.facts)


@dataclass(frozen=True)
class _Begun:
    """Everything up to calibration."""

    recipe: Recipe
    start: Start
    images: CalibrationSet
    resources: Resources
    fingerprint: Fingerprint
    facts: dict[str, Any]


def _begin(request: CellRequest, report: Report, mlps: Path | None = None) -> _Begun:
    assert request.recipe is not None
    device = _start(request.device, request.threads)
    task = get_task(request.task)
    loaded = task.load(request.model)
    images = task.calibration(loaded, request.data, request.recipe)
    resources = Resources(report, request.placement, request.eval_batch, request.step_engine)
    begun = start(request, task, loaded, images, task.divergence(request.recipe), device, resources, mlps)
    fingerprint = fingerprint_of(loaded, images, request.recipe)
    return _Begun(request.recipe, begun, images, resources, fingerprint, checkpoint_facts(request, loaded))


def reconstruct_stage(
    task_name: str, checkpoint: Path, out: Path, given: dict[str, Any], data: DataRequest, options: dict[str, Any], report: Report
) -> ReconstructionLog:
    """Reconstruct a calibrated checkpoint and write ``out``; finished blocks are kept beside it until it is whole.

    Args:
        given: recipe fields that replace the checkpoint's.
        options: device, threads, eval_batch, placement, step_engine, workers, weights, weights_folder.

    Raises:
        CheckpointError: the checkpoint is of another run, or given fields would change its ranges.
    """
    fingerprint, facts = read_header(checkpoint)
    if facts.get("stage") != "calibrated":
        raise CheckpointError(
            f"The checkpoint {checkpoint} is of stage '{facts.get('stage')}': reconstruct needs a calibrated one."
        )
    recipe = _changed(fingerprint.recipe, given)
    device = _start(options["device"], options["threads"])
    task, loaded = _load(task_name, checkpoint, facts, options)
    calibration = task.calibration(loaded, data, recipe)
    expected = fingerprint_of(loaded, calibration, recipe)
    chain = task.build(loaded, recipe).to(device)
    teacher = None
    if recipe.reconstruct_mlp:
        teacher = copy.deepcopy(chain)
        use_relu(chain)
    load_checkpoint(checkpoint, chain, expected, "ranges")
    blocks = out.with_name(f"{out.stem}.blocks")
    log = reconstruct_with_checkpoints(
        chain,
        calibration.images,
        recipe,
        task.divergence(recipe),
        Resources(report, options["placement"], options["eval_batch"], options["step_engine"]),
        blocks,
        expected,
        teacher,
    )
    finish(chain)
    save_checkpoint(out, chain.state_dict(), expected, {**facts, "stage": "reconstructed"})
    for file in blocks.glob("block-*.safetensors"):
        file.unlink()
    if blocks.is_dir():
        blocks.rmdir()
    return log


def evaluate_stage(task_name: str, checkpoint: Path, data: DataRequest, options: dict[str, Any], report: Report) -> Evaluation:
    """Evaluate a checkpoint of any stage. ``options`` as in :func:`reconstruct_stage`."""
    fingerprint, facts = read_header(checkpoint)
    device = _start(options["device"], options["threads"])
    task, loaded = _load(task_name, checkpoint, facts, options)
    chain = _restored(task, loaded, checkpoint, fingerprint, facts).to(device)
    return task.evaluate(chain, loaded, data, device, options["eval_batch"], options["workers"], report)


def inspect_stage(task_name: str, checkpoint: Path, options: dict[str, Any]) -> Inspection:
    """Facts about the model in a checkpoint of any stage. Needs its float weights, but no data.

    Args:
        options: weights, weights_folder.

    Raises:
        CheckpointError: no checkpoint, of another task, or made from other weights.
        ModelError: the task does not say what images the model takes.
    """
    fingerprint, facts = read_header(checkpoint)
    task, loaded = _load(task_name, checkpoint, facts, options)
    if loaded.input_shape is None:
        raise ModelError(
            f"Task '{task_name}' does not say what images {loaded.tag} takes, so its operations cannot be counted: "
            "its load must set LoadedModel.input_shape."
        )
    chain = _restored(task, loaded, checkpoint, fingerprint, facts)
    measured = model_facts(chain, torch.zeros(1, *loaded.input_shape))
    return Inspection(checkpoint, task_name, loaded.tag, facts["stage"], fingerprint, measured)


def _restored(task: Task, loaded: LoadedModel, checkpoint: Path, fingerprint: Fingerprint, facts: dict[str, Any]) -> BlockChain:
    """The model of a checkpoint of any stage, in its quantized form (of stage ``mlp``: with its MLPs, in full precision)."""
    if fingerprint.weights != loaded.sha256:
        raise CheckpointError(
            f"The checkpoint {checkpoint} was made from other weights (sha256 {fingerprint.weights[:12]}) than those found now "
            f"({loaded.sha256[:12]})."
        )
    if facts.get("stage") == "mlp":
        chain = task.build(loaded, fingerprint.recipe.model_copy(update=_FULL_PRECISION))
        load_mlps(chain, checkpoint, None)
        return chain
    chain = task.build(loaded, fingerprint.recipe)
    if fingerprint.recipe.reconstruct_mlp:
        use_relu(chain)
    load_checkpoint(checkpoint, chain, None)
    set_quantized(chain, True)
    return chain


def _changed(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """The checkpoint's recipe with ``given`` fields; a given method replaces everything that does not determine ranges."""
    ranges = {name: getattr(recipe, name) for name in recipe.range_fields()}
    method = given.get("method")
    kept = ranges if method is not None else recipe.model_dump(mode="json", exclude={"method"})
    return make_recipe(method or recipe.method, kept, {name: value for name, value in given.items() if name != "method"})


def _load(task_name: str, checkpoint: Path, facts: dict[str, Any], options: dict[str, Any]) -> tuple[Task, LoadedModel]:
    if facts.get("task") != task_name:
        raise CheckpointError(f"The checkpoint {checkpoint} is of task {facts.get('task')!r}, not {task_name!r}.")
    task = get_task(task_name)
    request = ModelRequest(facts["model"], facts["model_args"])
    request = replace(request, weights=options["weights"], weights_folder=options["weights_folder"])
    return task, task.load(request)


def _start(device: str, threads: int | None) -> torch.device:
    if threads is not None:
        torch.set_num_threads(threads)
    return resolve_device(device)
