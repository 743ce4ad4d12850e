"""Task adapter that measures nothing and fails on demand. Processes of cells can import it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.grid.cell import Adapter, Cell
from benchmarks.grid.schema import Grid, load_grid
from fimaq_core.errors import ModelError
from fimaq_core.progress import OnProgress, Progress
from fimaq_core.recipe import OFF
from tasks.common.cell.identity import planned_place, variant_name
from tasks.common.record import (
    Dataset,
    Environment,
    Metric,
    ResultRecord,
    Weights,
    cell_folder,
    write_record,
)
from tasks.common.record_entries import Exported
from tasks.common.registry import model_tag
from tasks.common.request import CellRequest, Missing

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.results.scores import Measured

LEVELS = {"rtn": 20.0, "brecq": 70.0, "qdrop": 75.0, "fimaq": 80.0}

IMAGENET = Dataset(
    name="ImageNet-1k val", split="val", count=50_000, classes=1000, fingerprint="f" * 64
)
SCENES = Dataset(
    name="digit-scenes", split="test", count=1000, classes=0, fingerprint="e" * 64, captions=1000
)
OBJECTS = Dataset(
    name="digit scenes for detection", split="test", count=150, classes=10, fingerprint="b" * 64
)
DIGITS = Dataset(name="digit-pairs", split="test", count=2000, classes=100, fingerprint="d" * 64)


#: A quarter of the size; 100 % of the products in integers, but for one multiply-add.
EXPORTED = Exported(
    sha256="a" * 64, bytes=430_000, float_bytes=1_720_000, weights="int8", signed=False,
    integer_macs=99_999, quantized_macs=100_000, macs=120_000, speed=1.625, runtime="ort 9",
)  # fmt: skip


def plain_demo(**changes: Any) -> Grid:
    """A small grid in the demo profile's settings: four methods, two bits, two seeds."""
    demo = load_grid("demo")
    small = {"methods": ("fp", "rtn", "brecq", "qdrop", "fimaq"), "seeds": (1, 2), "extra": ()}
    return demo.model_copy(
        update={"tasks": {"classification": demo.tasks["classification"]}, **small, **changes}
    )


def make_record(**changes: Any) -> ResultRecord:
    """A valid record. ``value``, ``stderr``, ``fp`` and ``recipe`` set several fields each."""
    value, stderr = changes.pop("value", 80.0), changes.pop("stderr", 0.5)
    recipe = changes.pop("recipe", None)
    n = changes.get("n", changes.get("dataset", DIGITS).count)
    fields: dict[str, Any] = {
        "task": "classification",
        "model": "demo_vit",
        "method": "fp" if recipe is None else recipe.method,
        "variant": "fp"
        if recipe is None
        else f"released [{recipe.scope}]"
        if recipe.scope
        else "released",
        "w_bit": OFF if recipe is None else recipe.w_bits,
        "a_bit": OFF if recipe is None else recipe.a_bits,
        "seed": None if recipe is None else recipe.seed,
        "recipe": None if recipe is None else recipe.model_dump(mode="json"),
        "recipe_digest": "" if recipe is None else recipe.digest(),
        "metrics": {"top1": Metric(value=value, stderr=stderr)},
        "n": n,
        "fp_metrics": {"top1": Metric(value=changes.pop("fp", 95.0), stderr=0.3)},
        "weights": Weights(tag=changes.get("model", "demo_vit"), source="test", sha256="0" * 64),
        "dataset": DIGITS.model_copy(update={"count": n}),
        "calibration": None,
        "modules": None,
        "environment": Environment(
            versions={"torch": "1", "timm": "2"}, git_revision="x", device="cpu", threads=1
        ),
        "seconds": {"evaluate": 1.0},
        "peak_memory_bytes": 1,
        "finished": "2024-01-01T00:00:00+00:00",
        "outcomes": "outcomes.npz",
    }
    return ResultRecord(**{**fields, **changes})


def fake_value(request: CellRequest) -> float:
    """The score of a cell: by method and bits, a little by model and seed."""
    recipe = request.recipe
    if recipe is None:
        return 95.0
    noise = random.Random(
        f"{request.model.name} {recipe.method} {recipe.bits_name} {recipe.seed}"
    ).gauss(0, 0.4)
    return LEVELS[recipe.method] + 2 * (recipe.w_bits - 3) + noise


