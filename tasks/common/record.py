"""Result records: one JSON file per cell, validated, written atomically; its path is its identity.

To change the schema: raise :data:`SCHEMA_VERSION`, bring records of the version before up to it in
:meth:`ResultRecord._migrate`, and keep a record of that version among the tests' data.
"""

import hashlib
import json
import math
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import BadZipFile

import numpy as np
from pydantic import Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import from_json

from fimaq_core.documents import Strict
from fimaq_core.errors import CheckpointError, DataError, first_problem
from fimaq_core.files import replaced_whole
from fimaq_core.recipe import Recipe
from tasks.common.hashing import file_sha256
from tasks.common.preprocessing import Preprocessing

SCHEMA_VERSION = 3
#: Fields that version 2 brought; those of version 3 have defaults that mean "not recorded".
_NEW_IN_2 = ("stage_memory_bytes", "blocks", "outcomes_sha256", "examples", "fingerprint")

#: Stage in which a cell waited for something that another was making.
WAIT = "wait"

_REMEDY = "restore it, or delete it to measure that cell again"

#: Name of a file beside the record: records come from elsewhere too, so it can name no other place.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}$")]


class Metric(Strict):
    """A measured value in percent, or a rank from 1, and its standard error over the samples."""

    value: FiniteFloat
    stderr: FiniteFloat


class Weights(Strict):
    """Which weights were quantized.

    ``entry`` is the entry of the file that they were taken from, ``entries`` are all its entries
    with weights. None and empty: the file has no entries, or the record is older than the field.
    """

    tag: str
    source: str
    sha256: str
    entry: str | None = None
    entries: list[str] = []

    def notes(self) -> list[str]:
        """A line that names the entry, where the file has several."""
        if len(self.entries) < 2:
            return []
        return [f"weights: entry '{self.entry}' of {', '.join(self.entries)} (--weights-entry)"]


class Dataset(Strict):
    """Which samples the metrics were measured on; None means not recorded, or no such thing.

    Attributes:
        count, captions: numbers of images, and of their captions.
        truncated_captions: captions longer than the model's context, which were cut off.
        exif: detection: the user's decision on EXIF orientations; None: as annotated sizes say.
        oriented_images: images with an EXIF orientation tag.
        class_names_from: weights or demo (``model``), COCO 2017 (``published``), or the data, by
            position (``annotations``).
        class_categories: category of each class of the detector; None for one that the data lack.
        class_order: order of class folders, see :mod:`tasks.common.data.class_order`.
        left_out: number of files that are neither hidden nor images.
    """

    name: str
    split: str
    count: int
    classes: int
    fingerprint: str
    captions: int | None = None
    truncated_captions: int | None = None
    exif: Literal["apply", "ignore"] | None = None
    oriented_images: int | None = None
    class_names_from: Literal["model", "published", "annotations"] | None = None
    class_categories: tuple[str | None, ...] | None = None
    class_order: str | None = None
    left_out: int | None = None


class Calibration(Strict):
    """Which images calibrated the model: ids in order, their transform, and their captions.

    ``batch`` is that of a divergence that compares samples; None where each sample stands alone.
    """

    ids: list[str]
    transform: str
    fingerprint: str
    captions: list[str] | None = None
    truncated_captions: int | None = None
    batch: int | None = None


class LayerEntry(Strict):
    """A layer of the module map. ``input_*`` is of a product's first operand, ``other_*`` of its second.

    Quantizers are named by kind, ``none`` for one that is off. Defaults are for older records.
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
    """Every quantized layer, and every module left in full precision."""

    quantized: list[LayerEntry]
    full_precision: list[str]


class Environment(Strict):
    """Where a record was measured; ``instructions`` of PyTorch's CPU kernels are empty in older ones."""

    versions: dict[str, str]
    git_revision: str
    device: str
    instructions: str = ""
    threads: int


class BlockFigures(Strict):
    """How a reconstructed block came out.

    ``error`` is ``||q - f||² / ||f||²`` over all calibration images: q is its output in the
    quantized model, all errors before it included, f that in full precision. ``fisher`` is the mean
    of the diagonal Fisher weight in its loss; None for losses without.
    """

    error: FiniteFloat
    fisher: FiniteFloat | None = None


class ResultRecord(Strict):
    """Everything known of one finished cell. ``method`` ``fp`` is the full-precision model.

    Example::

        record = read_record(folder / "result.json")
        print(record.model, record.method, record.metrics["top1"].value)

    Of what lies beside it, ``outcomes`` names the file of per-sample outcomes and ``outcomes_sha256``
    is its sha256, ``examples`` names the file of example predictions. ``seconds`` and
    ``stage_memory_bytes`` (the peak meanwhile) are by stage. ``fingerprint`` is the sha256 of all
    else: set when the record is written, empty in one of schema 1.
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
    seconds: dict[str, FiniteFloat]
    peak_memory_bytes: int
    stage_memory_bytes: dict[str, int] = {}
    finished: str
    outcomes: FileName
    outcomes_sha256: str | None = None
    examples: FileName | None = None
    fingerprint: str = ""

    @model_validator(mode="before")
    @classmethod
    def _migrate(cls, content: Any) -> Any:
        """Bring the content of an older schema to the present one."""
        if not isinstance(content, dict):
            return content
        foreign = [name for name in _NEW_IN_2 if name in content]
        if foreign and content.get("schema_version") == 1:
            raise ValueError(f"version 1 has no field '{foreign[0]}'")
        return {**content, "schema_version": SCHEMA_VERSION}


def bits_name(w_bit: int, a_bit: int) -> str:
    """Short name of bit-widths: ``fp`` for 32/32, else such as ``w3a3``."""
    return "fp" if w_bit == 32 and a_bit == 32 else f"w{w_bit}a{a_bit}"


def cell_folder(
    root: Path,
    task: str,
    model_tag: str,
    method: str,
    w_bit: int,
    a_bit: int,
    seed: int | None,
    digest: str,
) -> Path:
    """Return the folder of a cell; 10 digits of its identity's ``digest`` end the name."""
    name = f"seed{seed}-{digest[:10]}" if seed is not None else digest[:10]
    return root / task / model_tag / method / bits_name(w_bit, a_bit) / name


