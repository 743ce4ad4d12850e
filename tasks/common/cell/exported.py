"""Measurement of exported ONNX files, which takes the place of the simulated model's."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.export.opening import OnnxFile, open_onnx
from fimaq_core.export.runtime import OnnxModel
from fimaq_core.export.writing import Normalise
from fimaq_core.progress import OnProgress
from tasks.common.cell.checkpointed import SAME
from tasks.common.cell.export import ExportForm, export_stage, speed_text
from tasks.common.cell.full_precision import FullPrecision
from tasks.common.cell.identity import variant_name
from tasks.common.cell.lease import Lease
from tasks.common.cell.origin import read_origin
from tasks.common.cell.outputs import write_outputs
from tasks.common.cell.prepare import PreparedCell, prepare
from tasks.common.cell.stages import restored
from tasks.common.record import Exported, read_record
from tasks.common.request import CellRequest


class FromNormalised(nn.Module):
    """Model of normalised images (n, C, H, W), made of a file that takes uint8 (n, H, W, C)."""

    def __init__(self, model: OnnxModel, normalise: Normalise) -> None:
        super().__init__()
        self.model, self.normalise = model, normalise

    def forward(self, images: Tensor) -> Any:
        return self.model(self.normalise.undo(images))


def measure_export(
    request: CellRequest,
    simulated: Path,
    full: FullPrecision,
    lease: Lease,
    identity: str,
    on_progress: OnProgress,
) -> None:
    """Export the checkpoint of a finished quantized cell, measure the files, write the record.

    Args:
        request: the resolved request of the export.
        simulated: record of the quantized cell, with the checkpoint beside it.
        full: cell of the full-precision model.
        lease: of the record to write; the files lie beside it.
        identity: of the cell.
        on_progress: receives progress.
    """
    base = read_record(simulated)
    checkpoint, out = simulated.parent / "quantized.safetensors", lease.path.parent / "model.onnx"
    start = time.monotonic()
    reports = export_stage(request, checkpoint, out, ExportForm(), on_progress, all_parts=True)
    seconds = {"export": time.monotonic() - start}
    # A detector's quantized heads are not in the file, so they are taken from the checkpoint.
    scope = reports[0].facts.recipe.get("scope")
    heads = len(reports) == 1 and request.recipe is not None and scope != request.recipe.scope
    lease.check()
    notes = [*base.notes, *(line for one in reports for line in one.lines()[:2])]
    changes = {**{name: getattr(base, name) for name in SAME}, "notes": notes}
    files = {one.part: open_onnx(one.path) for one in reports}
    rest = checkpoint if heads else None
    _measure(request, files, changes, full, lease, identity, on_progress, seconds, rest)


def measure_file(
    request: CellRequest,
    file: OnnxFile,
    full: FullPrecision,
    lease: Lease,
    identity: str,
    on_progress: OnProgress,
) -> None:
    """Measure an exported file and write the record; see :func:`measure_export`."""
    recipe, check = request.recipe, file.facts.check
    assert recipe is not None
    if check is None:
        raise ModelError(f"{file.path} was not checked: export it with the command export.")
    own: dict[str, Any] = {
        "method": recipe.method,
        "w_bit": recipe.w_bits,
        "a_bit": recipe.a_bits,
        "seed": recipe.seed,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe.digest(),
        "notes": [],
    }
    _measure(request, {file.facts.part: file}, own, full, lease, identity, on_progress)


def _measure(
    request: CellRequest,
    files: Mapping[str, OnnxFile],
    changes: dict[str, Any],
    full: FullPrecision,
    lease: Lease,
    identity: str,
    on_progress: OnProgress,
    seconds: Mapping[str, float] = MappingProxyType({}),
    rest: Path | None = None,
) -> None:
    """Evaluate files by part, and write the record of a float model with ``changes``.

    ``seconds`` are those of earlier stages. ``rest`` is the checkpoint that quantizes the layers
    that are in no file; None leaves them in full precision.
    """
    plain = replace(request, recipe=None, mlp_checkpoint=None, export=False, device="cpu")
    cell = prepare(plain, on_progress)
    cell.clock.seconds.update(seconds)
    for file in files.values():
        if file.facts.weights_sha256 != cell.loaded.sha256:
            other, own = file.facts.weights_sha256[:12], cell.loaded.sha256[:12]
            raise ModelError(
                f"{file.path} was made from other weights (sha256 {other}) than those found now "
                f"({own}): give its float weights with --weights."
            )
    models = {part: OnnxModel(file, request.threads) for part, file in files.items()}
    taking = {part: _of_normalised(model, cell) for part, model in models.items()}
    if rest is not None:
        restored(cell, rest, *read_origin(rest, request.task))
    model = cell.task.from_onnx(cell.loaded, taking)
    how = cell.device, request.eval_batch, request.workers
    evaluation = cell.task.evaluate(model, cell.loaded, cell.request.data, *how, on_progress)
    exported = _entry(list(models.values()))
    speeds = [
        f"{file.path.name}: speed {speed_text(check)}"
        for file in files.values()
        if (check := file.facts.check) is not None and check.speed is not None
    ]
    variant = variant_name(request)
    notes = dict.fromkeys([*request.notes, *changes["notes"], *speeds, *evaluation.notes])
    changes = {**changes, "variant": variant, "exported": exported, "notes": [*notes]}
    write_outputs(cell, evaluation, full, lease, identity, changes)


def _of_normalised(model: OnnxModel, cell: PreparedCell) -> nn.Module:
    """Return a model of the images that the evaluation transform gives. Raises ModelError."""
    if model.file.facts.normalised:
        return model
    normalisation = cell.loaded.normalisation
    if normalisation is None:
        raise ModelError(
            f"{model.file.path} takes uint8 images, but {cell.loaded.tag} does not normalise "
            "images by channel: export it without --with-preprocessing."
        )
    return FromNormalised(model, Normalise(*normalisation))


def _entry(models: Sequence[OnnxModel]) -> Exported:
    """Return the entry of the record for the files of one model; several files add up."""
    coverages = [model.coverage() for model in models]
    checks = [model.file.facts.check for model in models]
    digests = [model.file.sha256 for model in models]
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()
    sizes = [check.float_bytes for check in checks if check is not None]
    known = [size for size in sizes if size is not None]
    first = models[0].file.facts
    return Exported(
        sha256=digests[0] if len(digests) == 1 else joined,
        bytes=sum(model.file.bytes for model in models),
        float_bytes=sum(known) if len(known) == len(models) else None,
        weights="packed" if first.packed else "int8",
        signed=first.signed,
        **{
            name: sum(getattr(one, name) for one in coverages)
            for name in ("integer_macs", "quantized_macs", "macs")
        },
        # Ratios of several files do not add up.
        speed=checks[0].speed if len(checks) == 1 and checks[0] is not None else None,
        runtime=f"onnxruntime {version('onnxruntime')}",
    )
