"""The interface of a task. Each task is a package whose libraries are imported when it runs."""

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
from tasks.common.request import DataRequest, ModelRequest


@dataclass
class LoadedModel:
    """A float model with its weights."""

    model: nn.Module  # in eval mode, on the CPU
    tag: str  # `model.tag`: identity of architecture and weights
    source: str  # place of the weights, for people
    sha256: str  # of the weights
    classes: int  # number of outputs
    eval_transform: Callable[[Any], Tensor]  # image to (C, H, W) float32
    train_transform: Callable[[Any], Tensor]
    data: str | None = None  # name of the data set that comes with the model
    input_shape: tuple[int, int, int] | None = None  # (C, H, W) of images, for `inspect`
    tokenizer: Callable[[list[str]], Tensor] | None = None  # captions to (n, length) int64
    context_length: int | None = None  # largest number of tokens per caption
    entry: str | None = None  # entry of the weights file that was loaded, if it has entries
    entries: tuple[str, ...] = ()  # all entries of the file that hold weights
    class_names: tuple[str, ...] | None = None  # in the weights file, by label; () if unreadable
    preprocessing: Preprocessing | None = None  # None where the task has its own way

    @property
    def weights(self) -> Weights:
        """The weights in the form of a record."""
        found = {name: getattr(self, name) for name in ("tag", "source", "sha256", "entry")}
        return Weights(**found, entries=list(self.entries))


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration images with their ids."""

    images: Samples | Tensor  # (n, C, H, W) float32, or Samples of (1, C, H, W) where sizes vary
    ids: list[str]
    transform: str  # name of the images' transform
    fingerprint: str  # sha256 of transform, ids and values
    skipped: list[str] = field(default_factory=list)  # ids of damaged images
    inputs: dict[str, Samples | Tensor] = field(default_factory=dict)  # (n, ...) by part
    captions: list[str] | None = None  # one per image
    truncated_captions: int | None = None  # captions that are longer than the model's context
    metas: list[dict[str, Any]] = field(default_factory=list)  # shape and scale of each image
    notes: list[str] = field(default_factory=list)  # for the user


@dataclass(frozen=True)
class Evaluation:
    """Metrics and per-sample outcomes of one evaluation."""

    metrics: dict[str, Metric]
    n: int  # number of samples
    outcomes: dict[str, np.ndarray]  # (n,) each; `sample` holds the ids
    dataset: Dataset
    skipped: list[str] = field(default_factory=list)  # ids of damaged samples
    files: dict[str, Any] = field(default_factory=dict)  # JSON to write beside the record, by name
    # Predictions for up to 12 samples, each the content of a ClassSample, CaptionSample or
    # ObjectSample; their `sample` is an id that Task.originals takes.
    examples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # for the user


#: The chains of a model by part. The only chain of a model has the name ``""``.
Chains = dict[str, BlockChain]


class Task:
    """Interface of a task; ``tasks.<name>.task.TASK`` is an object of a subclass.

    A task whose models are one chain defines :meth:`load`, :meth:`build`, :meth:`calibration`,
    :meth:`divergence` and :meth:`evaluate`. A task whose models have several parts defines
    :meth:`chains` and the other methods that take or return chains instead of :meth:`build`.

    Its module ``tags`` imports nothing heavy. It has ``SHORT_NAMES``, ``DEMO_NAMES``,
    ``CATALOGUE``, ``model_tag``, ``weights_digest``, ``missing_data`` and ``preflight``; and, if
    needed, ``SCOPES``, ``parts``, ``EVALUATIONS``, ``DEFAULTS``, see :mod:`tasks.common.registry`.
    """

    name: str  # of the package
    tags: ModuleType  # its tags.py
    demo: str  # description of the demo models

    def model_names(self) -> dict[str, str]:
        """Return short and demo names with their meanings."""
        return {**self.tags.SHORT_NAMES, **dict.fromkeys(self.tags.DEMO_NAMES, self.demo)}

    def load(self, request: ModelRequest) -> LoadedModel:
        """Load model, weights and transforms. Raises ModelError."""
        raise NotImplementedError

    def build(self, loaded: LoadedModel, recipe: Recipe) -> BlockChain:
        """Turn a model into its only chain. Raises ModelError."""
        raise NotImplementedError

    def chains(self, loaded: LoadedModel, recipe: Recipe) -> Chains:
        """Turn the quantized parts of a model into chains. Raises ModelError."""
        return {"": self.build(loaded, recipe)}

    def assemble(self, loaded: LoadedModel, chains: Chains) -> nn.Module:
        """Return the model for :meth:`evaluate`: chains, and float modules for all other parts."""
        return chains.get("", loaded.model)

    def untouched(self, loaded: LoadedModel, chains: Chains) -> dict[str, nn.Module]:
        """Return the parts of the float model that have no chain, by name."""
        return {}

    def examples(self, loaded: LoadedModel, chains: Chains) -> dict[str, Tensor]:
        """Return one input (1, ...) per chain, of any values. Raises ModelError."""
        if loaded.input_shape is None:
            raise ModelError(
                f"The operations of {loaded.tag} cannot be counted, because its task does not say "
                "which images it takes: its load must set LoadedModel.input_shape."
            )
        return {"": torch.zeros(1, *loaded.input_shape)}

    def calibration(self, loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
        """Draw the calibration images. Raises DataError."""
        raise NotImplementedError

    def inputs(
        self, loaded: LoadedModel, images: CalibrationSet, recipe: Recipe, device: torch.device
    ) -> dict[str, Samples]:
        """Return the calibration inputs of each chain. Called before any chain is built."""
        return images.inputs or {"": images.images}

    def part_scope(self, part: str, recipe: Recipe) -> str:
        """Return the scope of a run that quantizes the same layers of ``part`` and nothing else."""
        return part

    def divergence(self, recipe: Recipe) -> Divergence:
        """Return the divergence of the only chain, for its Fisher passes."""
        raise NotImplementedError

    def divergences(
        self,
        loaded: LoadedModel,
        images: CalibrationSet,
        recipe: Recipe,
        device: torch.device,
        batch_size: int,
    ) -> dict[str, Divergence]:
        """Return the divergence of each chain. Called before any chain is built."""
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
        """Measure ``model`` of :meth:`assemble` on ``device``. Raises DataError, NumericsError."""
        raise NotImplementedError

    def originals(
        self, model: ModelRequest, data: DataRequest, ids: Sequence[str]
    ) -> dict[str, Image.Image]:
        """Return the original RGB images of ``ids``, the samples of an evaluation's examples.

        Reads these images only, and no weights. Ids may come from files of other people: an id
        never leads outside the data. Raises DataError.
        """
        module = importlib.import_module(f"{self.tags.__package__}.originals")
        return module.originals(model, data, ids)
