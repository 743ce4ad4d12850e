"""Result records: one validated JSON file per cell, ``result.json`` in the cell's folder.

To change the schema: raise :data:`SCHEMA_VERSION` and ``ResultRecord.schema_version``, convert
older records in :meth:`ResultRecord._migrate`, and keep a record of the old version in the tests'
``old_files``. A new field whose default means "not recorded" needs no conversion.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import from_json

from fimaq_core.documents import Strict, shown
from fimaq_core.errors import CheckpointError, DataError, first_problem
from fimaq_core.files import replaced_whole
from fimaq_core.recipe import OFF, Recipe
from tasks.common.arrays import read_arrays
from tasks.common.hashing import file_sha256
from tasks.common.preprocessing import Preprocessing

SCHEMA_VERSION = 3
#: Fields that version 2 added. Version 3 added only fields whose default means "not recorded".
_NEW_IN_2 = ("stage_memory_bytes", "blocks", "outcomes_sha256", "examples", "fingerprint")

#: Bound on the unpacked outcomes of a cell; those of 50,000 samples have a few millions of bytes.
_MOST_OUTCOME_BYTES = 2**28

#: Name of the stage in which a cell waited for a file that another cell was making.
WAIT = "wait"

#: Name of a file beside the record, without a folder: records of other people are not trusted.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}$")]


class Metric(Strict):
    """A value in percent, or a rank from 1, and its standard error over the samples."""

    value: FiniteFloat
    stderr: FiniteFloat


class Weights(Strict):
    """Origin of the float weights."""

    tag: str
    source: str
    sha256: str
    entry: str | None = None  # loaded entry of the file; None if it has none, or in old records
    entries: list[str] = []  # all entries of the file that hold weights

    def notes(self) -> list[str]:
        """Return one line with the loaded entry if the file has several, else no line."""
        if len(self.entries) < 2:
            return []
        return [f"weights: entry '{self.entry}' of {', '.join(self.entries)} (--weights-entry)"]


class Dataset(Strict):
    """The evaluated samples. None means "not recorded" or "does not apply"."""

    name: str
    split: str
    count: int  # images
    classes: int
    fingerprint: str
    captions: int | None = None
    truncated_captions: int | None = None  # cut off at the model's context length
    exif: Literal["apply", "ignore"] | None = None  # the user's choice; None: by annotated sizes
    oriented_images: int | None = None  # images with an EXIF orientation tag
    # Source of the class names: weights file or demo, COCO 2017, or the order of annotations.
    class_names_from: Literal["model", "published", "annotations"] | None = None
    # Category of each class of the detector; None for a class without category in the data.
    class_categories: tuple[str | None, ...] | None = None
    class_order: str | None = None  # of class folders, see tasks.common.data.class_order
    left_out: int | None = None  # files that are neither hidden nor images


class Calibration(Strict):
    """The calibration images: ids in order, their transform, and their captions if any."""

    ids: list[str]
    transform: str
    fingerprint: str
    captions: list[str] | None = None
    truncated_captions: int | None = None
    batch: int | None = None  # samples that the divergence compares; None if it compares none


class LayerEntry(Strict):
    """A quantized layer. ``input_*`` describes a product's first operand, ``other_*`` its second.

    ``*_quantizer`` is the kind of quantizer, ``none`` if off. Old records lack the last 4 fields.
    """

    name: str
    kind: str
    weight_bits: int
    input_bits: int
    weight_ranges: str
    input_ranges: str
    weight_quantizer: str = "uniform"
    input_quantizer: str = "uniform"
    other_bits: int | None = None
    other_quantizer: str | None = None


class ModuleMap(Strict):
    """All quantized layers, and all modules left in full precision."""

    quantized: list[LayerEntry]
    full_precision: list[str]


class Environment(Strict):
    """Machine and software of a measurement."""

    versions: dict[str, str]
    git_revision: str
    device: str
    instructions: str = ""  # of the CPU; empty in old records
    threads: int


class BlockFigures(Strict):
    """Quality of a reconstructed block.

    ``error`` is ``||q - f||² / ||f||²`` over all calibration images: ``q`` is the block's output
    in the quantized model, with the errors of all earlier blocks, and ``f`` its output in full
    precision. ``fisher`` is the mean diagonal Fisher weight of the loss; None if the loss has none.
    """

    error: FiniteFloat
    fisher: FiniteFloat | None = None


class ResultRecord(Strict):
    """All facts about one finished cell. Method ``fp`` is the full-precision model.

    Example::

        record = read_record(folder / "result.json")
        print(record.model, record.method, record.metrics["top1"].value)
    """

    schema_version: Literal[3] = 3
    task: str
    model: str
    method: str
    variant: str
    w_bit: int
    a_bit: int
    seed: int | None
    recipe: dict[str, Any] | None
    recipe_digest: str
    metrics: dict[str, Metric]
    n: int
    fp_metrics: dict[str, Metric]
    weights: Weights
    preprocessing: Preprocessing | None = None
    dataset: Dataset
    calibration: Calibration | None
    modules: ModuleMap | None
    last_loss: dict[str, FiniteFloat] = {}
    fisher_passes: dict[str, int] = {}
    notes: list[str] = []
    step_engine: str | None = None
    skipped_images: list[str] = []
    blocks: dict[str, BlockFigures] = {}
    environment: Environment
    seconds: dict[str, FiniteFloat]  # wall-clock time by stage
    peak_memory_bytes: int
    stage_memory_bytes: dict[str, int] = {}  # peak by stage
    finished: str
    outcomes: FileName  # file of per-sample outcomes
    outcomes_sha256: str | None = None
    examples: FileName | None = None  # file of example predictions
    fingerprint: str = ""  # sha256 of all other fields, set when written; empty in schema 1

    @model_validator(mode="before")
    @classmethod
    def _migrate(cls, content: Any) -> Any:
        """Convert the content of an older schema to the present one."""
        if not isinstance(content, dict):
            return content
        new = [name for name in _NEW_IN_2 if name in content]
        if new and content.get("schema_version") == 1:
            raise ValueError(f"version 1 has no field '{new[0]}'")
        return {**content, "schema_version": SCHEMA_VERSION}


def bits_name(w_bit: int, a_bit: int) -> str:
    """Return a short name of bit-widths: ``fp`` for 32/32, ``w3a3`` for 3/3."""
    return "fp" if w_bit == a_bit == OFF else f"w{w_bit}a{a_bit}"


def cell_folder(root: Path, task: str, model_tag: str, recipe: Recipe | None, digest: str) -> Path:
    """Return the folder of a cell. Its name ends with 10 digits of the identity's ``digest``."""
    if recipe is None:
        return root / task / model_tag / "fp" / bits_name(OFF, OFF) / digest[:10]
    bits = bits_name(recipe.w_bits, recipe.a_bits)
    return root / task / model_tag / recipe.method / bits / f"seed{recipe.seed}-{digest[:10]}"


