"""Requests for one cell: plain data that can travel to another process."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fimaq_core.recipe import Recipe
from fimaq_core.resources import EngineChoice, Placement

#: Start of the names of calibration data that a demo draws.
DRAWN = "demo:"


@dataclass(frozen=True)
class ModelRequest:
    """A model and the source of its weights."""

    name: str = ""  # short name, demo name or the library's; empty if a checkpoint gives it
    model_args: dict[str, Any] = field(default_factory=dict)  # of the library's constructor
    weights: Path | None = None  # a local file; None: the demo's own or the published weights
    weights_folder: Path | None = None  # searched before the hub for <model.tag>.safetensors ...
    weights_entry: str | None = None  # entry of the file, such as state_dict; None: timm's choice
    preprocessing: dict[str, Any] = field(default_factory=dict)  # fields of GivenPreprocessing
    head: str | None = None  # kind of classifier on features, see tasks.classification.heads
    from_file: bool = False  # True if a checkpoint names the model: nothing is downloaded then


@dataclass(frozen=True)
class DataRequest:
    """The data to calibrate on and to evaluate on."""

    path: Path | None = None  # root of the data set; None: the demo model's own data
    calibration_list: Path | None = None  # image paths, or a record; replaces the random sample
    limit: int | None = None  # evaluate the first samples only; the record has another split then
    skip_corrupt: bool = False  # leave damaged images out and name them, instead of stopping
    evaluation: str | None = None  # measurement, such as zero-shot; None: the task's default
    # Root, or `demo:<kind>` for images that the package draws; None: the training part of `path`.
    calibration_data: Path | None = None
    # Write the model's output for each sample beside the record, if the task supports it. This is
    # not part of a cell's identity: a finished cell is not measured again for its outputs.
    keep_outputs: bool = False
    exif: Literal["apply", "ignore"] | None = None  # detection; None: by the annotated sizes
    class_order: str | None = None  # of class folders, see tasks.common.data.class_order
    # Evaluation elsewhere, see tasks.common.data.elsewhere; both are not used by calibration.
    dataset: str | None = None  # NAME or NAME=FOLDER of a data set
    corrupt: str | None = None  # NAME:SEVERITY of a corruption of the evaluated images


@dataclass(frozen=True)
class Missing:
    """Weights or data that a cell needs and that are absent, and advice on how to get them."""

    what: str
    advice: str


def describe_missing(missing: Iterable[Missing]) -> str | None:
    """Return one line per advice, with all missing items it is for; None if nothing is missing."""
    kinds: dict[str, dict[str, None]] = {}
    for item in missing:
        kinds.setdefault(item.advice, {})[item.what] = None
    lines = [f"Missing: {', '.join(names)}. {advice}" for advice, names in kinds.items()]
    return "\n".join(lines) or None


@dataclass(frozen=True)
class CellRequest:
    """A cell to measure: one of a grid, or one ``run`` of a task's command line.

    Example::

        CellRequest("classification", ModelRequest("demo_vit"), DataRequest(), make_recipe("rtn"))
    """

    task: str  # classification, retrieval, detection or a registered task
    model: ModelRequest
    data: DataRequest
    recipe: Recipe | None  # None measures the full-precision model
    variant: str | None = None  # name of the recipe in tables; None: built from changed settings
    base_variant: str | None = None  # that of the cell without joint finishing, to start from
    results: Path = Path("results/runs")  # root of the records
    device: str = "cpu"  # cpu, cuda or cuda:N
    threads: int | None = None  # of the CPU; None leaves the choice to PyTorch
    eval_batch: int = 32  # images per forward pass of evaluation, tape and Fisher passes
    placement: Placement = "device"  # of the inputs of all blocks
    step_engine: EngineChoice = "auto"
    mlp_checkpoint: Path | None = None  # reconstructed MLPs, instead of reconstructing them
    workers: int = 0  # data-loading processes
    export: bool = False  # True: measure the ONNX export of the quantized model
    notes: tuple[str, ...] = ()  # texts for the record, such as "ran out of memory once"
