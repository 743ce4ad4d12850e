"""The interface of a task. One package per task, loaded only when it runs."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.progress import OnProgress
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
        input_shape: (C, H, W) of the model's images; ``inspect`` needs it.
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
        entries = list(self.entries)
        return Weights(
            tag=self.tag, source=self.source, sha256=self.sha256, entry=self.entry, entries=entries
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
        inputs: what each part of a model of several is calibrated on: (n, ...) by the part's name.
        captions: the caption of each image, for tasks that have them.
        truncated_captions: how many of these are longer than the model's context.
        metas: what each image's transform says of it (shapes, scale), where images vary in size; their ``images`` and
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
        files: what else is kept beside the record, as was asked for: JSON values by file name.
        examples: what the model says of up to 12 samples (:class:`tasks.common.cell.prediction_samples.Spread`), as
            JSON of ``ClassSample``, ``CaptionSample`` or ``ObjectSample`` there; ``sample`` is an id
            that :meth:`Task.originals` takes.
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


#: The chains of a model by the names of its parts; one chain alone has the name ``""``.
Chains = dict[str, BlockChain]


class Task:
    """The interface of a task; ``tasks.<name>.task.TASK`` is an object of a subclass.

    Models of one chain need ``load``, ``build``, ``calibration``, ``divergence``, ``evaluate`` and
    ``pictures``. Models of several parts define ``chains`` and all that speaks of chains instead.

    Attributes:
        name: of the package.
        tags: its light module, which says what models are called and what is missing.
        demo: what the demo models are, for people.
        scopes: what of a model can be quantized, as :attr:`Recipe.scope` says it, the usual one
            first; empty: always everything.
    """

    name: str
    tags: ModuleType
    demo: str
    scopes: tuple[str, ...] = ()

    def model_tag(self, request: ModelRequest) -> str:
        """Return ``model.tag``; loads nothing, but may hash a weights file. Raises ModelError."""
        tag: str = self.tags.model_tag(request)
        return tag

    def model_names(self) -> dict[str, str]:
        """Return short and demo names with what they stand for."""
        return {**self.tags.SHORT_NAMES, **dict.fromkeys(self.tags.DEMO_NAMES, self.demo)}

    def preflight(self, model: ModelRequest, data: DataRequest) -> list[Missing]:
        """Return what is missing of weights and data, and how to get it. Downloads nothing."""
        missing: list[Missing] = self.tags.preflight(model, data)
        return missing

    def load(self, request: ModelRequest) -> LoadedModel:
        """Load model, weights and transforms. Raises ModelError."""
        raise NotImplementedError

    def build(self, loaded: LoadedModel, recipe: Recipe) -> BlockChain:
        """Turn a model into its one chain. Raises ModelError."""
        raise NotImplementedError

    def chains(self, loaded: LoadedModel, recipe: Recipe) -> Chains:
        """Turn what is quantized into chains, each reconstructed by itself. Raises ModelError."""
        return {"": self.build(loaded, recipe)}

    def assemble(self, loaded: LoadedModel, chains: Chains) -> nn.Module:
        """Return the model that ``evaluate`` takes: chains, and the float model for other parts."""
        return chains.get("", loaded.model)

    def untouched(self, loaded: LoadedModel, chains: Chains) -> dict[str, nn.Module]:
        """Return the parts of the float model for which there is no chain, by name."""
        return {}

    def examples(self, loaded: LoadedModel, chains: Chains) -> dict[str, Tensor]:
        """Return one input (1, ...) of every chain; only its shape matters. Raises ModelError."""
        if loaded.input_shape is None:
            raise ModelError(
                f"Its task does not say what images {loaded.tag} takes, so its operations cannot be counted: "
                "its load must set LoadedModel.input_shape."
            )
        return {"": torch.zeros(1, *loaded.input_shape)}

    def calibration(self, loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
        """Draw the calibration images. Raises DataError."""
        raise NotImplementedError

    def inputs(
        self, loaded: LoadedModel, images: CalibrationSet, recipe: Recipe, device: torch.device
    ) -> dict[str, Samples]:
        """Return the calibration inputs of each chain; called before any chain is made."""
        return images.inputs or {"": images.images}

    def part_scope(self, part: str, recipe: Recipe) -> str:
        """Return the scope of a run that would quantize what this one does of ``part``, and no more."""
        return part

    def divergence(self, recipe: Recipe) -> Divergence:
        """Return the divergence behind the Fisher passes of the one chain."""
        raise NotImplementedError

    def divergences(
        self,
        loaded: LoadedModel,
        images: CalibrationSet,
        recipe: Recipe,
        device: torch.device,
        batch_size: int,
    ) -> dict[str, Divergence]:
        """Return the divergence of each chain; called before any chain is made."""
        return {"": self.divergence(recipe)}

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
        """Measure ``model`` (of :meth:`assemble`) on its ``device``. Raises DataError, NumericsError."""
        raise NotImplementedError

    def originals(
        self, model: ModelRequest, data: DataRequest, ids: Sequence[str]
    ) -> dict[str, Image.Image]:
        """Return the original images, RGB, of samples that an evaluation names in its examples.

        Reads these images alone, and no weights. Ids may come from files that others wrote: none
        leads outside the data.

        Raises:
            DataError: the data are not there, an id is none of theirs, or an image is damaged.
        """
        found: dict[str, Image.Image] = importlib.import_module(
            f"{self.tags.__package__}.originals"
        ).originals(model, data, ids)
        return found