def fingerprint(content: dict[str, Any]) -> str:
    """Return the sha256 (hex) of the canonical JSON of `content` without its own fingerprint.

    Canonical: keys sorted, no whitespace, ASCII alone, so the file's layout does not count.

    Raises:
        ValueError: a number is NaN, infinite or of thousands of digits.
    """
    rest = {name: value for name, value in content.items() if name != "fingerprint"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def sealed(record: ResultRecord) -> ResultRecord:
    """Return the record with its fingerprint."""
    return record.model_copy(
        update={"fingerprint": fingerprint(json.loads(record.model_dump_json()))}
    )


def write_record(record: ResultRecord, folder: Path) -> Path:
    """Write ``result.json``, sealed, into ``folder`` and return its path."""
    path = folder / "result.json"
    with replaced_whole(path) as temporary:
        temporary.write_text(sealed(record).model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path


def read_record(path: Path) -> ResultRecord:
    """Read and validate a record; one of an older schema comes as one of the present schema.

    Raises:
        CheckpointError: missing, damaged, changed after it was written, of a newer schema, or no record.
    """
    try:
        content = from_json(path.read_bytes(), allow_inf_nan=False)
    except OSError as error:
        raise CheckpointError(f"Cannot read the record {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"The record {path} is damaged ({error}): {_REMEDY}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} is no record: it holds a JSON {type(content).__name__}, not an object."
        )
    version = content.get("schema_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is no record: its schema version is {version!r}.")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"The record {path} has schema version {version}, and this version of fimaq reads up to {SCHEMA_VERSION}: "
            "update fimaq."
        )
    try:
        if version >= 2 and content.get("fingerprint") != fingerprint(content):
            raise CheckpointError(
                f"The record {path} was changed after it was written (its fingerprint is not that of its content): {_REMEDY}."
            )
        return ResultRecord.model_validate(content)
    except ValueError as error:  # pydantic's, too
        why = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(
            f"The record {path} is not valid: {why.removeprefix('Value error, ')}: {_REMEDY}."
        ) from error


def outcomes_problem(record: ResultRecord, folder: Path) -> str | None:
    """Say why the outcomes in a record's ``folder`` are not its own; None if they are, or for schema 1."""
    if record.outcomes_sha256 is None:
        return None
    path = folder / record.outcomes
    try:
        found = file_sha256(path)
    except DataError as error:
        return str(error)
    if found == record.outcomes_sha256:
        return None
    return (
        f"{path} does not belong to the record beside it (its sha256 is {found[:12]}, the record has "
        f"{record.outcomes_sha256[:12]}): restore it, or delete the record to measure that cell again."
    )


def outcome_arrays(record: ResultRecord, folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of outcomes in a record's ``folder``: ``sample`` (ids), numbers per sample.

    Raises:
        CheckpointError: the file is missing, damaged, of another record or of another form.
    """
    path = folder / record.outcomes
    again = f"measure {record.model} {record.method} again with --force."
    if not path.is_file():
        raise CheckpointError(f"There are no outcomes {path}: {again}")
    if (problem := outcomes_problem(record, folder)) is not None:
        raise CheckpointError(problem)
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise CheckpointError(f"The outcomes {path} are damaged ({error}): {again}") from error
    shapes = {array.shape for array in content.values()}
    if "sample" not in content or len(shapes) != 1 or content["sample"].ndim != 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in content.items()) or "nothing"
        raise CheckpointError(
            f"The outcomes {path} have no 'sample', or arrays of different sizes: {found}."
        )
    words = [
        name
        for name, array in content.items()
        if name != "sample" and array.dtype.kind not in "biuf"
    ]
    if words:
        raise CheckpointError(f"The outcomes {path} have no numbers in {', '.join(words)}: {again}")
    return content


def proportion(correct: int, count: int) -> Metric:
    """Percentage of ``correct`` among ``count`` with its binomial standard error."""
    share = correct / count
    return Metric(value=100 * share, stderr=100 * math.sqrt(share * (1 - share) / count))


def own_seconds(record: ResultRecord) -> float:
    """Return the seconds that a cell took without waiting for others."""
    return sum(seconds for stage, seconds in record.seconds.items() if stage != WAIT)


def recipe_of(record: ResultRecord) -> Recipe | None:
    """The record's recipe as a validated object; None for full precision."""
    try:
        return None if record.recipe is None else Recipe.model_validate(record.recipe)
    except ValidationError as error:
        raise CheckpointError(
            f"The record of {record.model} {record.method} holds a recipe that this version does not know: {error}"
        ) from error
