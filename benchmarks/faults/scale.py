"""How long it takes to plan a grid of many cells, and to make the tables of as many finished ones."""

import hashlib
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks import summary, tables
from benchmarks.cells import Cell, Places, RunOptions, default_adapter
from benchmarks.grid import Filters, expand, load_grid
from benchmarks.plan import plan_of
from benchmarks.schema import Grid
from tasks.classification.tags import SHORT_NAMES
from tasks.common import sealing
from tasks.common.plan import variant_name
from tasks.common.record import (
    BlockFigures,
    Calibration,
    Dataset,
    Environment,
    LayerEntry,
    Metric,
    ModuleMap,
    ResultRecord,
    Weights,
)

T = TypeVar("T")

_METHODS = ("rtn", "repq", "ptq4vit", "adalog", "erq", "brecq", "qdrop", "pdquant", "adalog-recon", "aphq", "fimaq", "lsvit")
_BITS = ("w3a3", "w4a4", "w4a8", "w6a6", "w8a8")

#: Of each record, as large models on ImageNet have them.
_LAYERS, _IMAGES, _SAMPLES = 100, 1024, 2000


def plan_and_aggregate(cells: int, folder: Path) -> dict[str, Any]:
    """Plan a grid and make its tables, as the commands do it with the real adapter, and return the seconds of each step.

    Args:
        cells: of the grid, 100 or more.
        folder: for the grid, its records (about 70 kB a cell) and tables; empty.

    Returns:
        ``cells``; seconds: ``expand``, ``plan`` (without ``expand``; nothing is finished), ``write`` (of records, no part of
        what is measured), ``collect``, ``frame``, ``report``, ``csv``; ``cpu``: the same in seconds of processor time, on which
        other processes bear less.
    """
    options = RunOptions(results=folder, data=Places(imagenet=folder / "imagenet"))
    grid = _grid(cells, folder)
    adapter = default_adapter()
    adapter.planned_folder(expand(grid, Filters(), options)[0].request)  # imports what commands import anyway
    found: dict[str, Any] = {"cells": cells, "cpu": {}}

    def timed(name: str, work: Callable[[], T]) -> T:
        start, busy = time.perf_counter(), time.process_time()
        result = work()
        found[name], found["cpu"][name] = round(time.perf_counter() - start, 3), round(time.process_time() - busy, 3)
        return result

    planned = timed("expand", lambda: expand(grid, Filters(), options))[:cells]
    text = timed("plan", lambda: plan_of(grid, Filters(), options, adapter, planned, jobs=8))
    assert f"{cells} cells, 0 done, {cells} to run." in text
    timed("write", lambda: write_records(planned, adapter.planned_folder))
    measured = timed("collect", lambda: tables.collect(planned, adapter))
    assert len(measured) == cells
    table = timed("frame", lambda: tables.frame(measured))
    timed("report", lambda: summary.report(grid.name, measured, planned))
    timed("csv", lambda: tables.csv_text(table))
    return found


def _grid(cells: int, folder: Path) -> Grid:
    """A grid of at least so many cells: more seeds for more cells."""
    methods, models = len(_METHODS), len(SHORT_NAMES)
    seeds = -(-(cells - models) // (methods * models * len(_BITS)))
    content = {
        "name": "scale", "methods": ["fp", *_METHODS], "bits": list(_BITS), "seeds": list(range(max(seeds, 1))),
        "tasks": {"classification": {"dataset": "ImageNet-1k val", "data": "imagenet", "models": list(SHORT_NAMES)}},
    }  # fmt: skip
    path = folder / "scale.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_grid(str(path))


def write_records(cells: Sequence[Cell], planned_folder: Callable[[Any], Path]) -> None:
    """Write a record as large as real ones and outcomes for each cell; neither is forced to the disk, this is for a moment."""
    outcomes = [_outcomes(seed) for seed in range(8)]
    scores: dict[str, Metric] = {}
    for cell, (content, share, digest) in zip(cells, itertools.cycle(outcomes), strict=False):
        path = planned_folder(cell.request)
        path.mkdir(parents=True, exist_ok=True)
        metric = Metric(value=100 * share, stderr=1.0)
        full = scores.setdefault(cell.model, metric)
        record = _record(cell, metric, full, digest).model_dump(mode="json")
        record[sealing.FIELD] = sealing.fingerprint(record)
        (path / "result.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        (path / "outcomes.npz").write_bytes(content)


def _outcomes(seed: int) -> tuple[bytes, float, str]:
    """A file of outcomes, the share of samples that are right, and the file's sha256."""
    rng = np.random.default_rng(seed)
    correct = rng.random(_SAMPLES) < 0.5 + 0.04 * seed
    numbers = {name: rng.integers(0, 1000, _SAMPLES, dtype=np.int32) for name in ("label", "predicted", "rank")}
    file = io.BytesIO()
    sample = np.array([f"val/n{index // 50:08d}/ILSVRC2012_val_{index:08d}.JPEG" for index in range(_SAMPLES)])
    np.savez_compressed(file, allow_pickle=False, sample=sample, correct=correct, **numbers)
    content = file.getvalue()
    return content, float(correct.mean()), hashlib.sha256(content).hexdigest()


def _record(cell: Cell, metric: Metric, full: Metric, digest: str) -> ResultRecord:
    recipe = cell.request.recipe
    blocks = {} if recipe is None or not recipe.reconstruct else {f"blocks.{number}": 0.25 for number in range(12)}
    return ResultRecord(
        task=cell.task, model=SHORT_NAMES[cell.model], method=cell.method, variant=variant_name(cell.request), w_bit=cell.w_bit,
        a_bit=cell.a_bit, seed=cell.seed, recipe=None if recipe is None else recipe.model_dump(mode="json"),
        recipe_digest="" if recipe is None else recipe.digest(), metrics={"top1": metric, "top5": metric}, n=_SAMPLES,
        fp_metrics={"top1": full, "top5": full},
        weights=Weights(tag=SHORT_NAMES[cell.model], source="scale", sha256="0" * 64),
        dataset=Dataset(name="ImageNet-1k val", split="val", count=_SAMPLES, classes=1000, fingerprint="f" * 64),
        calibration=None if recipe is None else Calibration(ids=list(_ids()), transform="train", fingerprint="c" * 64),
        modules=None if recipe is None else ModuleMap(quantized=list(_layers(cell)), full_precision=["norm", "fc_norm"]),
        last_loss=blocks, fisher_passes=dict.fromkeys(blocks, 5), blocks={name: BlockFigures(error=0.1) for name in blocks},
        environment=Environment(versions={"torch": "2.11.0"}, git_revision="x", device="cpu", threads=1),
        seconds={"load": 1.0, "calibrate": 10.0, "reconstruct": 100.0, "evaluate": 5.0}, peak_memory_bytes=10**9,
        finished="2024-01-01T00:00:00+00:00", outcomes="outcomes.npz", outcomes_sha256=digest,
    )  # fmt: skip


def _ids() -> Iterator[str]:
    return (f"train/n{index % 1000:08d}/n{index % 1000:08d}_{index}.JPEG" for index in range(_IMAGES))


def _layers(cell: Cell) -> Iterator[LayerEntry]:
    for index in range(_LAYERS):
        yield LayerEntry(
            name=f"blocks.{index // 8}.attn.layer{index % 8}", kind="linear", weight_bits=cell.w_bit, input_bits=cell.a_bit,
            weight_ranges="channel", input_ranges="token",
        )  # fmt: skip
