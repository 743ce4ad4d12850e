"""The interface of a task, and the objects that its methods take and return."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.export.writing import Outputs
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.progress import OnProgress
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.common.fidelity import Fidelity, RawOutputs, classifier_fidelity
from tasks.common.preprocessing import Preprocessing
from tasks.common.record import Dataset, Metric, Weights
from tasks.common.request import DataRequest, ModelRequest


@dataclass
class LoadedModel:
    """A float model with its weights."""

    model: nn.Module  # in eval mode, on the CPU
    tag: str  # `model.tag`: identity of architecture and weights
    source: str  # place of the weights, as text for people
    sha256: str  # of the weights
    classes: int  # number of outputs
    eval_transform: Callable[[Any], Tensor]  # image to (C, H, W) float32
    train_transform: Callable[[Any], Tensor]
    data: str | None = None  # name of the data set that comes with a demo model
    input_shape: tuple[int, int, int] | None = None  # (C, H, W) of images, for `inspect`
    tokenizer: Callable[[list[str]], Tensor] | None = None  # n captions to (n, length) int64
    context_length: int | None = None  # largest number of tokens per caption
    entry: str | None = None  # entry of the weights file that was loaded, if it has entries
    entries: tuple[str, ...] = ()  # all entries of the file that hold weights
    class_names: tuple[str, ...] | None = None  # by label, from the file; () if unreadable
    preprocessing: Preprocessing | None = None  # None if the task has a preprocessing of its own
    notes: list[str] = field(default_factory=list)  # on the weights, for the user
    head: str | None = None  # kind of classifier that :meth:`Task.evaluate` puts on features

    @property
    def weights(self) -> Weights:
        """Origin of the weights, for the record."""
        found = {name: getattr(self, name) for name in ("tag", "source", "sha256", "entry")}
        return Weights(**found, entries=list(self.entries))

    @property
    def normalisation(self) -> tuple[list[float], list[float]] | None:
        """Means and deviations with which the evaluation transform ends; None if it does not."""
        last = (getattr(self.eval_transform, "transforms", None) or [None])[-1]
        if type(last).__name__ != "Normalize":
            return None
        means, deviations = ([float(one) for one in values] for values in (last.mean, last.std))
        return means, deviations


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration images with their ids."""

    images: Samples | Tensor  # (n, C, H, W) float32; Samples of (1, C, H, W) if sizes vary
    ids: list[str]
    transform: str  # name of the images' transform
    fingerprint: str  # sha256 of transform, ids and values
    skipped: list[str] = field(default_factory=list)  # ids of damaged images
    inputs: dict[str, Samples | Tensor] = field(default_factory=dict)  # (n, ...) of each part
    captions: list[str] | None = None  # one per image
    truncated_captions: int | None = None  # captions that are longer than the model's context
    metas: list[dict[str, Any]] = field(default_factory=list)  # shape and scale of each image
    notes: list[str] = field(default_factory=list)  # for the user
    dataset: str | None = None  # name of the data set, see tasks.common.record.Calibration
    split: str | None = None  # part of the data set
    listed: bool = False  # True: the user listed the images


@dataclass(frozen=True)
class Evaluation:
    """Metrics and per-sample outcomes of one evaluation."""

    metrics: dict[str, Metric]
    n: int  # number of samples
    outcomes: dict[str, np.ndarray]  # arrays of (n,); `sample` holds the ids
    dataset: Dataset
    #: Raw outputs of the samples in their order, such as ``logits`` (n, classes) float32
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # ids of damaged samples
    files: dict[str, Any] = field(default_factory=dict)  # JSON to write beside the record, by name
    # Up to 12 prediction samples, each the content of a ClassSample, CaptionSample or
    # ObjectSample. Task.originals takes the ids in their field `sample`.
    examples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # for the user


@dataclass(frozen=True)
class Exportable:
    """Part of a model that goes into one ONNX file, and what is needed to check the file."""

    chain: BlockChain  # on the CPU
    inputs: Tensor  # (n, ...) calibration inputs of the chain
    answers: Callable[[Any], Tensor]  # all n outputs, a tensor or a tuple, to n answers (n,)
    truth: Tensor | None = None  # right answers (n,); None if they are not known
    score: str = "top-1"  # name of the percentage of right answers
    names: Outputs = field(default_factory=Outputs)  # of the file
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None  # means, deviations
    class_names: Sequence[str] | None = None  # one per output
    coverage: float = 100.0  # least percentage of quantized multiply-adds that run in integers
    extra: dict[str, Any] = field(default_factory=dict)  # facts for the file, as JSON values
    scope: str | None = None  # that quantizes the file's layers alone; None: that of the part
    notes: Sequence[str] = ()  # for the user


