"""The pipeline behind every ``run``: load, full-precision score, calibrate, reconstruct, evaluate, record."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fimaq_core import NUMERICS_VERSION
from fimaq_core.checkpoint import save_checkpoint
from fimaq_core.files import remove_leftovers, replaced_whole
from fimaq_core.fisher.losses import takes_passes
from fimaq_core.pipeline import (
    Resources,
    calibrate_or_load,
    finish,
    reconstruct_or_load,
    reconstruct_with_checkpoints,
    remove_blocks,
)
from fimaq_core.progress import Report, silent
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.mlp import mlps as find_mlps
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from tasks.common.clock import StageClock
from tasks.common.environment import describe, resolve_device
from tasks.common.examples import EXAMPLES_FILE, example_file
from tasks.common.hashing import file_sha256
from tasks.common.lease import Lease, acquire, exclusively
from tasks.common.modules import merge_logs, whole_map
from tasks.common.plan import note_shared, planned_folder, variant_name
from tasks.common.prepare import Part, built_model, chains_of, check_request, checkpoint_facts, fingerprint_of, start, whole
from tasks.common.record import WAIT, BlockFigures, Calibration, Metric, ResultRecord, read_record, write_record
from tasks.common.registry import get_task
from tasks.common.request import CellRequest
from tasks.common.task import CalibrationSet, Evaluation, LoadedModel, Task


def run_cell(request: CellRequest, report: Report = silent) -> Path:
    """Measure one cell and write its record; a cell that has a valid record is not measured again.

    Args:
        request: the cell.
        report: receives progress.

    Returns:
        Path of ``result.json``; ``outcomes.npz`` and, for quantized models, ``quantized.safetensors`` are beside it.

    Raises:
        Busy: another process measures it now.
        FimaqError: anything the user can mend; finished cells and blocks are kept.
    """
    request = check_request(request)
    path = planned_folder(request) / "result.json"
    if not path.is_file():
        with acquire(path) as lease:
            if not path.is_file():
                remove_leftovers(path.parent)
                _measure(request, path, lease, report)
    read_record(path)
    return path


def _measure(request: CellRequest, path: Path, lease: Lease, report: Report) -> None:
    """Measure a cell and write its record, holding its ``lease``."""
    device = resolve_device(request.device)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    task = get_task(request.task)
    if request.recipe is None:
        _measure_full_precision(request, lease, task, device, report)
        return

    full_request = replace(request, recipe=None, variant=None)
    full_path = planned_folder(full_request) / "result.json"
    with exclusively(full_path, report) as own:
        if own is not None and not full_path.is_file():
            _measure_full_precision(full_request, own, task, device, report)
    _measure_quantized(request, request.recipe, lease, task, read_record(full_path), device, report)


def _measure_full_precision(request: CellRequest, lease: Lease, task: Task, device: torch.device, report: Report) -> None:
    clock = StageClock(device)
    loaded = task.load(request.model)
    clock.lap("load")
    model = task.assemble(loaded, {}).to(device)
    evaluation = task.evaluate(model, loaded, request.data, device, request.eval_batch, request.workers, report)
    clock.lap("evaluate")
    _write(_record(request, loaded, evaluation, evaluation.metrics, clock, device), evaluation, lease)


def _measure_quantized(
    request: CellRequest,
    recipe: Recipe,
    lease: Lease,
    task: Task,
    full: ResultRecord,
    device: torch.device,
    report: Report,
) -> None:
    clock = StageClock(device)
    loaded = task.load(request.model)
    calibration = task.calibration(loaded, request.data, recipe)
    resources = Resources(report, request.placement, request.eval_batch, request.step_engine)
    facts = checkpoint_facts(request.task, request.model, loaded)
    clock.lap("load")

    def shared(kind: str, digest: str) -> Path:
        return _shared_path(request, loaded, calibration, kind, digest)

    @contextmanager
    def alone(path: Path | None) -> Iterator[None]:
        with exclusively(path, report) as own:
            if own is not None:
                remove_leftovers(own.path.parent, own.path.name)
                if own.waited:
                    clock.lap(WAIT)
            yield

    def mlps(part: Part) -> Path:
        return shared("mlp", f"{part.address}{part.recipe.mlp_digest()}")

    parts = start(request, task, loaded, calibration, device, resources, mlps, alone)
    if recipe.reconstruct_mlp:
        reused = all(part.reused for part in parts if len(find_mlps(part.chain)))
        clock.lap("reconstruct MLPs (reused)" if reused else "reconstruct MLPs")
    folder = lease.path.parent
    blocks = folder / "blocks"
    remove_leftovers(blocks)
    log = ReconstructionLog()
    for part in parts:
        ranges = shared("calibration", f"{part.address}{part.recipe.calibration_digest()}")
        made = part.chain, part.inputs, part.recipe
        with alone(ranges):
            reused = calibrate_or_load(*made, resources, ranges, part.fingerprint, facts)
        clock.lap(part.stage("calibrate") + (" (reused)" if reused else ""))
        if recipe.reconstruct:
            own, reused = _reconstruct(part, resources, blocks, shared, alone)
            merge_logs(log, part.name, own)
            clock.lap(part.stage("reconstruct") + (" (reused)" if reused else ""))
        finish(part.chain)
    chains = chains_of(parts)
    facts |= {"stage": "reconstructed" if recipe.reconstruct else "calibrated"}
    fingerprint = fingerprint_of(request.model, loaded, calibration, recipe)
    lease.check()
    save_checkpoint(folder / "quantized.safetensors", whole(chains).state_dict(), fingerprint, facts)
    model = task.assemble(loaded, chains).to(device)
    evaluation = task.evaluate(model, loaded, request.data, device, request.eval_batch, request.workers, report)
    clock.lap("evaluate")
    record = _record(
        request,
        loaded,
        evaluation,
        full.metrics,
        clock,
        device,
        calibration=_calibration_entry(calibration, recipe, parts),
        modules=whole_map(chains, task.untouched(loaded, chains)),
        last_loss=log.last_loss,
        fisher_passes=log.fisher_passes,
        blocks={label: BlockFigures(error=error, fisher=log.fisher.get(label)) for label, error in log.error.items()},
        notes=[*request.notes, *calibration.notes, *log.sentences(), *evaluation.notes],
        step_engine=log.engine if recipe.reconstruct else None,
        skipped_images=sorted({*calibration.skipped, *evaluation.skipped}),
    )
    _write(record, evaluation, lease)
    remove_blocks(blocks)


def _reconstruct(
    part: Part,
    resources: Resources,
    blocks: Path,
    shared: Callable[[str, str], Path],
    alone: Callable[[Path], AbstractContextManager[object]],
) -> tuple[ReconstructionLog, bool]:
    """Reconstruct a part; return what was done, and whether it had been done before. Named parts are shared between scopes."""
    made = part.chain, part.inputs, part.recipe, part.divergence, resources
    if not part.name:
        return reconstruct_with_checkpoints(*made, blocks, part.fingerprint, part.teacher), False
    path = shared("reconstruction", f"{part.address}{part.recipe.digest()}")
    with alone(path):
        return reconstruct_or_load(*made, path, part.fingerprint, part.teacher)


def _calibration_entry(images: CalibrationSet, recipe: Recipe, parts: list[Part]) -> Calibration:
    passes = (recipe.reconstruct and takes_passes(recipe.loss)) or (recipe.reconstruct_mlp and recipe.mlp_loss == "perturb_mean")
    compares = passes and any(part.divergence.batch is not None for part in parts)
    return Calibration(
        ids=images.ids,
        transform=images.transform,
        fingerprint=images.fingerprint,
        captions=images.captions,
        truncated_captions=images.truncated_captions,
        batch=recipe.divergence_batch if compares else None,
    )


def _shared_path(request: CellRequest, loaded: LoadedModel, calibration: CalibrationSet, kind: str, digest: str) -> Path:
    """Where cells share what is dear, by content address: methods with the same settings so far compute it once."""
    shared = f"{digest}{loaded.sha256}{calibration.fingerprint}{NUMERICS_VERSION}{built_model(request.model, loaded)}"
    path = request.results.parent / kind / f"{hashlib.sha256(shared.encode()).hexdigest()[:24]}.safetensors"
    note_shared(request, kind, digest, path)
    return path


def _record(
    request: CellRequest,
    loaded: LoadedModel,
    evaluation: Evaluation,
    full: dict[str, Metric],
    clock: StageClock,
    device: torch.device,
    **more: Any,
) -> ResultRecord:
    """The record of a cell; ``more``: what there is of quantized models only, and fields that are others for them."""
    recipe = request.recipe
    fields: dict[str, Any] = {
        "task": request.task,
        "model": loaded.tag,
        "method": "fp" if recipe is None else recipe.method,
        "variant": variant_name(request),
        "w_bit": 32 if recipe is None else recipe.w_bits,
        "a_bit": 32 if recipe is None else recipe.a_bits,
        "seed": None if recipe is None else recipe.seed,
        "recipe": None if recipe is None else recipe.model_dump(mode="json"),
        "recipe_digest": "" if recipe is None else recipe.digest(),
        "metrics": evaluation.metrics,
        "n": evaluation.n,
        "fp_metrics": full,
        "weights": loaded.weights,
        "preprocessing": loaded.preprocessing,
        "dataset": evaluation.dataset,
        "calibration": None,
        "modules": None,
        "notes": [*request.notes, *evaluation.notes],
        "skipped_images": evaluation.skipped,
        "environment": describe(device),
        "seconds": {stage: round(value, 3) for stage, value in clock.seconds.items()},
        "peak_memory_bytes": max(clock.memory.values()),
        "stage_memory_bytes": clock.memory,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "outcomes": "outcomes.npz",
    }
    fields |= more
    fields["notes"] = list(dict.fromkeys(fields["notes"]))
    return ResultRecord(**fields)


def _write(record: ResultRecord, evaluation: Evaluation, lease: Lease) -> None:
    lease.check()
    folder = lease.path.parent
    with replaced_whole(folder / record.outcomes) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **evaluation.outcomes)
    for name, content in evaluation.files.items():
        with replaced_whole(folder / name) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    beside = {"outcomes_sha256": file_sha256(folder / record.outcomes)}
    if evaluation.examples:
        with replaced_whole(folder / EXAMPLES_FILE) as temporary:
            temporary.write_text(json.dumps(example_file(record.task, evaluation.examples)), encoding="utf-8")
        beside["examples"] = EXAMPLES_FILE
    lease.check()
    write_record(record.model_copy(update=beside), folder)
