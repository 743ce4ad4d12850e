"""Outputs of a cell: its record, the outcomes of samples, example predictions."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import numpy as np

from fimaq_core.files import replaced_whole
from fimaq_core.fisher.losses import takes_passes
from fimaq_core.pipeline import RECONSTRUCT
from fimaq_core.recipe import OFF
from fimaq_core.store import Pieces
from tasks.common import record as records
from tasks.common.cell.environment import describe
from tasks.common.cell.full_precision import FullPrecision, write_raw
from tasks.common.cell.identity import variant_name
from tasks.common.cell.lease import Lease
from tasks.common.cell.prediction_samples import EXAMPLES_FILE
from tasks.common.cell.prepare import PreparedCell
from tasks.common.fidelity import Fidelity
from tasks.common.hashing import file_sha256
from tasks.common.models.module_map import whole_map
from tasks.common.task import Evaluation

#: Note of a record without fidelity.
OTHER_SAMPLES = "no fidelity: the full-precision model gave outputs for other samples"


def write_outputs(
    cell: PreparedCell,
    evaluation: Evaluation,
    full: FullPrecision | None,
    lease: Lease,
    identity: str,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write outcomes and further files and, as the last file, the record; remove finished blocks.

    ``full`` is the cell of the full-precision model; None if this cell is that one.
    ``changes`` are fields of the record that the cell does not tell.
    """
    cell.clock.lap("evaluate")
    record, folder = _record(cell, evaluation, full, identity), lease.path.parent
    record = record.model_copy(update=changes)
    samples, fidelity = evaluation.outcomes["sample"].tolist(), Fidelity()
    if full is not None and evaluation.outputs:
        reference = full.outputs(samples, cell.resources.on_progress)
        fidelity = cell.task.fidelity(reference, evaluation, cell.loaded, cell.request.data)
        if not reference:
            record = record.model_copy(update={"notes": [*record.notes, OTHER_SAMPLES]})
    lease.check()
    outcomes = {**evaluation.outcomes, **fidelity.outcomes}
    with replaced_whole(folder / record.outcomes) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **outcomes)
    beside: dict[str, Any] = {"outcomes_sha256": file_sha256(folder / record.outcomes)}
    beside["fidelity"] = fidelity.metrics
    if full is None:
        raw = write_raw(folder, evaluation.outputs, samples)
        beside["artefacts"] = {**record.artefacts, **raw}
    files = dict(evaluation.files)
    if evaluation.examples:
        files[EXAMPLES_FILE] = {"task": record.task, "samples": evaluation.examples}
        beside["examples"] = EXAMPLES_FILE
    for name, content in files.items():
        with replaced_whole(folder / name) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    lease.check()
    records.write_record(record.model_copy(update=beside), folder)
    Pieces(folder / "blocks", RECONSTRUCT.piece).remove()


def _record(
    cell: PreparedCell, evaluation: Evaluation, full: FullPrecision | None, identity: str
) -> records.ResultRecord:
    """Return the record of a cell, without the facts about the files beside it."""
    request, loaded, recipe, images = cell.request, cell.loaded, cell.request.recipe, cell.images
    fields: dict[str, Any] = {"method": "fp", "recipe_digest": "", "w_bit": OFF, "a_bit": OFF}
    fields |= dict.fromkeys(("seed", "recipe", "calibration", "modules"))
    notes, skipped = [], evaluation.skipped
    if recipe is not None:
        log = cell.log
        notes = [*images.notes, *log.sentences()]
        skipped = sorted({*images.skipped, *evaluation.skipped})
        fields = {
            "method": recipe.method,
            "w_bit": recipe.w_bits,
            "a_bit": recipe.a_bits,
            "seed": recipe.seed,
            "recipe": recipe.model_dump(mode="json"),
            "recipe_digest": recipe.digest(),
            "calibration": _calibration(cell),
            "modules": whole_map(cell.chains, cell.task.untouched(loaded, cell.chains)),
            "last_loss": log.last_loss,
            "fisher_passes": log.fisher_passes,
            "blocks": {
                label: records.BlockFigures(error=error, fisher=log.fisher.get(label))
                for label, error in log.error.items()
            },
            "step_engine": log.engine if recipe.reconstruct else None,
        }
    clock = cell.clock
    return records.ResultRecord(
        identity=identity,
        task=request.task,
        model=loaded.tag,
        model_args=request.model.model_args,
        artefacts=dict(sorted(cell.artefacts.items())),
        variant=variant_name(request),
        metrics=evaluation.metrics,
        n=evaluation.n,
        fp_metrics=(evaluation if full is None else full).metrics,
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


def _calibration(cell: PreparedCell) -> records.Calibration:
    """Return the calibration images in the form of a record."""
    images, recipe = cell.images, cell.request.recipe
    passes = (recipe.reconstruct and takes_passes(recipe.loss)) or recipe.finish_steps > 0
    passes |= recipe.reconstruct_mlp and recipe.mlp_loss == "perturb_mean"
    compares = passes and any(part.divergence.batch is not None for part in cell.parts)
    same = ("ids", "transform", "fingerprint", "captions", "truncated_captions")
    same += ("dataset", "split", "listed")
    return records.Calibration(
        **{name: getattr(images, name) for name in same},
        batch=recipe.divergence_batch if compares else None,
    )
