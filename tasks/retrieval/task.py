"""The retrieval task: how its models are quantized and evaluated."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fimaq_core.errors import DataError, ModelError, RecipeError
from fimaq_core.export.writing import Outputs
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.progress import OnProgress
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.common.data.class_names import distinct_names
from tasks.common.data.folders import open_folder
from tasks.common.data.images import Images
from tasks.common.fidelity import Fidelity, RawOutputs
from tasks.common.request import DataRequest, ModelRequest
from tasks.common.task import CalibrationSet, Chains, Evaluation, Exportable, LoadedModel, Task
from tasks.common.top_k import evaluate
from tasks.retrieval import models, tags
from tasks.retrieval.calibration import calibration_set
from tasks.retrieval.captions import open_pairs
from tasks.retrieval.divergence import contrastive
from tasks.retrieval.evaluate import Encoders, evaluate_pairs, normalised
from tasks.retrieval.fidelity import ranking_fidelity
from tasks.retrieval.towers import TOWERS, build_towers
from tasks.retrieval.zero_shot import (
    LINES,
    ZeroShotClassifier,
    class_embeddings,
    class_names,
    named_classes,
)

#: Samples per forward pass of a tower when an export is checked.
_BATCH = 32


class TwoTowers(nn.Module):
    """Model for evaluation: the chains of quantized towers, and float towers of ``model``."""

    def __init__(self, model: nn.Module, chains: Chains) -> None:
        super().__init__()
        self.chains = nn.ModuleDict(chains)
        # The float model is not needed if all its towers are chains.
        self.model = model if len(chains) < len(TOWERS) else None
        self.register_buffer("logit_scale", model.logit_scale.detach().clone(), persistent=False)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return embeddings (B, d) of images (B, C, H, W), not normalised."""
        if "vision" in self.chains:
            return self.chains["vision"](images)
        return self.model.encode_image(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return embeddings (B, d) of token ids (B, L), not normalised."""
        return self.chains["text"](ids) if "text" in self.chains else self.model.encode_text(ids)


class RetrievalTask(Task):
    """Image-caption retrieval and zero-shot classification with open_clip."""

    name = "retrieval"
    tags = tags
    demo = "demo model on scenes of digits"
    scopes = tags.SCOPES

    def load(self, request: ModelRequest) -> LoadedModel:
        return models.load_model(request)

    def chains(self, loaded: LoadedModel, recipe: Recipe) -> Chains:
        """Build the towers of the recipe's scope."""
        return build_towers(loaded.model, recipe, [*tags.parts(recipe.scope)])

    def assemble(self, loaded: LoadedModel, chains: Chains) -> nn.Module:
        return TwoTowers(loaded.model, chains)

    def exportable(
        self,
        loaded: LoadedModel,
        chains: Chains,
        part: str,
        images: CalibrationSet,
        data: DataRequest,
    ) -> Exportable:
        """Return a tower; its answer is the nearest calibration sample of the other tower."""
        other = TOWERS[1 - TOWERS.index(part)]
        towers = TwoTowers(loaded.model, chains)
        encode = towers.encode_text if other == "text" else towers.encode_image
        samples = Samples.of(images.inputs[other])

        @torch.no_grad()
        def answers(embeddings: Tensor) -> Tensor:
            others = torch.cat([normalised(encode(batch)) for batch in samples.batches(_BATCH)])
            return (embeddings @ others.T).argmax(1)

        given = "images" if part == "vision" else "ids"
        return Exportable(
            chains[part],
            Samples.of(images.inputs[part]).whole,
            answers,
            torch.arange(len(images.ids)),
            score="R@1",
            names=Outputs(given, ("embeddings",)),
            normalisation=loaded.normalisation if part == "vision" else None,
        )

    def from_onnx(self, loaded: LoadedModel, models: Mapping[str, nn.Module]) -> nn.Module:
        """Return both towers: exported ones, and the float ones of the model."""
        full, both = TwoTowers(loaded.model, {}), TwoTowers(loaded.model, dict(models))
        for part, example in self.examples(loaded, dict(models)).items():
            encode = full.encode_image if part == "vision" else full.encode_text
            with torch.no_grad():
                found, wanted = models[part](example).shape, encode(example).shape
            if found != wanted:
                raise ModelError(
                    f"The file gives outputs of shape {tuple(found)}, but the {part} tower of "
                    f"{loaded.tag} gives {tuple(wanted)}: export the checkpoint again."
                )
        return both

    def untouched(self, loaded: LoadedModel, chains: Chains) -> dict[str, nn.Module]:
        model = loaded.model
        found = {"vision": model.get_submodule("visual")}
        if isinstance(getattr(model, "text", None), nn.Module):
            found["text"] = model.get_submodule("text")
        else:  # open_clip's CLIP holds the layers of the text tower itself
            found["text"] = copy.copy(model)
            rest = {key: child for key, child in model.named_children() if key != "visual"}
            found["text"]._modules = rest
        return {name: module for name, module in found.items() if name not in chains}

    def examples(self, loaded: LoadedModel, chains: Chains) -> dict[str, Tensor]:
        """Return an image of zeros and a caption of zeros, for the towers that are chains."""
        assert loaded.input_shape is not None
        assert loaded.context_length is not None
        inputs = {
            "vision": torch.zeros(1, *loaded.input_shape),
            "text": torch.zeros(1, loaded.context_length, dtype=torch.int64),
        }
        return {name: inputs[name] for name in chains}

    def calibration(self, loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
        """Return calibration images, each with one caption."""
        return calibration_set(loaded, data, recipe)

    def divergences(
        self,
        loaded: LoadedModel,
        images: CalibrationSet,
        recipe: Recipe,
        device: torch.device,
        batch_size: int,
    ) -> dict[str, Divergence]:
        """Return the contrastive divergence of each tower, with the other in full precision."""
        if "temperature" in recipe.changes():
            raise RecipeError("Retrieval uses the model's own scale: leave temperature out.")
        if not (recipe.reconstruct or recipe.reconstruct_mlp or recipe.finish_steps):
            return dict.fromkeys(TOWERS, Divergence())  # not used
        model = loaded.model.to(device)
        encoders = {"vision": model.encode_image, "text": model.encode_text}
        made: dict[str, Divergence] = {}
        for name, other in (("text", "vision"), ("vision", "text")):
            if name in tags.parts(recipe.scope):
                inputs, batch = Samples.of(images.inputs[other]), recipe.divergence_batch
                made[name] = contrastive(
                    model, encoders[other], inputs, batch=batch, size=batch_size
                )
        return made

    def fidelity(
        self, full: RawOutputs, evaluation: Evaluation, loaded: LoadedModel, data: DataRequest
    ) -> Fidelity:
        """Compare rankings or, for zero-shot classification, probabilities of classes."""
        if "image" in full and "image" in evaluation.outputs:
            return ranking_fidelity(full, evaluation.outputs, evaluation.outcomes["cluster"])
        return super().fidelity(full, evaluation, loaded, data)

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
        """Measure recall on the test pairs, or zero-shot accuracy on images in class folders."""
        assert isinstance(model, TwoTowers)
        assert loaded.tokenizer is not None
        encoders = Encoders(
            model.encode_image, model.encode_text, loaded.tokenizer, device, loaded.context_length
        )
        if data.evaluation != "zero-shot":
            pairs = open_pairs(loaded, data, "test").head(data.limit)
            ids, none = pairs.image_ids, [0] * len(pairs.image_ids)
            images = Images(ids, none, pairs.read, loaded.eval_transform, data.skip_corrupt)
            return evaluate_pairs(encoders, images, pairs, batch_size, workers, on_progress)
        if data.path is None:
            raise DataError("Zero-shot needs images in class folders: give --data /path/to/data.")
        source = open_folder(data.path, "val", data.class_order, wanted=LINES)
        folders = source.class_names
        names = class_names(data.path, folders)
        embedded = class_embeddings(encoders, names, batch_size, on_progress)
        classifier = ZeroShotClassifier(model.encode_image, embedded, model.logit_scale)
        source = replace(source.head(data.limit), class_names=distinct_names(names, folders))
        transform = loaded.eval_transform
        images = Images(source.ids, source.targets, source.read, transform, data.skip_corrupt)
        found = evaluate(classifier, images, source, device, batch_size, workers, on_progress)
        return replace(found, dataset=named_classes(found.dataset, names, folders))


TASK = RetrievalTask()
