"""The detection task as the pipeline sees it."""

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import RecipeError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.progress import OnProgress
from fimaq_core.recipe import OFF, Recipe
from fimaq_core.samples import Samples
from tasks.common.request import DataRequest, ModelRequest
from tasks.common.task import CalibrationSet, Chains, Evaluation, LoadedModel, Task
from tasks.detection import models, tags
from tasks.detection.calibration import calibration_set
from tasks.detection.chain import detector_segments
from tasks.detection.coco import open_source
from tasks.detection.detector import DETECTOR, QuantizedDetector
from tasks.detection.divergence import ProposalDivergence
from tasks.detection.evaluate import detect, measure
from tasks.detection.neck import rpn_levels, rpn_segment
from tasks.detection.roi import (
    ProposalTerms,
    class_count,
    region_examples,
    roi_heads,
    roi_inputs,
    roi_parts,
)

#: Settings of layers that stay as they are.
_OFF = {
    "w_bits": OFF,
    "a_bits": OFF,
    "s_bits": None,
    "head_bits": None,
    "patch_input_bits": OFF,
    "reconstruct_mlp": False,
}


#: Regions that RoI heads are calibrated on, of all images.
_REGIONS = 4096


def _check(recipe: Recipe) -> None:
    """Refuse settings that mean nothing here. Raises RecipeError."""
    for name in ("temperature", "head_bits", "divergence_batch"):
        if getattr(recipe, name) != Recipe.model_fields[name].default:
            raise RecipeError(f"Detectors have no use for {name}: leave it out.")
    if recipe.reconstruct and recipe.loss == "prediction":
        raise RecipeError(
            "The divergence of a detector has a gradient only, since its terms are each over their own value, and loss "
            "'prediction' wants its value: choose another loss."
        )


def pieces_of(recipe: Recipe) -> tuple[str, ...]:
    """Pieces of a detector that the recipe quantizes, in order."""
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
        """Backbone, neck and RPN as one chain, where one of them is quantized; every RoI head as another."""
        pieces, model = pieces_of(recipe), loaded.model
        if recipe.reconstruct_mlp and "backbone" not in pieces:
            raise RecipeError(
                f"MLPs are in the backbone, which scope '{recipe.scope}' leaves as it is: leave reconstruct_mlp out."
            )
        found: Chains = {}
        if set(pieces) - {"roi"}:
            found[DETECTOR] = self._detector(model, recipe, pieces)
        return {**found, **roi_parts(model, recipe)} if "roi" in pieces else found

    def _detector(self, model: nn.Module, recipe: Recipe, pieces: tuple[str, ...]) -> BlockChain:
        own = {
            name: recipe if name in pieces else recipe.model_copy(update=_OFF)
            for name in tags.PIECES
        }
        # Of the float detector, so before any layer is swapped.
        terms = ProposalTerms(model) if recipe.detection_terms == "rpn+roi" else None
        segments = [*detector_segments(model, own), rpn_segment(model, own["rpn"])]
        return BlockChain(
            segments if terms is None else terms.added(segments),
            side=None if terms is None else terms.proposals,
        )

    def part_scope(self, part: str, recipe: Recipe) -> str:
        """A RoI head's is all of them; that of the other chain what else is quantized."""
        return "+".join(name for name in pieces_of(recipe) if (name == "roi") == (part != DETECTOR))

    def assemble(self, loaded: LoadedModel, chains: Chains) -> nn.Module:
        return QuantizedDetector(loaded.model, chains)

    def untouched(self, loaded: LoadedModel, chains: Chains) -> dict[str, nn.Module]:
        names = ("backbone", "neck", "rpn_head") if DETECTOR not in chains else ()
        names = names if set(chains) - {DETECTOR} else (*names, "roi_head")
        return {name: loaded.model.get_submodule(name) for name in names}

    def examples(self, loaded: LoadedModel, chains: Chains) -> dict[str, Tensor]:
        """An image; for RoI heads as many regions as an image has at most."""
        assert loaded.input_shape is not None
        found = {DETECTOR: torch.zeros(1, *loaded.input_shape), **region_examples(loaded.model)}
        return {name: found[name] for name in chains}

    def calibration(self, loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
        """Images of the training part, each of its own size."""
        return calibration_set(loaded, data, recipe)

    def inputs(
        self, loaded: LoadedModel, images: CalibrationSet, recipe: Recipe, device: torch.device
    ) -> dict[str, Samples]:
        """The images, and for RoI heads what they see of those that set the ranges."""
        found: dict[str, Samples] = {DETECTOR: images.images}
        if "roi" in pieces_of(recipe):
            chosen = images.images.first(recipe.range_images), images.metas[: recipe.range_images]
            # Searches take no more rows than this of all images, so there is no use in keeping more regions of many images.
            found |= roi_inputs(
                loaded.model, *chosen, device, max(_REGIONS // recipe.range_images, 1)
            )
        return found

    def divergences(
        self,
        loaded: LoadedModel,
        images: CalibrationSet,
        recipe: Recipe,
        device: torch.device,
        batch_size: int,
    ) -> dict[str, Divergence]:
        """Divergence of the proposals' maps. RoI heads need none: they are not reconstructed."""
        _check(recipe)
        head = loaded.model.rpn_head
        levels = [rpn_levels(image.shape[2], image.shape[3]) for image in images.images]
        classes = class_count(loaded.model) if recipe.detection_terms == "rpn+roi" else 0
        made: dict[str, Divergence] = dict.fromkeys(roi_heads(loaded.model), Divergence())
        made[DETECTOR] = ProposalDivergence(levels, head.num_base_priors, classes)
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
        """COCO's average precisions, image by image: how an image is padded must not depend on others."""
        assert isinstance(model, QuantizedDetector)
        source = open_source(loaded, data, "val").head(data.limit).settled()
        made = model.predict, source, loaded.eval_transform, device, on_progress
        return measure(source, detect(*made, data.skip_corrupt, workers), data.keep_outputs)


TASK = DetectionTask()