def fingerprint(content: dict[str, Any]) -> str:
    """Return the sha256 (hex) of a record's content, without its field ``fingerprint``.

    The hash covers canonical JSON (sorted keys, no whitespace, ASCII), so the layout of the file
    does not count. Raises ValueError for a number that is NaN, infinite or has thousands of digits.
    """
    rest = {name: value for name, value in content.items() if name != "fingerprint"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_record(record: ResultRecord, folder: Path) -> Path:
    """Write ``result.json`` with its fingerprint into ``folder`` and return its path."""
    mark = fingerprint(record.model_dump(mode="json"))
    text = record.model_copy(update={"fingerprint": mark}).model_dump_json(indent=1)
    path = folder / "result.json"
    with replaced_whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def read_record(path: Path) -> ResultRecord:
    """Read and validate a record; convert an older schema to the present one.

    Raises CheckpointError if the file is missing, damaged, edited, of a newer schema or no record.
    """
    remedy = "restore it, or delete it to measure that cell again"
    try:
        content = from_json(path.read_bytes(), allow_inf_nan=False)
    except OSError as error:
        raise CheckpointError(f"Cannot read the record {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"The record {path} is damaged ({error}): {remedy}.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is no record: its schema version is {shown(version)}.")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"The record {path} has schema version {version}, and this version of fimaq reads up "
            f"to {SCHEMA_VERSION}: update fimaq."
        )
    try:
        if version > 1 and content.get("fingerprint") != fingerprint(content):
            raise ValueError("it was changed after it was written, as its fingerprint shows")
        return ResultRecord.model_validate(content)
    except ValueError as error:  # pydantic's ValidationError is one
        why = first_problem(error) if isinstance(error, ValidationError) else str(error)
        why = why.removeprefix("Value error, ")
        raise CheckpointError(f"The record {path} is not valid: {why}: {remedy}.") from error


def outcomes_problem(record: ResultRecord, folder: Path) -> str | None:
    """Return a message if the outcomes in ``folder`` do not belong to the record, else None."""
    if record.outcomes_sha256 is None:  # schema 1 holds no hash
        return None
    path, wanted = folder / record.outcomes, record.outcomes_sha256
    try:
        found = file_sha256(path)
    except DataError as error:
        return str(error)
    if found == wanted:
        return None
    return (
        f"{path} does not belong to the record beside it (its sha256 is {found[:12]}, the record "
        f"has {wanted[:12]}): restore it, or delete the record to measure that cell again."
    )


def outcome_arrays(record: ResultRecord, folder: Path) -> dict[str, np.ndarray]:
    """Return the per-sample outcomes of a record: (n,) ids in ``sample``, (n,) numbers elsewhere.

    Raises CheckpointError if the file is missing, damaged, of another record or has other shapes.
    """
    path = folder / record.outcomes
    again = f"measure {record.model} {record.method} again with --force."
    if not path.is_file():
        raise CheckpointError(f"There are no outcomes {path}: {again}")
    if (problem := outcomes_problem(record, folder)) is not None:
        raise CheckpointError(problem)
    try:
        content = read_arrays(path, _MOST_OUTCOME_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The outcomes {path} are damaged ({error}): {again}") from error
    shapes = {array.shape for array in content.values()}
    if "sample" not in content or len(shapes) != 1 or content["sample"].ndim != 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in content.items()) or "nothing"
        raise CheckpointError(
            f"The outcomes {path} have no 'sample', or arrays of different sizes: {found}."
        )
    for name, array in content.items():
        if name != "sample" and array.dtype.kind not in "biuf":
            raise CheckpointError(f"The outcomes {path} have no numbers in {name}: {again}")
    return content


def proportion(correct: int, count: int) -> Metric:
    """Return ``correct`` of ``count`` in percent, with its binomial standard error."""
    share = correct / count
    return Metric(value=100 * share, stderr=100 * math.sqrt(share * (1 - share) / count))


def own_seconds(record: ResultRecord) -> float:
    """Return the wall-clock time (s) of a cell, without the time it waited for other cells."""
    return sum(seconds for stage, seconds in record.seconds.items() if stage != WAIT)


def recipe_of(record: ResultRecord) -> Recipe | None:
    """Return the record's recipe, validated; None for full precision. Raises CheckpointError."""
    try:
        return None if record.recipe is None else Recipe.model_validate(record.recipe)
    except ValidationError as error:
        raise CheckpointError(
            f"The record of {record.model} {record.method} holds a recipe that this version does "
            f"not know: {error}"
        ) from error
