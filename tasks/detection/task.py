"""Detection as a task: its models, chains, calibration, divergence and evaluation."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import RecipeError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.progress import OnProgress
from fimaq_core.recipe import OFF, PREDICTION, Recipe
from fimaq_core.samples import Samples
from tasks.common.fidelity import Fidelity, RawOutputs
from tasks.common.request import DataRequest, ModelRequest
from tasks.common.task import CalibrationSet, Chains, Evaluation, Exportable, LoadedModel, Task
from tasks.detection import export, models, roi, tags
from tasks.detection.calibration import calibration_set, region_inputs
from tasks.detection.coco import open_source
from tasks.detection.detector import DETECTOR, QuantizedDetector, detector_segments
from tasks.detection.divergence import ProposalDivergence
from tasks.detection.evaluate import detect, measure
from tasks.detection.fidelity import detection_fidelity, raw_detections
from tasks.detection.neck import rpn_levels, rpn_segment

#: Changes of the recipe for a piece that stays in full precision.
_OFF = {
    "w_bits": OFF,
    "a_bits": OFF,
    "s_bits": None,
    "head_bits": None,
    "patch_input_bits": OFF,
    "reconstruct_mlp": False,
}


def _check(recipe: Recipe) -> None:
    """Refuse settings that have no meaning for detectors. Raises RecipeError."""
    changes = recipe.changes()
    for name in ("temperature", "head_bits", "divergence_batch"):
        if name in changes:
            raise RecipeError(f"Detectors have no use for {name}: leave it out.")
    if recipe.reconstruct and recipe.loss in PREDICTION:
        raise RecipeError(
            f"The loss '{recipe.loss}' needs the value of the divergence. For detectors only its "
            "gradient has a meaning, since each term is divided by its own value: choose another "
            "loss."
        )


def pieces_of(recipe: Recipe) -> tuple[str, ...]:
    """List the pieces of a detector that the recipe quantizes, in order."""
    return tags.PIECES if recipe.scope is None else tuple(recipe.scope.split("+"))


class DetectionTask(Task):
    """Detection and instance segmentation with mmdet; see :class:`tasks.common.task.Task`."""

    name = "detection"
    tags = tags
    demo = "demo model on scenes of digits"
    scopes = tags.SCOPES
    defaults = tags.DEFAULTS

    def load(self, request: ModelRequest) -> LoadedModel:
        return models.load_model(request)

    def chains(self, loaded: LoadedModel, recipe: Recipe) -> Chains:
        """Make one chain of backbone, neck and RPN, and one per RoI head, if they are quantized."""
        pieces, model = pieces_of(recipe), loaded.model
        if recipe.reconstruct_mlp and "backbone" not in pieces:
            raise RecipeError(
                f"MLPs are in the backbone, which scope '{recipe.scope}' does not quantize: leave "
                "reconstruct_mlp out."
            )
        found: Chains = {}
        if set(pieces) - {"roi"}:
            found[DETECTOR] = self._detector(model, recipe, pieces)
        return {**found, **roi.roi_parts(model, recipe)} if "roi" in pieces else found

    def _detector(self, model: nn.Module, recipe: Recipe, pieces: tuple[str, ...]) -> BlockChain:
        off = recipe.model_copy(update=_OFF)
        own = {name: recipe if name in pieces else off for name in tags.PIECES}
        # This copies the float detector, so it comes before any layer is replaced.
        side = roi.FloatProposals(model) if recipe.detection_terms == "rpn+roi" else None
        segments = detector_segments(model, own)
        neck = segments[-1]
        segments.append(rpn_segment(model, own["rpn"]))
        if side is not None:
            segments.append(roi.logits_segment(neck, side))
        return BlockChain(segments, side=side)

    def part_scope(self, part: str, recipe: Recipe) -> str:
        """Return ``roi`` for a RoI head, the other quantized pieces for :data:`DETECTOR`."""
        return "+".join(name for name in pieces_of(recipe) if (name == "roi") == (part != DETECTOR))

    def assemble(self, loaded: LoadedModel, chains: Chains) -> nn.Module:
        return QuantizedDetector(loaded.model, chains)

    def export_parts(self, chains: Chains) -> tuple[str, ...]:
        """Return the part with backbone and neck. Raises ModelError if both are float."""
        export.check_quantized(chains.get(DETECTOR))
        return (DETECTOR,)

    def exportable(
        self,
        loaded: LoadedModel,
        chains: Chains,
        part: str,
        images: CalibrationSet,
        data: DataRequest,
    ) -> Exportable:
        """Return backbone and neck."""
        return export.exportable(loaded, chains[part], images)

    def from_onnx(self, loaded: LoadedModel, models: Mapping[str, nn.Module]) -> nn.Module:
        """Return the detector with the float heads behind exported backbone and neck."""
        return export.with_file(loaded, models[DETECTOR])

    def untouched(self, loaded: LoadedModel, chains: Chains) -> dict[str, nn.Module]:
        names = ("backbone", "neck", "rpn_head") if DETECTOR not in chains else ()
        names = names if set(chains) - {DETECTOR} else (*names, "roi_head")
        return {name: loaded.model.get_submodule(name) for name in names}

    def examples(self, loaded: LoadedModel, chains: Chains) -> dict[str, Tensor]:
        """Return one image, and for each RoI head the highest number of regions per image."""
        assert loaded.input_shape is not None
        found = {DETECTOR: torch.zeros(1, *loaded.input_shape), **roi.region_examples(loaded.model)}
        return {name: found[name] for name in chains}

    def calibration(self, loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
        return calibration_set(loaded, data, recipe)

    def inputs(
        self, loaded: LoadedModel, images: CalibrationSet, recipe: Recipe, device: torch.device
    ) -> dict[str, Samples]:
        """Return the images, and for RoI heads the regions of the first ``range_images``."""
        found: dict[str, Samples] = {DETECTOR: images.images}
        if "roi" in pieces_of(recipe):
            found |= region_inputs(loaded.model, images, recipe.range_images, device)
        return found

    def divergences(
        self,
        loaded: LoadedModel,
        images: CalibrationSet,
        recipe: Recipe,
        device: torch.device,
        batch_size: int,
    ) -> dict[str, Divergence]:
        """Make the divergence of the RPN's maps; RoI heads are not reconstructed and have none."""
        _check(recipe)
        model = loaded.model
        levels = [rpn_levels(image.shape[2], image.shape[3]) for image in images.images]
        # A proposal has one logit per class and one for the background.
        classes = loaded.classes + 1 if recipe.detection_terms == "rpn+roi" else 0
        made: dict[str, Divergence] = dict.fromkeys(roi.roi_heads(model), Divergence())
        made[DETECTOR] = ProposalDivergence(levels, model.rpn_head.num_base_priors, classes)
        return made

    def evaluate(
        self,
        model: nn.Module,
        loaded: LoadedModel,
        data: DataRequest,
        device: torch.device,
        batch_size: int,
        workers: int,
        on_progress: OnProgress,
    ) -> Evaluation:
        """Measure COCO's average precisions, image by image: a batch would change the padding."""
        assert isinstance(model, QuantizedDetector)
        source = open_source(loaded, data, "val").head(data.limit).settled()
        made = model.predict, source, loaded.eval_transform, device, on_progress
        found = detect(*made, data.skip_corrupt, workers)
        raw = raw_detections(found)
        return replace(measure(source, found, data.keep_outputs), outputs=raw)

    def fidelity(
        self, full: RawOutputs, evaluation: Evaluation, loaded: LoadedModel, data: DataRequest
    ) -> Fidelity:
        """Compare detections with those in full precision."""
        if not full:
            return Fidelity()
        source = open_source(loaded, data, "val").head(data.limit)
        return detection_fidelity(full, evaluation, source)


TASK = DetectionTask()
