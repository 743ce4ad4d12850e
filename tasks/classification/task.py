"""The task of image classification."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import DataError, ModelError
from fimaq_core.export.writing import Outputs
from fimaq_core.families import find_family
from fimaq_core.fisher.divergence import ClassifierDivergence, CosineDivergence, Divergence
from fimaq_core.progress import OnProgress
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.classification import models, tags
from tasks.classification.data import calibration_set, digit_pairs, open_source, true_classes
from tasks.classification.heads import Evaluator
from tasks.common import top_k
from tasks.common.data.class_names import readable_names
from tasks.common.data.corruptions import corrupted
from tasks.common.data.elsewhere import SEVERAL, read_dataset
from tasks.common.data.folders import Source
from tasks.common.data.imagenet import wordnet_ids
from tasks.common.data.images import Images
from tasks.common.fidelity import Fidelity, RawOutputs
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

    def divergences(
        self,
        loaded: LoadedModel,
        images: CalibrationSet,
        recipe: Recipe,
        device: torch.device,
        batch_size: int,
    ) -> dict[str, Divergence]:
        """Return the divergence of classes or, for a model that returns features, of these."""
        return {"": self.divergence(recipe) if loaded.head is None else CosineDivergence()}

    def exportable(
        self,
        loaded: LoadedModel,
        chains: Chains,
        part: str,
        images: CalibrationSet,
        data: DataRequest,
    ) -> Exportable:
        """Return the classifier; its answer is the class with the largest logit."""
        if loaded.head is not None:
            return _features(loaded, chains[part], images)
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
        count, what = loaded.classes, "classes"
        if loaded.head is not None:
            count, what = int(loaded.model.num_features), "features"
        if found.shape != (1, count):
            raise ModelError(
                f"The file gives outputs of shape {tuple(found.shape)} per image, but {loaded.tag} "
                f"has {count} {what}: export the checkpoint again."
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
        """Measure top-1 and top-5 accuracy on the part ``val``, of the model's head or another."""
        source = open_source(loaded, data, "val").head(data.limit)
        source = replace(source, class_names=readable_names(source.class_names))

        transform = loaded.eval_transform
        if data.corrupt is not None:
            source, transform = corrupted(source, transform, data.corrupt)

        def images(of: Source, transform: Callable[[Any], torch.Tensor]) -> Images:
            return Images(of.ids, of.targets, of.read, transform, data.skip_corrupt)

        how = device, batch_size, workers, on_progress
        test = images(source, transform), source
        if loaded.head is None:
            return top_k.evaluate(model, *test, *how)
        bank = open_source(loaded, data, "train", labelled=True)
        if data.dataset is not None and tuple(bank.class_names) != wordnet_ids():
            raise DataError(f"A head for {source.name} needs the training part of ImageNet.")
        pairs = (images(bank, loaded.eval_transform), bank), test
        return Evaluator(*how).measure(model, loaded.head, *pairs)

    def fidelity(
        self, full: RawOutputs, evaluation: Evaluation, loaded: LoadedModel, data: DataRequest
    ) -> Fidelity:
        """Compare with full precision, by labels only where each image has one label."""
        found = super().fidelity(full, evaluation, loaded, data)
        several = data.dataset is not None and read_dataset(data.dataset).name in SEVERAL
        return found.without_labels() if several else found


def _features(loaded: LoadedModel, chain: BlockChain, images: CalibrationSet) -> Exportable:
    """Return a model without classifier; its answer is the most similar calibration image."""

    def answers(features: torch.Tensor) -> torch.Tensor:
        unit = nn.functional.normalize(features, dim=1)
        return (unit @ unit.T).fill_diagonal_(-1).argmax(1)

    whole, names = Samples.of(images.images).whole, Outputs(outputs=("features",))
    return Exportable(chain, whole, answers, names=names, normalisation=loaded.normalisation)


TASK = ClassificationTask()
