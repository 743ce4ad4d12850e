"""Export of a quantized checkpoint to ONNX files, each checked before it gets its name."""

import copy
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.errors import CheckpointError, ModelError, RecipeError, suggest
from fimaq_core.export import require_export
from fimaq_core.export.check import CodeCheck, check_codes
from fimaq_core.export.coverage import Coverage
from fimaq_core.export.facts import CheckFacts, OnnxFacts
from fimaq_core.export.recipes import check_exportable
from fimaq_core.export.runtime import OnnxModel
from fimaq_core.export.timing import speed
from fimaq_core.export.writing import Normalise, export_onnx, with_facts
from fimaq_core.files import replaced_whole
from fimaq_core.pipeline import MLPS, freeze
from fimaq_core.progress import OnProgress, Progress
from fimaq_core.recipe import Recipe
from tasks.common.cell.machine import processor
from tasks.common.cell.origin import Origin, read_origin, with_origin
from tasks.common.cell.prepare import PreparedCell, prepare
from tasks.common.cell.stages import FULL_PRECISION, beside, restored
from tasks.common.registry import parts
from tasks.common.request import CellRequest
from tasks.common.task import CalibrationSet, Chains, Exportable, LoadedModel

#: Samples per run when answers are compared.
_BATCH = 8
#: Pairs of runs when the speed is measured.
_PAIRS = 15


@dataclass(frozen=True)
class ExportForm:
    """Form of an exported file, and how it is checked."""

    packed: bool = False  # True: weights of 2 to 4 bits lie in 2 to 4 bits
    signed: bool = False  # True: activations are int8 with a zero point of 0
    with_preprocessing: bool = False  # True: the file takes uint8 images and normalises them
    samples: int = 64  # largest number of calibration images for the check
    speed: bool = True  # True: compare size and time with the export in full precision


@dataclass(frozen=True)
class ExportReport:
    """Result of an export and its check."""

    path: Path
    part: str
    facts: OnnxFacts
    codes: CodeCheck
    coverage: Coverage
    flips: list[str]  # calibration images with another answer than the simulated model gives
    scores: tuple[str, float, float] | None  # name; percentages of the file and of the model
    notes: list[str]

    def lines(self) -> list[str]:
        """Return the report for the user."""
        check = self.facts.check
        assert check is not None
        same = check.samples - len(self.flips)
        answers = f"same answer as the simulated model for {same} of {check.samples} samples"
        if self.flips:
            answers += f", another for {', '.join(self.flips[:5])}"
            answers += f" and {len(self.flips) - 5} more" if len(self.flips) > 5 else ""
        if self.scores is not None:
            name, own, simulated = self.scores
            answers += f"; {name} {own:.2f}, simulated {simulated:.2f}"
        size, spoken = f"{check.bytes / 1e6:.2f} MB", "not measured"
        if check.float_bytes is not None:
            share = check.bytes / check.float_bytes
            size += f", {share:.2f} of the float32 export ({check.float_bytes / 1e6:.2f} MB)"
        if check.speed is not None:
            spoken = speed_text(check)
        return [
            f"codes: {self.codes.text()}",
            f"answers: {answers}",
            f"integers: {self.coverage.text()}",
            f"size: {size}",
            f"speed: {spoken}",
            *(f"note: {note}" for note in self.notes),
            f"exported: {self.path}",
        ]


def speed_text(check: CheckFacts) -> str:
    """Return the measured speed with its conditions."""
    return (
        f"{check.speed:.2f} times the float32 export (batch {check.batch}, threads: "
        f"{check.threads}, {check.runtime}, {check.processor})"
    )


