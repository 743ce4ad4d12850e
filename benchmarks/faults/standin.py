"""A cell that does no work: one second in which it writes all that a real cell writes."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.cells import Adapter
from benchmarks.faults.audit import note
from fimaq_core.files import replaced_whole
from fimaq_core.progress import Progress, Report
from tasks.common import anew
from tasks.common.lease import acquire
from tasks.common.plan import planned_folder, variant_name
from tasks.common.record import Dataset, Environment, LayerEntry, Metric, ModuleMap, ResultRecord, Weights, write_record
from tasks.common.request import CellRequest, Missing

#: Seconds a cell, its blocks, kilobytes of a block's checkpoint, its layers and samples.
SECONDS, BLOCKS, BLOCK_KB, LAYERS, SAMPLES = 1.0, 12, 300, 60, 2000


def run_cell(request: CellRequest, report: Report) -> Path:
    """Write one checkpoint per block, outcomes and a record, under a lease and with progress.

    A cell takes :data:`SECONDS`. One that is done when the lease is taken is not measured again,
    as with real cells.
    """
    began, path = time.monotonic(), planned_folder(request) / "result.json"
    results, name = request.results.parent, str(path.parent.relative_to(request.results))
    with acquire(path) as lease:
        if anew.is_done(path, request.force):
            return path
        note(results, "begun", name)
        blocks = path.parent / "blocks"
        block = {"weight": np.zeros((BLOCK_KB, 256), np.float32)}
        for index in range(BLOCKS):
            report(Progress("reconstruct", index, BLOCKS, f"blocks.{index}", 1.0))
            with replaced_whole(blocks / f"block-{index:03d}.safetensors") as temporary:
                save_file(block, temporary)
            time.sleep(max(0.0, began + SECONDS * (index + 1) / (BLOCKS + 1) - time.monotonic()))
        outcomes = {"sample": np.array([f"image {i:06d}" for i in range(SAMPLES)]), "correct": np.ones(SAMPLES, bool)}
        with replaced_whole(path.parent / "outcomes.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **outcomes)
        with replaced_whole(path.parent / "examples.json") as temporary:
            temporary.write_text(json.dumps({"task": request.task, "samples": []}), encoding="utf-8")
        with replaced_whole(path.parent / "quantized.safetensors") as temporary:
            save_file({f"block.{index}": block["weight"] for index in range(BLOCKS)}, temporary)
        time.sleep(max(0.0, began + SECONDS - time.monotonic()))
        lease.check()
        write_record(_record(request), path.parent)
        for file_name in blocks.iterdir():
            file_name.unlink()
        blocks.rmdir()
        note(results, "measured", name)
        anew.end(path, request.force)
    return path


def _record(request: CellRequest) -> ResultRecord:
    recipe = request.recipe
    layer = {"kind": "QuantLinear", "weight_bits": 4, "input_bits": 4, "weight_ranges": "channel", "input_ranges": "tensor"}
    quantized = [LayerEntry.model_validate({"name": f"blocks.{index}.mlp.fc1", **layer}) for index in range(LAYERS)]
    return ResultRecord(
        task=request.task,
        model=request.model.name,
        method="fp" if recipe is None else recipe.method,
        variant=variant_name(request),
        w_bit=32 if recipe is None else recipe.w_bits,
        a_bit=32 if recipe is None else recipe.a_bits,
        seed=None if recipe is None else recipe.seed,
        recipe=None if recipe is None else recipe.model_dump(mode="json"),
        recipe_digest="" if recipe is None else recipe.digest(),
        metrics={"top1": Metric(value=50.0, stderr=1.0)},
        n=SAMPLES,
        fp_metrics={"top1": Metric(value=50.0, stderr=1.0)},
        weights=Weights(tag=request.model.name, source="none: a stand-in", sha256="0" * 64),
        dataset=Dataset(name="none", split="test", count=SAMPLES, classes=2, fingerprint="0" * 64),
        calibration=None,
        modules=ModuleMap(quantized=quantized, full_precision=["norm"]),
        environment=Environment(versions={}, git_revision="", device="none: a stand-in", threads=1),
        seconds={"evaluate": SECONDS},
        peak_memory_bytes=0,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        outcomes="outcomes.npz",
    )


def _preflight(request: CellRequest) -> list[Missing]:
    return []


def stand_in() -> Adapter:
    """The adapter of such cells."""
    return Adapter(run_cell, planned_folder, _preflight)
