"""The protocol of a task: what the pipeline asks of it. One package a task, loaded only when it runs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.progress import Report
from fimaq_core.recipe import Recipe
from tasks.common.record import Dataset, Metric
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


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration images with their ids.

    Attributes:
        images: (n, C, H, W) float32.
        ids: of the images, in order.
        transform: name of their transform.
        fingerprint: sha256 over transform, ids and values.
        skipped: damaged images that were left out.
        inputs: what each part of the model is calibrated on, where it has several: (n, ...) tensors by the part's name.
        captions: the caption of each image, for tasks that have them.
        truncated_captions: how many of these are longer than the model's context.
    """

    images: Tensor
    ids: list[str]
    transform: str
    fingerprint: str
    skipped: list[str] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    captions: list[str] | None = None
    truncated_captions: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Metrics and per-sample outcomes of one evaluation; ``outcomes`` are arrays of equal length."""

    metrics: dict[str, Metric]
    n: int
    outcomes: dict[str, np.ndarray]
    dataset: Dataset
    skipped: list[str] = field(default_factory=list)


class Task(Protocol):
    """What a task package offers as ``tasks.<name>.task.TASK``."""

    name: str

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

    def build(self, loaded: LoadedModel, recipe: Recipe) -> BlockChain:
        """Turn the model into a chain. Raises ModelError."""
        ...

    def calibration(self, loaded: LoadedModel, data: DataRequest, recipe: Recipe) -> CalibrationSet:
        """Draw the calibration images. Raises DataError."""
        ...

    def divergence(self, recipe: Recipe) -> Divergence:
        """The divergence behind the Fisher passes."""
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
        """Measure ``model``, which is on ``device``. Raises DataError, NumericsError."""
        ...