def record_of(request: CellRequest, value: float) -> ResultRecord:
    """The record of a cell whose main metric is ``value``.

    Retrieval has both directions, five points apart, and a rank. Detection has masks, four points
    below the boxes.
    """
    changes: dict[str, Any] = {
        "task": request.task,
        "model": request.model.name,
        "variant": variant_name(request),
        "identity": identity_of(request),
        "exported": EXPORTED if request.export else None,
    }
    if request.task == "retrieval" and request.data.evaluation is None:
        values = {
            "R@1": value,
            "i2t_R@1": value + 2.5,
            "t2i_R@1": value - 2.5,
            "i2t_median_rank": 1.0,
        }
        metrics = {name: Metric(value=number, stderr=0.5) for name, number in values.items()}
        changes |= {"dataset": SCENES, "n": SCENES.count, "metrics": metrics, "fp_metrics": {}}
    if request.task == "detection":
        metrics = {
            name: Metric(value=number, stderr=0.5)
            for name, number in (("AP_box", value), ("AP_mask", value - 4))
        }
        changes |= {"dataset": OBJECTS, "n": OBJECTS.count, "metrics": metrics, "fp_metrics": {}}
    return make_record(recipe=request.recipe, value=value, **changes)


def placed_record(request: CellRequest, value: float) -> ResultRecord:
    """The record of a cell for its real folder, not for that of :func:`planned_folder` here."""
    own = {"model": model_tag(request.task, request.model)}
    own["identity"] = planned_place(request).identity
    return record_of(request, value).model_copy(update=own)


def identity_of(request: CellRequest) -> str:
    recipe = request.recipe
    digest = "f" * 64 if recipe is None else recipe.digest()
    if request.export:
        digest = hashlib.sha256(f"export {digest}".encode()).hexdigest()
    if request.data.path is not None or request.data.evaluation is not None:
        text = f"{digest[: 10 if recipe is None else 64]} {request.data.path} "
        digest = hashlib.sha256(f"{text}{request.data.evaluation}".encode()).hexdigest()
    return digest


def planned_folder(request: CellRequest) -> Path:
    own = request.task, request.model.name, request.recipe, identity_of(request)
    return cell_folder(request.results, *own)


def run_cell(request: CellRequest, on_progress: OnProgress) -> Path:
    """Write a record, unless ``faults.json`` beside the results says otherwise for this method."""
    faults_file = request.results.parent / "faults.json"
    faults = json.loads(faults_file.read_text()) if faults_file.is_file() else {}
    fault = faults.get("fp" if request.recipe is None else request.recipe.method)
    on_progress(Progress("evaluate", 1, 2, "block 0", 1.0))
    print("a library speaks")
    with (request.results.parent / "log.txt").open("a") as log:
        method = request.recipe.method if request.recipe else "fp"
        log.write(f"{os.getpid()} {request.model.name} {method}\n")
    if fault == "error":
        raise ValueError("it broke")
    if fault == "user error":
        raise ModelError("The weights do not fit.")
    if fault == "crash":
        os._exit(3)
    if fault == "slow":
        time.sleep(300)
    return write_record(record_of(request, fake_value(request)), planned_folder(request))


def preflight(request: CellRequest) -> list[Missing]:
    if (request.results.parent / "no-data").exists():
        return [
            Missing("the data", "Fetch it."),
            Missing(f"the weights of {request.model.name}", "Train them."),
        ]
    return []


def write_cells(
    cells: Iterable[Cell],
    value: Callable[[Cell], float],
    correct: Callable[[Cell], np.ndarray] | None = None,
) -> list[Measured]:
    """Write records of ``cells`` with the scores ``value``; return them as collected.

    ``correct`` gives outcomes of samples: 1 for a right one; for detection, its contribution.
    """
    import numpy as np  # not above: worker processes import this file, and pandas takes its time

    from benchmarks.results.scores import collect

    chosen = list(cells)
    for cell in chosen:
        request = cell.request
        record = record_of(request, value(cell))
        folder = planned_folder(request)
        if correct is not None:
            right = correct(cell)
            dataset = record.dataset.model_copy(update={"count": len(right)})
            record = record.model_copy(update={"n": len(right), "dataset": dataset})
        write_record(record, folder)
        if correct is not None:
            scores = (
                {"AP_box": right, "AP_mask": right - 0.04}
                if cell.task == "detection"
                else {"correct": right}
            )
            np.savez(
                folder / record.outcomes,
                sample=np.array([f"s{i}" for i in range(len(right))]),
                **scores,
            )
    return collect(chosen, ADAPTER).measured


ADAPTER = Adapter(run_cell, planned_folder, preflight)


def small_grid(tmp_path: Path) -> str:
    content = {
        "name": "small",
        "tasks": {
            "classification": {"dataset": "digit-pairs", "models": ["demo_vit", "demo_swin"]}
        },
        "methods": ["fp", "rtn", "fimaq"], "bits": ["w3a3"], "seeds": [1],
        "variant": "demo", "threads": 1,
    }  # fmt: skip
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)