def export_stage(
    request: CellRequest,
    checkpoint: Path,
    out: Path,
    form: ExportForm,
    on_progress: OnProgress,
    *,
    part: str | None = None,
    all_parts: bool = False,
) -> list[ExportReport]:
    """Export a quantized checkpoint, and check each file against the simulated model.

    Args:
        request: data of the calibration images, and the place of the float weights.
        checkpoint: of a whole model, calibrated or reconstructed.
        out: file to write.
        form: form of the files.
        on_progress: receives progress.
        part: part to export; None if the checkpoint quantizes only one.
        all_parts: True exports each part; several get files ``<out>.<part>.onnx``.

    Raises:
        RecipeError: a quantizer of the recipe has no integer form, or the part is not clear.
        CheckpointError: the checkpoint is in full precision, or a file cannot be written.
        ModelError: codes differ away from a rounding tie, or less runs in integers than the task
            promises; no file is written then.
    """
    fingerprint, origin = read_origin(checkpoint, request.task)
    if origin.stage == MLPS.mark:
        raise CheckpointError(
            f"The checkpoint {checkpoint} holds reconstructed MLPs in full precision: calibrate it "
            "with the command calibrate first."
        )
    recipe = fingerprint.recipe
    check_exportable(recipe)
    require_export()
    if not all_parts:
        part = _chosen(part, [*parts(request.task, recipe.scope)])
    request = replace(request, device="cpu", mlp_checkpoint=None, export=False)
    cell = prepare(with_origin(request, origin), on_progress)
    data = cell.request.data
    count = min(form.samples, recipe.calibration_images)
    few = recipe.model_copy(update={"calibration_images": count})
    images = cell.task.calibration(cell.loaded, data, few)
    # Chains take over modules of the float model.
    full = replace(cell.loaded, model=copy.deepcopy(cell.loaded.model))
    full_chains = cell.task.chains(full, recipe.model_copy(update=FULL_PRECISION))
    chains = restored(cell, checkpoint, fingerprint, origin)
    for chain in chains.values():
        freeze(chain)  # rounds the weights of a calibrated checkpoint
    cell.clock.lap("load")
    export = _Export(cell, origin, recipe, images, chains, full, full_chains, form, on_progress)
    names = cell.task.export_parts(chains)
    if all_parts and len(names) > 1:
        return [export.write(name, beside(out, name)) for name in names]
    return [export.write(names[0] if len(names) == 1 or part is None else part, out)]


def _chosen(part: str | None, known: list[str]) -> str | None:
    """Return the part to export; None if none is known. Raises RecipeError."""
    if part is None:
        if len(known) > 1:
            raise RecipeError(
                f"A file holds one tower: choose with --tower {' or --tower '.join(known)}."
            )
        return known[0] if known else None
    if part not in known:
        raise RecipeError(f"The checkpoint does not quantize '{part}'.{suggest(part, known)}")
    return part