#: The chains of a model by name of the part; the name is ``""`` if the model is one chain.
Chains = dict[str, BlockChain]


class Task:
    """Interface of a task. ``tasks.<name>.task.TASK`` is an object of a subclass.

    A task with models of one chain defines :meth:`load`, :meth:`build`, :meth:`calibration`,
    :meth:`divergence` and :meth:`evaluate`. A task with models of several parts replaces
    :meth:`build` and :meth:`divergence` by the methods that take or return several chains.

    The module ``tags`` of a task imports nothing heavy. It has ``SHORT_NAMES``, ``DEMO_NAMES``,
    ``MAIN_METRIC``, ``CATALOGUE``, ``model_tag``, ``weights_digest``, ``missing_data`` and
    ``preflight``. It may have ``SCOPES``, ``parts``, ``EVALUATIONS`` and ``DEFAULTS``, see
    :mod:`tasks.common.registry`.
    """

    name: str  # of the package
    tags: ModuleType  # module tags.py of the package
    demo: str  # description of the demo models

    def load(self, request: ModelRequest) -> LoadedModel:
        """Load model, weights and transforms. Raises ModelError."""
        raise NotImplementedError

    def build(self, loaded: LoadedModel, recipe: Recipe) -> BlockChain:
        """Turn a model of one chain into that chain. Raises ModelError."""
        raise NotImplementedError

    def chains(self, loaded: LoadedModel, recipe: Recipe) -> Chains:
        """Turn the quantized parts of a model into chains. Raises ModelError."""
        return {"": self.build(loaded, recipe)}

    def assemble(self, loaded: LoadedModel, chains: Chains) -> nn.Module:
        """Return the model for :meth:`evaluate`: the chains and, as they are, all float parts."""
        return chains.get("", loaded.model)

    def export_parts(self, chains: Chains) -> tuple[str, ...]:
        """Return the parts of the model that have a file each; ``("",)`` for one chain."""
        return tuple(chains)

    def exportable(
        self,
        loaded: LoadedModel,
        chains: Chains,
        part: str,
        images: CalibrationSet,
        data: DataRequest,
    ) -> Exportable:
        """Return what the file of ``part`` holds, and how it is checked.

        ``loaded`` and ``chains`` are of the quantized model, or of the full-precision model that
        the file is compared with in time. ``images`` are a few calibration images. Raises
        ModelError if the part cannot be exported.
        """
        raise ModelError(f"Task '{self.name}' has no export to ONNX.")

    def from_onnx(self, loaded: LoadedModel, models: Mapping[str, nn.Module]) -> nn.Module:
        """Return the model for :meth:`evaluate` with exported parts in place of chains.

        ``models`` by part take and return what the chains do, on the CPU. Raises ModelError if a
        file does not fit the model.
        """
        return self.assemble(loaded, dict(models))

    def untouched(self, loaded: LoadedModel, chains: Chains) -> dict[str, nn.Module]:
        """Return the parts of the float model that have no chain, by name."""
        return {}

    def examples(self, loaded: LoadedModel, chains: Chains) -> dict[str, Tensor]:
        """Return one input (1, ...) per chain, with arbitrary values. Raises ModelError."""
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
        """Return the scope that quantizes the same layers of ``part``, and no other part."""
        return part

    def divergence(self, recipe: Recipe) -> Divergence:
        """Return the divergence for the Fisher passes of a model of one chain."""
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
        """Measure ``model``, made by :meth:`assemble`, in eval mode on ``device``.

        Args:
            batch_size: images per forward pass.
            workers: data-loading processes.
            on_progress: receives progress, one unit per image.

        Raises DataError, ModelError if the model does not take the images, and NumericsError.
        """
        raise NotImplementedError

    def fidelity(
        self, full: RawOutputs, evaluation: Evaluation, loaded: LoadedModel, data: DataRequest
    ) -> Fidelity:
        """Compare an evaluation with the outputs in full precision on the same samples.

        ``full`` is :attr:`Evaluation.outputs` of the full-precision model. The result is empty if
        the task keeps no outputs.
        """
        own = evaluation.outputs
        if "logits" not in full or "logits" not in own:
            return Fidelity()
        outcomes = evaluation.outcomes
        return classifier_fidelity(full, own, outcomes["label"], cluster=outcomes.get("cluster"))

    def originals(
        self, model: ModelRequest, data: DataRequest, ids: Sequence[str]
    ) -> dict[str, Image.Image]:
        """Return the original RGB images by id, for the prediction samples of an evaluation.

        Only these images are read, and no weights. Ids may come from other people's files, so an
        id never leads outside the data. Raises DataError.
        """
        module = importlib.import_module(f"{self.tags.__package__}.originals")
        return module.originals(model, data, ids)
