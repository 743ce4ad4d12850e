"""Requests to a run: plain data that can travel to another process."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fimaq_core.recipe import Recipe


@dataclass(frozen=True)
class ModelRequest:
    """Which model, and where its weights come from.

    Attributes:
        name: short name, demo name or the task library's own name.
        model_args: keyword arguments for the library's constructor.
        weights: a local checkpoint file; None for the demo's own or the library's pretrained weights.
        weights_folder: has ``<model.tag>.safetensors`` (.pth, .bin); tried before the library's cache.
        weights_entry: entry of the file to take, such as ``state_dict``; None takes timm's choice.
        preprocessing: fields of :class:`tasks.common.preprocessing.GivenPreprocessing`.
    """

    name: str
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    weights_folder: Path | None = None
    weights_entry: str | None = None
    preprocessing: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRequest:
    """Which data.

    Attributes:
        path: root of the data set; None where the model brings its own (demo).
        calibration_list: file with image paths, or a result record, that replaces the drawn calibration sample.
        limit: evaluate on the first so many samples only; recorded as another split.
        skip_corrupt: leave damaged images out (named in the record) instead of stopping.
        evaluation: what is measured (retrieval: ``retrieval``, ``zero-shot``); None: the usual one.
        calibration_data: root of the data set to calibrate on; None takes the training part of ``path``.
        keep_outputs: keep what the model gave for each sample beside the record, where the task has a form
            for that. No part of a cell's identity: finished cells are not measured again for it.
        exif: detection: EXIF orientations are applied or ignored; None decides by the annotated sizes.
        class_order: order of the class folders, see :func:`tasks.common.data.class_order.ordered`.
    """

    path: Path | None = None
    calibration_list: Path | None = None
    limit: int | None = None
    skip_corrupt: bool = False
    evaluation: str | None = None
    calibration_data: Path | None = None
    keep_outputs: bool = False
    exif: Literal["apply", "ignore"] | None = None
    class_order: str | None = None


@dataclass(frozen=True)
class Missing:
    """Something that a cell needs and that is not there: its name, and how to get all things of the kind."""

    what: str
    advice: str


def describe_missing(missing: Iterable[Missing]) -> str | None:
    """One line for every kind of thing that is missing, naming all of the kind; None if nothing is."""
    kinds: dict[str, dict[str, None]] = {}
    for item in missing:
        kinds.setdefault(item.advice, {})[item.what] = None
    lines = [f"Missing: {', '.join(names)}. {advice}" for advice, names in kinds.items()]
    return "\n".join(lines) or None


@dataclass(frozen=True)
class CellRequest:
    """One cell of a grid, or one ``run`` of an adapter.

    Attributes:
        task: ``classification``, ``retrieval`` or ``detection``.
        model, data: see there.
        recipe: all settings; None measures the full-precision model.
        variant: name of the recipe's variant in tables; None makes it from the changed settings.
        results: root folder of result records (``results/runs``).
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads; None leaves PyTorch's choice.
        eval_batch: images a forward pass (evaluation, tape, Fisher passes).
        placement: where the tape lives.
        step_engine: how optimisation steps run, see :mod:`fimaq_core.reconstruction.engines`.
        mlp_checkpoint: reconstructed MLPs to use instead of reconstructing them.
        workers: data-loading processes.
        notes: remarks for its record, such as that memory ran out before.
    """

    task: str
    model: ModelRequest
    data: DataRequest
    recipe: Recipe | None
    variant: str | None = None
    results: Path = Path("results/runs")
    device: str = "cpu"
    threads: int | None = None
    eval_batch: int = 32
    placement: Literal["device", "host", "disk"] = "device"
    step_engine: Literal["auto", "eager", "fused", "compiled", "graph"] = "auto"
    mlp_checkpoint: Path | None = None
    workers: int = 0
    notes: tuple[str, ...] = ()
