"""The pipeline behind every ``run``: load, full-precision score, stages, evaluate, record."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fimaq_core import NUMERICS_VERSION
from fimaq_core.files import remove_leftovers, replaced_whole
from fimaq_core.fisher.losses import takes_passes
from fimaq_core.pipeline import CALIBRATE, MLPS, RECONSTRUCT, STAGES
from fimaq_core.progress import OnProgress, silent
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from fimaq_core.store import Address, CheckpointStore, Part, Pieces, Stage
from tasks.common.cell.environment import StageClock, describe, resolve_device
from tasks.common.cell.identity import note_shared, planned_folder, shared_digest, variant_name
from tasks.common.cell.lease import Lease, acquire, exclusively
from tasks.common.cell.prediction_samples import EXAMPLES_FILE, example_file
from tasks.common.cell.prepare import Prepared, check_request, prepare
from tasks.common.hashing import file_sha256
from tasks.common.models.module_map import merge_logs, whole_map
from tasks.common.record import (
    WAIT,
    BlockFigures,
    Calibration,
    Metric,
    ResultRecord,
    read_record,
    write_record,
)
from tasks.common.request import CellRequest
from tasks.common.task import Evaluation


def run_cell(request: CellRequest, on_progress: OnProgress = silent) -> Path:
    """Measure one cell and write its record; a cell that has a valid record is not measured again.

    Args:
        request: the cell.
        on_progress: receives progress.

    Returns:
        Path of ``result.json``. Beside it are ``outcomes.npz`` and, of quantized models,
        ``quantized.safetensors``.

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
                _measure(request, lease, on_progress)
    read_record(path)
    return path


def _measure(request: CellRequest, lease: Lease, on_progress: OnProgress) -> None:
    """Measure a cell and write its record, holding its ``lease``."""
    full = None if request.recipe is None else _full_precision(request, on_progress)
    clock = StageClock(resolve_device(request.device))
    cell = prepare(request, on_progress)
    clock.lap("load")
    if request.recipe is not None:
        _run_stages(cell, lease, clock, on_progress)
    evaluation = cell.evaluate(cell.chains, on_progress)
    clock.lap("evaluate")
    _write(_record(cell, evaluation, full, clock), evaluation, lease)
    Pieces(_blocks(lease), RECONSTRUCT.piece).remove()


def _full_precision(request: CellRequest, on_progress: OnProgress) -> dict[str, Metric]:
    """The metrics of the full-precision model, which is measured first where it has no record."""
    request = replace(request, recipe=None, mlp_checkpoint=None, variant=None)
    path = planned_folder(request) / "result.json"
    with exclusively(path, on_progress) as lease:
        if lease is not None and not path.is_file():
            _measure(request, lease, on_progress)
    return read_record(path).metrics


def _run_stages(cell: Prepared, lease: Lease, clock: StageClock, on_progress: OnProgress) -> None:
    """Run all stages, or load what is there of them, and write the checkpoint of the whole model."""

    def address(stage: Stage, part: Part) -> Address:
        if not stage.kind:
            return Address()
        if (
            stage is RECONSTRUCT and not part.name
        ):  # parts are shared between scopes, a whole model is not
            return Address(None, _blocks(lease))
        return Address.beside(_shared_path(cell, stage, part), stage)

    @contextmanager
    def alone(path: Path | None) -> Iterator[None]:
        with exclusively(path, on_progress) as own:
            if own is not None:
                remove_leftovers(own.path.parent, own.path.name)
                if own.waited:
                    clock.lap(WAIT)
            yield

    cell.build()
    if cell.request.mlp_checkpoint is not None:
        clock.lap(f"{MLPS.name} (reused)")
    remove_leftovers(_blocks(lease))
    store = CheckpointStore(cell.resources, address, alone)
    for stage in STAGES:
        for part in filter(stage.wanted, cell.parts):
            reused = store.run(stage, part)
            if stage.name:
                clock.lap(stage.title(part) + (" (reused)" if reused else ""))
    lease.check()
    done = RECONSTRUCT if any(map(RECONSTRUCT.wanted, cell.parts)) else CALIBRATE
    cell.save(lease.path.parent / "quantized.safetensors", done.mark)


