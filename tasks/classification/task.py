"""The task of image classification."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.families import find_family
from fimaq_core.fisher.divergence import ClassifierDivergence, Divergence
from fimaq_core.progress import OnProgress
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.classification import models, tags
from tasks.classification.data import calibration_set, digit_pairs, open_source, true_classes
from tasks.common import top_k
from tasks.common.data.class_names import readable_names
from tasks.common.data.corruptions import corrupted
from tasks.common.data.images import Images
from tasks.common.request import DataRequest, ModelRequest
from tasks.common.task import CalibrationSet, Chains, Evaluation, Exportable, LoadedModel, Task


class ClassificationTask(Task):
    """Image classification with timm models; see :class:`tasks.common.task.Task`."""

    name = "classification"
    tags = tags
    demo = "demo model on digit pairs"

    def load(self, request: ModelRequest) -> LoadedModel:
        return models.load_model(request)

    def build(self, loaded: LoadedModel, recipe: Recipe) -> BlockChain:
        """Turn the model into a chain with the family of its class."""
        return find_family(loaded.model).build(loaded.model, recipe)

    def calibration(self, loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
        return calibration_set(loaded, data, recipe)

    def divergence(self, recipe: Recipe) -> Divergence:
        """Return the Kullback-Leibler divergence of class probabilities at a temperature."""
        return ClassifierDivergence(recipe.temperature)

    def exportable(
        self,
        loaded: LoadedModel,
        chains: Chains,
        part: str,
        images: CalibrationSet,
        data: DataRequest,
    ) -> Exportable:
        """Return the classifier; its answer is the class with the largest logit."""
        named = loaded.class_names if loaded.data is None else digit_pairs("test").class_names
        return Exportable(
            chains[part],
            Samples.of(images.images).whole,
            lambda logits: logits.argmax(1),
            true_classes(loaded, data, images),
            normalisation=loaded.normalisation,
            class_names=readable_names(named) if named else None,
        )

    def from_onnx(self, loaded: LoadedModel, models: Mapping[str, nn.Module]) -> nn.Module:
        assert loaded.input_shape is not None
        model = self.assemble(loaded, dict(models))
        found = model(torch.zeros(1, *loaded.input_shape))
        if found.shape != (1, loaded.classes):
            raise ModelError(
                f"The file gives outputs of shape {tuple(found.shape)} per image, but {loaded.tag} "
                f"has {loaded.classes} classes: export the checkpoint again."
            )
        return model

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
        """Measure top-1 and top-5 accuracy on the part ``val``."""
        source = open_source(loaded, data, "val").head(data.limit)
        source = replace(source, class_names=readable_names(source.class_names))
        transform = loaded.eval_transform
        if data.corrupt is not None:
            source, transform = corrupted(source, transform, data.corrupt)
        content = source.ids, source.targets, source.read
        images = Images(*content, transform, data.skip_corrupt)
        return top_k.evaluate(model, images, source, device, batch_size, workers, on_progress)


TASK = ClassificationTask()
