"""The protocol of a task: what the pipeline asks of it. One package a task, loaded only when it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.progress import Report
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.common.preprocessing import Preprocessing
from tasks.common.record import Dataset, Metric, Weights
from tasks.common.request import DataRequest, Missing, ModelRequest


@dataclass
class LoadedModel:
    """A float model with its weights.

    Attributes:
        model: in eval mode, on the CPU.
        tag: ``model.tag``.
        source: where the weights came from, for people.
        sha256: of the weights.
        classes: number of outputs.
        eval_transform, train_transform: image transforms.
        data: name of the data set the model brings along, or None.
        input_shape: (C, H, W) of the images the model takes; None where the task does not say (then there is no ``inspect``).
        tokenizer: captions to token ids (n, context_length) int64, for models that take text.
        context_length: tokens of a caption at most.
        entry: the entry of the weights file that was taken; None where it has none.
        entries: all entries of the file that hold weights.
        class_names: of the classes in order, where the weights file has them; empty where they
            cannot be read.
        preprocessing: how images become inputs; None where the task has a way of its own.
    """

    model: nn.Module
    tag: str
    source: str
    sha256: str
    classes: int
    eval_transform: Callable[[Any], Tensor]
    train_transform: Callable[[Any], Tensor]
    data: str | None = None
    input_shape: tuple[int, int, int] | None = None
    tokenizer: Callable[[list[str]], Tensor] | None = None
    context_length: int | None = None
    entry: str | None = None
    entries: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None

    @property
    def weights(self) -> Weights:
        """The weights as a record has them."""
        return Weights(
            tag=self.tag,
            source=self.source,
            sha256=self.sha256,
            entry=self.entry,
            entries=list(self.entries),
        )


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration images with their ids.

    Attributes:
        images: (n, C, H, W) float32, or (1, C, H, W) each where sizes vary.
        ids: of the images, in order.
        transform: name of their transform.
        fingerprint: sha256 over transform, ids and values.
        skipped: damaged images that were left out.
        inputs: what each part of the model is calibrated on, where it has several: (n, ...) tensors by the part's name.
        captions: the caption of each image, for tasks that have them.
        truncated_captions: how many of these are longer than the model's context.
        metas: what each image's transform says of it (shapes, scale), for tasks whose images vary in size; their ``images`` and
            ``inputs`` are :class:`~fimaq_core.samples.Samples` of varying shapes.
        notes: what a user should know of them.
    """

    images: Samples | Tensor
    ids: list[str]
    transform: str
    fingerprint: str
    skipped: list[str] = field(default_factory=list)
    inputs: dict[str, Samples | Tensor] = field(default_factory=dict)
    captions: list[str] | None = None
    truncated_captions: int | None = None
    metas: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Metrics and per-sample outcomes of one evaluation.

    Attributes:
        outcomes: arrays of equal length, a row a sample.
        files: what else is kept beside the record, where it was asked for: JSON values by file name.
        examples: what the model says of up to 12 samples, evenly spaced over the set (:class:`tasks.common.examples.Spread`):
            JSON objects of one of these forms, by ``sample``, an id that :meth:`Task.pictures` takes.

            - classes: ``{"sample", "truth": class name, "top": [{"name", "share"}]}``, the 3 of highest softmax probability;
            - captions of images: ``{"sample", "truth": [caption], "top": [{"caption", "score", "correct"}]}``, the 3 of highest
              cosine similarity; ``correct`` says whether a caption is one of the image's own;
            - objects: ``{"sample", "size": [width, height], "truth": [object], "found": [object]}`` with objects
              ``{"name", "score", "box": [x, y, width, height], "polygons": [[x0, y0, x1, y1, ...]]}`` in pixels of the original
              image, ``score`` (at least 0.3, the 20 highest) in ``found`` only.

            :func:`tasks.common.examples.read_examples` reads them again.
        notes: what a user should know of the data and of what was measured.
    """

    metrics: dict[str, Metric]
    n: int
    outcomes: dict[str, np.ndarray]
    dataset: Dataset
    skipped: list[str] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


#: The chains of a model by the names of its parts; a model that is one chain has the name ``""`` alone.
Chains = dict[str, BlockChain]


class Task(Protocol):
    """What a task package offers as ``tasks.<name>.task.TASK``.

    Attributes:
        name: of the package.
        scopes: what of a model can be quantized, as :attr:`Recipe.scope` says it, the usual one first; empty: always everything.
    """

    name: str
    scopes: tuple[str, ...]

    def model_tag(self, request: ModelRequest) -> str:
        """The model's ``model.tag``; cheap, loads nothing but may hash a weights file. Raises ModelError."""
        ...

    def model_names(self) -> dict[str, str]:
        """Short and demo names with what they stand for."""
        ...

    def preflight(self, model: ModelRequest, data: DataRequest) -> list[Missing]:
        """What is not there of weights and data, where it is looked for and how to get it. Downloads nothing."""
        ...

    def load(self, request: ModelRequest) -> LoadedModel:
        """Load model and weights. Raises ModelError."""
        ...

    def chains(self, loaded: LoadedModel, recipe: Recipe) -> Chains:
        """Turn what the recipe quantizes into chains, each calibrated and reconstructed by itself. Raises ModelError."""
        ...

    def assemble(self, loaded: LoadedModel, chains: Chains) -> nn.Module:
        """The model that ``evaluate`` takes: ``chains`` for the parts they stand for, the float model for the others."""
        ...

    def untouched(self, loaded: LoadedModel, chains: Chains) -> dict[str, nn.Module]:
        """Parts of the float model for which there is no chain, by name."""
        ...

    def examples(self, loaded: LoadedModel, chains: Chains) -> dict[str, Tensor]:
        """One input of every chain, (1, ...), of which only the shape matters. Raises ModelError."""
        ...

    def calibration(self, loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
        """Draw the calibration images. Raises DataError."""
        ...

    def inputs(self, loaded: LoadedModel, images: CalibrationSet, recipe: Recipe, device: torch.device) -> dict[str, Samples]:
        """What each chain is calibrated on, before any is made: the float model is still itself.

        Args:
            loaded: the float model.
            images: the calibration set.
            recipe: says which parts are quantized.
            device: where to compute.
        """
        ...

    def part_scope(self, part: str, recipe: Recipe) -> str:
        """The scope of a run that would quantize of ``part`` what this one does and nothing else; both share its checkpoints."""
        ...

    def divergences(
        self, loaded: LoadedModel, images: CalibrationSet, recipe: Recipe, device: torch.device, batch_size: int
    ) -> dict[str, Divergence]:
        """The divergence behind the Fisher passes of each chain, before any is made: the float model is still itself.

        Args:
            loaded: the float model.
            images: the calibration set.
            recipe: says which parts are quantized.
            device: where to compute.
            batch_size: samples a forward pass.
        """
        ...

    def evaluate(
        self,
        model: nn.Module,
        loaded: LoadedModel,
        data: DataRequest,
        device: torch.device,
        batch_size: int,
        workers: int,
        report: Report,
    ) -> Evaluation:
        """Measure ``model`` (see :meth:`assemble`), which is on ``device``. Raises DataError, NumericsError."""
        ...

    def pictures(self, model: ModelRequest, data: DataRequest, ids: Sequence[str]) -> dict[str, Image.Image]:
        """The original images, RGB, of samples that an evaluation with these requests names in its examples.

        Reads these images alone, and no weights. Ids may come from files that others wrote: none leads outside the data.

        Raises:
            DataError: the data are not there, an id is none of theirs, or an image is damaged.
        """
        ...


class Named:
    """For tasks whose ``tags.py`` says what models are called and what is missing.

    Attributes:
        tags: that module.
        demo: what the demo models are, for people.
    """

    tags: ModuleType
    demo: str

    def model_tag(self, request: ModelRequest) -> str:
        """``model.tag`` of the request. Raises ModelError."""
        tag: str = self.tags.model_tag(request)
        return tag

    def model_names(self) -> dict[str, str]:
        """Short and demo names with what they stand for."""
        return {**self.tags.SHORT_NAMES, **dict.fromkeys(self.tags.DEMO_NAMES, self.demo)}

    def preflight(self, model: ModelRequest, data: DataRequest) -> list[Missing]:
        """What is missing of data and weights."""
        missing: list[Missing] = self.tags.preflight(model, data)
        return missing

    def inputs(self, loaded: LoadedModel, images: CalibrationSet, recipe: Recipe, device: torch.device) -> dict[str, Samples]:
        """What was drawn for each part; of a model of one part the images."""
        return images.inputs or {"": images.images}

    def part_scope(self, part: str, recipe: Recipe) -> str:
        """The part's name."""
        return part


class SinglePart:
    """For tasks whose models are one chain: they offer ``build`` and ``divergence``, and have the rest from here."""

    scopes: tuple[str, ...] = ()

    def build(self, loaded: LoadedModel, recipe: Recipe) -> BlockChain:
        """Turn the model into its chain. Raises ModelError."""
        raise NotImplementedError

    def divergence(self, recipe: Recipe) -> Divergence:
        """The divergence behind the Fisher passes."""
        raise NotImplementedError

    def chains(self, loaded: LoadedModel, recipe: Recipe) -> Chains:
        """The one chain."""
        return {"": self.build(loaded, recipe)}

    def assemble(self, loaded: LoadedModel, chains: Chains) -> nn.Module:
        """The chain, or the float model where there is none."""
        return chains.get("", loaded.model)

    def untouched(self, loaded: LoadedModel, chains: Chains) -> dict[str, nn.Module]:
        """Nothing."""
        return {}

    def examples(self, loaded: LoadedModel, chains: Chains) -> dict[str, Tensor]:
        """An image."""
        if loaded.input_shape is None:
            raise ModelError(
                f"Its task does not say what images {loaded.tag} takes, so its operations cannot be counted: "
                "its load must set LoadedModel.input_shape."
            )
        return {"": torch.zeros(1, *loaded.input_shape)}

    def divergences(
        self, loaded: LoadedModel, images: CalibrationSet, recipe: Recipe, device: torch.device, batch_size: int
    ) -> dict[str, Divergence]:
        """That of the one chain."""
        return {"": self.divergence(recipe)}