def _blocks(lease: Lease) -> Path:
    return lease.path.parent / "blocks"


def _shared_path(cell: Prepared, stage: Stage, part: Part) -> Path:
    """Content address of what cells share: methods with the same settings so far compute it once."""
    assert cell.images is not None
    digest = shared_digest(stage.kind, part.name, part.recipe)
    shared = (
        f"{digest}{cell.loaded.sha256}{cell.images.fingerprint}{NUMERICS_VERSION}{cell.built_model}"
    )
    name = f"{hashlib.sha256(shared.encode()).hexdigest()[:24]}.safetensors"
    path = cell.request.results.parent / stage.kind / name
    note_shared(cell.request, stage.kind, digest, path)
    return path


def _record(
    cell: Prepared, evaluation: Evaluation, full: dict[str, Metric] | None, clock: StageClock
) -> ResultRecord:
    """The record of a cell. ``full``: metrics of the full-precision model; None for that model itself."""
    request, loaded, recipe, images = cell.request, cell.loaded, cell.request.recipe, cell.images
    fields: dict[str, Any] = {"calibration": None, "modules": None}
    notes, skipped = [], evaluation.skipped
    if recipe is not None and images is not None:
        log = ReconstructionLog()
        for part in cell.parts:
            merge_logs(log, part.name, part.log)
        notes = [*images.notes, *log.sentences()]
        skipped = sorted({*images.skipped, *evaluation.skipped})
        fields = {
            "calibration": _calibration(cell),
            "modules": whole_map(cell.chains, cell.task.untouched(loaded, cell.chains)),
            "last_loss": log.last_loss,
            "fisher_passes": log.fisher_passes,
            "blocks": {
                label: BlockFigures(error=error, fisher=log.fisher.get(label))
                for label, error in log.error.items()
            },
            "step_engine": log.engine if recipe.reconstruct else None,
        }
    return ResultRecord(
        task=request.task,
        model=loaded.tag,
        method="fp" if recipe is None else recipe.method,
        variant=variant_name(request),
        w_bit=32 if recipe is None else recipe.w_bits,
        a_bit=32 if recipe is None else recipe.a_bits,
        seed=None if recipe is None else recipe.seed,
        recipe=None if recipe is None else recipe.model_dump(mode="json"),
        recipe_digest="" if recipe is None else recipe.digest(),
        metrics=evaluation.metrics,
        n=evaluation.n,
        fp_metrics=evaluation.metrics if full is None else full,
        weights=loaded.weights,
        preprocessing=loaded.preprocessing,
        dataset=evaluation.dataset,
        notes=list(dict.fromkeys([*request.notes, *notes, *evaluation.notes])),
        skipped_images=skipped,
        environment=describe(cell.device),
        seconds={stage: round(value, 3) for stage, value in clock.seconds.items()},
        peak_memory_bytes=max(clock.memory.values()),
        stage_memory_bytes=clock.memory,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        outcomes="outcomes.npz",
        **fields,
    )


def _calibration(cell: Prepared) -> Calibration:
    images, recipe = cell.images, cell.request.recipe
    assert recipe is not None
    assert images is not None
    passes = (recipe.reconstruct and takes_passes(recipe.loss)) or (
        recipe.reconstruct_mlp and recipe.mlp_loss == "perturb_mean"
    )
    compares = passes and any(part.divergence.batch is not None for part in cell.parts)
    return Calibration(
        ids=images.ids,
        transform=images.transform,
        fingerprint=images.fingerprint,
        captions=images.captions,
        truncated_captions=images.truncated_captions,
        batch=recipe.divergence_batch if compares else None,
    )


def _write(record: ResultRecord, evaluation: Evaluation, lease: Lease) -> None:
    lease.check()
    folder = lease.path.parent
    with replaced_whole(folder / record.outcomes) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **evaluation.outcomes)
    beside = {"outcomes_sha256": file_sha256(folder / record.outcomes)}
    files = dict(evaluation.files)
    if evaluation.examples:
        files[EXAMPLES_FILE] = example_file(record.task, evaluation.examples)
        beside["examples"] = EXAMPLES_FILE
    for name, content in files.items():
        with replaced_whole(folder / name) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    lease.check()
    write_record(record.model_copy(update=beside), folder)
