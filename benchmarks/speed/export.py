"""Exports to ONNX on this machine: size, integer coverage, and speed beside float32."""

import importlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel

from benchmarks.console import share_text
from benchmarks.speed.workload import whole_model
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.errors import ModelError
from fimaq_core.export import require_export
from fimaq_core.export.facts import OnnxFacts
from fimaq_core.export.runtime import OnnxModel
from fimaq_core.export.timing import speed
from fimaq_core.export.writing import export_float, export_onnx
from fimaq_core.layers import decide_roundings, set_quantized
from fimaq_core.progress import silent
from fimaq_core.recipe import Recipe, make_recipe
from fimaq_core.reconstruction.reconstruct import expand_per_token
from fimaq_core.samples import Samples
from tasks.common import registry
from tasks.common.cell.environment import describe
from tasks.common.cell.prepare import prepare
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.common.task import Exportable

#: Models to export by default.
MODELS = ("vit_small", "demo_vit", "demo_deit", "demo_swin", "demo_clip", "demo_mask_rcnn")
#: Pairs of runs that a speed is measured with, by samples per run.
ROUNDS = {1: 30, 8: 12}
#: Packages whose versions decide the speed.
_PACKAGES = ("torch", "onnx", "onnxruntime")


class Ratio(BaseModel):
    """Time of the float32 file divided by the time of the file, in one process."""

    ratio: float  #: median over pairs of runs
    low: float  #: lower quartile
    high: float  #: upper quartile
    float_ms: float  #: median of the float32 file
    ms: float  #: median of the file


class ExportRecord(BaseModel):
    """Size, integer coverage and speed of an exported model on a device."""

    device: str  #: name, with the number of threads
    model: str  #: short name, with the part in brackets if the model has several
    settings: str  #: method and bits, and what was done
    weights: str  #: ``random`` or ``trained``
    bytes: int
    packed_bytes: int  #: with weights stored in 4 bits
    float_bytes: int
    integer_macs: int  #: multiply-adds per sample that onnxruntime runs in integers
    quantized_macs: int  #: those with two quantized operands
    macs: int  #: those of all quantizable layers
    speed: dict[int, Ratio]  #: by samples per run
    versions: dict[str, str]
    date: str
    revision: str  #: git revision of this project


def measure_exports(
    names: Iterable[str],
    threads: int,
    say: Callable[[str], None],
    rounds: Mapping[int, int] = ROUNDS,
) -> Iterator[ExportRecord]:
    """Export models with ranges of W4/A4 FIMA-Q, without reconstruction, and yield their records.

    ``say`` prints one line per model; ``rounds`` is as :data:`ROUNDS`. Raises ModelError if the
    extra is not installed.
    """
    require_export()
    for name in names:
        try:
            for label, exported, recipe in _exportables(name):
                say(f"{label}: export, integer coverage and speed")
                yield measure_export(label, exported, recipe, threads, rounds)
        except ModelError as error:
            say(f"{name}: left out: {error}")


def _exportables(name: str) -> Iterator[tuple[str, Exportable, Recipe]]:
    """Yield label, calibrated chain and recipe of each part of a model that has a file."""
    changes = {"calibration_images": 8, "range_images": 8, "range_search": "minmax"}
    changes |= {"w_bits": 4, "a_bits": 4}
    tags = {task: importlib.import_module(f"tasks.{task}.tags") for task in registry.TASKS}
    tasks = (task for task, module in tags.items() if name in module.DEMO_NAMES)
    if (task := next(tasks, None)) is None:
        recipe = make_recipe("fimaq", changes)
        chain, images = whole_model(name, recipe, torch.device("cpu"))
        calibrate(chain, images, recipe)
        yield name, Exportable(chain, images, lambda logits: logits.argmax(1)), recipe
        return
    recipe = make_recipe("fimaq", registry.defaults(task), changes)
    cell = prepare(CellRequest(task, ModelRequest(name), DataRequest(), recipe), silent)
    for part in cell.parts:
        calibrate(part.chain, Samples.of(part.inputs), part.recipe)
    assert cell.images is not None
    for file in cell.task.export_parts(cell.chains):
        given = cell.loaded, cell.chains, file, cell.images, DataRequest()
        yield f"{name} [{file}]" if file else name, cell.task.exportable(*given), recipe


def measure_export(
    label: str, exported: Exportable, recipe: Recipe, threads: int, rounds: Mapping[int, int]
) -> ExportRecord:
    """Export a calibrated chain without reconstruction, and return its record."""
    chain, example = exported.chain, exported.inputs[:2]
    if recipe.per_token:
        expand_per_token(chain, example[:1])
    decide_roundings(chain)
    set_quantized(chain, True)
    facts = OnnxFacts(
        model=label,
        weights_sha256="",
        recipe=recipe.model_dump(mode="json"),
        recipe_digest=recipe.digest(),
        layers=[],
    )
    with tempfile.TemporaryDirectory(prefix="fimaq-") as folder:
        own, packed, plain = (Path(folder) / f"{name}.onnx" for name in ("own", "packed", "float"))
        export_onnx(chain, example, own, facts, names=exported.names)
        smaller = facts.model_copy(update={"packed": True})
        export_onnx(chain, example, packed, smaller, names=exported.names)
        export_float(chain, example, plain, names=exported.names)
        covered = OnnxModel(own, threads).coverage()
        ratios = {batch: speed(plain, own, batch, threads, n) for batch, n in rounds.items()}
        sizes = [path.stat().st_size for path in (own, packed, plain)]
    environment = describe(torch.device("cpu"))
    return ExportRecord(
        device=f"{environment.device}, {threads} threads",
        model=label,
        settings="fimaq w4a4, calibrated only",
        weights="trained" if label.startswith("demo_") else "random",
        bytes=sizes[0],
        packed_bytes=sizes[1],
        float_bytes=sizes[2],
        integer_macs=covered.integer_macs,
        quantized_macs=covered.quantized_macs,
        macs=covered.macs,
        speed={batch: Ratio(**found._asdict()) for batch, found in ratios.items()},
        versions={name: version(name) for name in _PACKAGES},
        date=datetime.now(UTC).date().isoformat(),
        revision=environment.git_revision,
    )


def rows(records: Sequence[ExportRecord]) -> list[dict[str, str]]:
    """Return the rows of the printed table."""
    return [
        {
            "model": record.model,
            "float32, MB": f"{record.float_bytes / 1e6:.2f}",
            "int8": f"{record.bytes / record.float_bytes:.2f}",
            "packed": f"{record.packed_bytes / record.float_bytes:.2f}",
            "coverage, %": share_text(100 * record.integer_macs / max(record.quantized_macs, 1)),
            **{
                f"speed at {batch}": f"{own.ratio:.2f} ({own.low:.2f} to {own.high:.2f})"
                for batch, own in record.speed.items()
            },
        }
        for record in records
    ]
