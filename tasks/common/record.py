"""Result records: one JSON file a cell, validated, written atomically, its path its identity."""

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fimaq_core.errors import CheckpointError
from fimaq_core.files import replaced_whole
from fimaq_core.recipe import Recipe

SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(_Strict):
    """A measured value and its standard error over the samples; in percent, but for ranks, which count from 1."""

    value: float = Field(allow_inf_nan=False)
    stderr: float = Field(allow_inf_nan=False)


class Weights(_Strict):
    """Which weights were quantized."""

    tag: str
    source: str
    sha256: str


class Dataset(_Strict):
    """Which samples the metrics were measured on: ``count`` images, and where they have captions, how many of these.

    ``truncated_captions`` are longer than the model's context; what is beyond it was cut off.
    """

    name: str
    split: str
    count: int
    classes: int
    fingerprint: str
    captions: int | None = None
    truncated_captions: int | None = None


class Calibration(_Strict):
    """Which images calibrated the model: ids in order, how they were transformed.

    ``captions`` are those they were paired with. ``batch`` says how many in a row share a batch of a divergence that compares
    samples with each other; None where each sample stands alone.
    """

    ids: list[str]
    transform: str
    fingerprint: str
    captions: list[str] | None = None
    truncated_captions: int | None = None
    batch: int | None = None


class LayerEntry(_Strict):
    """One layer of the module map.

    ``input_*`` is of a product's first operand, ``other_*`` of its second. Quantizers are named by their kind, ``none`` where
    there is none or it is off. The defaults are for records from before these fields.
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


class ModuleMap(_Strict):
    """Every quantized layer, and every module left in full precision."""

    quantized: list[LayerEntry]
    full_precision: list[str]


class Environment(_Strict):
    """Where a record was measured."""

    versions: dict[str, str]
    git_revision: str
    device: str
    threads: int


class ResultRecord(_Strict):
    """Everything known of one finished cell. ``method`` ``fp`` is the full-precision model."""

    schema_version: Literal[1] = 1
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
    dataset: Dataset
    calibration: Calibration | None
    modules: ModuleMap | None
    last_loss: dict[str, float] = {}
    fisher_passes: dict[str, int] = {}
    notes: list[str] = []
    step_engine: str | None = None
    skipped_images: list[str] = []
    environment: Environment
    seconds: dict[str, float]
    peak_memory_bytes: int
    finished: str
    outcomes: str


def bits_name(w_bit: int, a_bit: int) -> str:
    """Short name of bit-widths: ``fp`` for 32/32, else such as ``w3a3``."""
    return "fp" if w_bit == 32 and a_bit == 32 else f"w{w_bit}a{a_bit}"


def cell_folder(
    root: Path, task: str, model_tag: str, method: str, w_bit: int, a_bit: int, seed: int | None, digest: str
) -> Path:
    """Folder of a cell under ``root``: task / model.tag / method / bits / seed-digest.

    Args:
        digest: the recipe's digest together with the data's identity, hex; its first 10 digits are used.
    """
    name = f"seed{seed}-{digest[:10]}" if seed is not None else digest[:10]
    return root / task / model_tag / method / bits_name(w_bit, a_bit) / name


def write_record(record: ResultRecord, folder: Path) -> Path:
    """Write ``result.json`` into ``folder`` and return its path."""
    path = folder / "result.json"
    with replaced_whole(path) as temporary:
        temporary.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path


def read_record(path: Path) -> ResultRecord:
    """Read and validate a record.

    Raises:
        CheckpointError: missing, damaged, of another schema, or not a record.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"Cannot read the record {path}: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"The record {path} is damaged ({error}): delete it to measure that cell again.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"The record {path} has schema version {version!r}; this version of fimaq reads {SCHEMA_VERSION}.")
    try:
        return ResultRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"The record {path} is not valid: {where}: {first['msg']}.") from error


def proportion(correct: int, count: int) -> Metric:
    """Percentage of ``correct`` among ``count`` with its binomial standard error."""
    share = correct / count
    return Metric(value=100 * share, stderr=100 * math.sqrt(share * (1 - share) / count))


def recipe_of(record: ResultRecord) -> Recipe | None:
    """The record's recipe as a validated object; None for full precision."""
    try:
        return None if record.recipe is None else Recipe.model_validate(record.recipe)
    except ValidationError as error:
        raise CheckpointError(
            f"The record of {record.model} {record.method} holds a recipe that this version does not know: {error}"
        ) from error