@dataclass(frozen=True)
class _Export:
    """A loaded checkpoint that is exported part by part."""

    cell: PreparedCell
    origin: Origin
    recipe: Recipe
    images: CalibrationSet
    chains: Chains
    full: LoadedModel
    full_chains: Chains
    form: ExportForm
    on_progress: OnProgress

    def write(self, part: str, out: Path) -> ExportReport:
        """Write the file of a part. No file has the name ``out`` before all checks are done."""
        task, loaded, data = self.cell.task, self.cell.loaded, self.cell.request.data
        item = task.exportable(loaded, self.chains, part, self.images, data)
        full = task.exportable(self.full, self.full_chains, part, self.images, data).chain
        facts, around, inputs = self._facts(part, item), None, item.inputs
        if not facts.normalised:
            assert item.normalisation is not None
            start = Normalise(*item.normalisation)
            around, inputs = (lambda inner: nn.Sequential(start, inner)), start.undo(inputs)
        # Two samples, since a traced batch of one would stay one.
        example = torch.cat([inputs[:1], inputs[-1:]])
        with tempfile.TemporaryDirectory(prefix="fimaq-") as folder, replaced_whole(out) as own:
            other = Path(folder) / "float.onnx"
            files = [(item.chain, own), (full, other)][: 1 + self.form.speed]
            for step, (chain, path) in enumerate(files):
                self.on_progress(Progress("export", step, len(files), part))
                export_onnx(chain, example, path, facts, around=around, names=item.names)
            self.on_progress(Progress("export", len(files), len(files), part))
            whole = item.chain if around is None else around(item.chain)
            codes = check_codes(
                item.chain, own, inputs, whole=whole, batch=_BATCH, on_progress=self.on_progress
            )
            codes.require()
            model, threads = OnnxModel(own), torch.get_num_threads()
            coverage = _coverage(model, item)
            answers = [item.answers(_outputs(one, inputs)) for one in (whole, model)]
            same = answers[0] == answers[1]
            check = CheckFacts(
                bytes=own.stat().st_size,
                float_bytes=other.stat().st_size if self.form.speed else None,
                samples=len(same),
                agreement=100 * float(same.double().mean()),
                codes=codes.codes,
                ties=codes.ties,
                speed=speed(other, own, 1, threads, _PAIRS).ratio if self.form.speed else None,
                batch=1,
                threads=threads,
                processor=processor(),
                runtime=f"onnxruntime {version('onnxruntime')}",
            )
            facts = model.file.facts.model_copy(update={"check": check})
            with_facts(own, facts)
        flips = [self.images.ids[index] for index in (~same).nonzero().flatten().tolist()]
        scores = None
        if item.truth is not None:
            simulated, found = (100 * float((one == item.truth).double().mean()) for one in answers)
            scores = item.score, found, simulated
        notes = [*self.cell.notes, *item.notes]
        return ExportReport(out, part, facts, codes, coverage, flips, scores, notes)

    def _facts(self, part: str, item: Exportable) -> OnnxFacts:
        """Return the facts of a file, without layers and check. Raises RecipeError."""
        loaded, form, task = self.cell.loaded, self.form, self.cell.request.task
        if form.with_preprocessing and item.normalisation is None:
            raise RecipeError(
                f"{loaded.tag} takes no images that are normalised by channel"
                + (f" in its {part} tower" if part else "")
                + ": leave --with-preprocessing out."
            )
        scopes = parts(task, self.recipe.scope)
        scope = item.scope or scopes.get(part, self.recipe.scope)
        recipe = self.recipe.model_copy(update={"scope": scope})
        given = self.cell.request.model
        origin = {"weights_entry": given.weights_entry, "preprocessing": given.preprocessing}
        preprocessing: dict[str, Any] | None = None
        if loaded.preprocessing is not None:
            preprocessing = loaded.preprocessing.model_dump(mode="json")
        elif item.normalisation is not None:
            mean, std = item.normalisation
            preprocessing = {"input_size": loaded.input_shape, "mean": mean, "std": std}
        return OnnxFacts(
            task=task,
            model=self.origin.model,
            model_args=self.origin.model_args,
            tag=loaded.tag,
            weights_sha256=loaded.sha256,
            recipe=recipe.model_dump(mode="json"),
            recipe_digest=recipe.digest(),
            part=part,
            preprocessing=preprocessing,
            class_names=list(item.class_names) if item.class_names else None,
            normalised=not form.with_preprocessing,
            packed=form.packed,
            signed=form.signed,
            layers=[],
            extra={**item.extra, "origin": {name: one for name, one in origin.items() if one}},
        )


def _coverage(model: OnnxModel, item: Exportable) -> Coverage:
    """Return what runs in integers. Raises ModelError if it is less than promised."""
    found = model.coverage()
    if found.quantized_macs and found.percent < item.coverage:
        raise ModelError(
            f"The exported file is not written, because less runs in integers than the promised "
            f"{item.coverage:g} %: {found.text()}."
        )
    return found


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Any:
    """Return the outputs of a model for all inputs: a tensor, or a tuple of tensors."""
    found = [model(batch) for batch in inputs.split(_BATCH)]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return tuple(torch.cat(list(one)) for one in zip(*found, strict=True))
