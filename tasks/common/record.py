"""Result records: one validated JSON file per cell, ``result.json`` in the cell's folder.

To change the schema: raise :data:`SCHEMA_VERSION` and ``ResultRecord.schema_version``, convert
older records in :meth:`ResultRecord._migrate`, and keep a record of the old version in the tests'
``old_files``. A new field whose default means "not recorded" needs no conversion.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from fimaq_core.documents import Strict, shown
from fimaq_core.errors import CheckpointError, first_problem
from fimaq_core.files import cause_of, open_regular, replaced_whole
from fimaq_core.recipe import OFF, Recipe
from tasks.common.preprocessing import Preprocessing
from tasks.common.record_entries import (
    Bits,
    BlockFigures,
    Bytes,
    Calibration,
    Count,
    Dataset,
    Environment,
    Exported,
    FileName,
    LayerEntry,
    Metric,
    ModuleMap,
    Seconds,
    Seed,
    Sha256,
    SignedMetric,
    Text,
    Weights,
)

__all__ = [
    "BlockFigures", "Calibration", "Dataset", "Environment", "Exported", "LayerEntry", "Metric",
    "ModuleMap", "NotMeasured", "ResultRecord", "SignedMetric", "Weights",
]  # fmt: skip

SCHEMA_VERSION = 6
#: Fields by the version that added them. Their defaults mean "not recorded".
_ADDED = {
    2: ("stage_memory_bytes", "blocks", "outcomes_sha256", "examples", "fingerprint"),
    4: ("identity", "model_args", "artefacts"),
    5: ("exported",),
    6: ("fidelity",),
}

#: Metrics of the tasks here, as patterns; other tasks have metrics of their own.
METRICS = {
    "classification": r"((knn|linear)_)?top[15]",
    "retrieval": r"top[15]|((i2t|t2i)_)?R@\d+|mean_recall|(i2t|t2i)_median_rank",
    "detection": r"AP(50|75|s|m|l)?_(box|mask)",
}
#: Largest size of a record file in bytes.
_MOST_BYTES = 32 << 20
#: Largest standard error of a percentage. Jackknife errors of few images may exceed 100 points.
_LARGEST_ERROR = 1e4

#: Name of the stage in which a cell waited for a file that another cell was making.
WAIT = "wait"


class NotMeasured(CheckpointError):
    """There is no record."""


class ResultRecord(Strict):
    """All facts about one finished cell. Method ``fp`` is the full-precision model.

    Example::

        record = read_record(folder / "result.json")
        print(record.model, record.method, record.metrics["top1"].value)
    """

    schema_version: Literal[6] = 6
    identity: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""  # empty in old records
    task: Text
    model: Text
    model_args: dict[Text, Any] = {}  # of the library's constructor; empty in old records
    method: Text
    variant: Text
    w_bit: Bits
    a_bit: Bits
    seed: Seed | None
    recipe: dict[Text, Any] | None
    recipe_digest: Text
    metrics: dict[Text, Metric] = Field(min_length=1)
    n: Count = Field(ge=1)
    fp_metrics: dict[Text, Metric]
    fidelity: dict[Text, SignedMetric] = {}  # to full precision, see tasks.common.fidelity
    weights: Weights
    preprocessing: Preprocessing | None = None
    dataset: Dataset
    calibration: Calibration | None
    artefacts: dict[FileName, Sha256] = {}  # shared files that were used, and of their tensors
    modules: ModuleMap | None
    exported: Exported | None = None  # file that was measured in place of the simulated model
    last_loss: dict[Text, FiniteFloat] = {}
    fisher_passes: dict[Text, Count] = {}
    notes: list[Annotated[str, Field(max_length=100_000)]] = []
    step_engine: Text | None = None
    skipped_images: list[Text] = []
    blocks: dict[Text, BlockFigures] = {}
    environment: Environment
    seconds: dict[Text, Seconds]  # wall-clock time by stage
    peak_memory_bytes: Bytes
    stage_memory_bytes: dict[Text, Bytes] = {}  # peak by stage
    finished: str
    outcomes: FileName  # file of per-sample outcomes
    outcomes_sha256: Sha256 | None = None
    examples: FileName | None = None  # file of example predictions
    fingerprint: Text = ""  # sha256 of all other fields, set when written; empty in schema 1

    @field_validator("metrics", "fp_metrics")
    @classmethod
    def _check_metrics(cls, value: dict[str, Metric]) -> dict[str, Metric]:
        for name, metric in value.items():
            # Rounding may exceed 100 % by a few units in the last place.
            if is_percent(name) and (metric.value > 100 + 1e-9 or metric.stderr > _LARGEST_ERROR):
                raise ValueError(f"{name} {metric.value:g} ± {metric.stderr:g} is no percentage")
        return value

    @field_validator("finished")
    @classmethod
    def _check_date(cls, value: str) -> str:
        if not re.match(r"\d{4}-\d\d-\d\dT", value) or len(value) > 40:
            raise ValueError("it is no date and time in the form of ISO 8601")
        datetime.fromisoformat(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _migrate(cls, content: Any) -> Any:
        """Convert the content of an older schema to the present one."""
        if not isinstance(content, dict):
            return content
        version = content.get("schema_version", SCHEMA_VERSION)
        for added, names in _ADDED.items():
            new = [name for name in names if name in content]
            if new and version < added:
                raise ValueError(f"version {version} has no field '{new[0]}'")
        return {**content, "schema_version": SCHEMA_VERSION}


def is_percent(metric: str) -> bool:
    """Return True for a percentage, False for a median rank."""
    return not metric.endswith("median_rank")


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


def read_record(path: Path, recipe_digest: str | None = None) -> ResultRecord:
    """Read and check a record; convert an older schema to the present one.

    Args:
        path: ``result.json`` of a cell.
        recipe_digest: digest of the cell's recipe (empty for full precision), if it is known.

    Raises:
        NotMeasured: there is no file.
        CheckpointError: the file is unreadable, damaged, edited, of a newer schema or no record;
            it contradicts itself; or its cell is not the cell of its folder or ``recipe_digest``.
    """
    remedy = "restore it, or delete it to measure that cell again"
    try:
        with open_regular(path, _MOST_BYTES) as file:
            content = from_json(file.read(), allow_inf_nan=False)
    except FileNotFoundError as error:
        place = next(filter(os.path.lexists, (path, *path.parents)), path)
        if place.is_symlink() and not place.exists():
            fix = "mount its disk, or remove the link to measure that cell again"
            text = f"Cannot read the record {path}: {place} is a link to nothing: {fix}."
            raise CheckpointError(text) from error
        raise NotMeasured(f"Cannot read the record {path}: {error.strerror}.") from error
    except OSError as error:
        why = cause_of(error, path)
        raise CheckpointError(f"Cannot read the record {path}: {why}.") from error
    except ValueError as error:
        raise CheckpointError(f"The record {path} is damaged ({error}): {remedy}.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is no record: its schema version is {shown(version)}.")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"The record {path} has schema version {version!r:.99}, and this version of fimaq "
            f"reads up to {SCHEMA_VERSION}: update fimaq."
        )
    try:
        if version > 1 and content.get("fingerprint") != fingerprint(content):
            raise ValueError("it was changed after it was written, as its fingerprint shows")
        record = ResultRecord.model_validate(content)
        for problem in contradictions(record):
            raise ValueError(problem)
    except (ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        why = first_problem(error) if isinstance(error, ValidationError) else str(error)
        why = " ".join(why.removeprefix("Value error, ").split())
        raise CheckpointError(f"The record {path} is not valid: {why:.300}: {remedy}.") from error
    if (other := _other_cell(record, path, recipe_digest)) is not None:
        move = "move it to the folder of its own cell, or delete it to measure this cell again"
        raise CheckpointError(f"The record {path} is of another cell: {other}: {move}.")
    return record


def has_record(path: Path, recipe_digest: str | None = None) -> bool:
    """Return False if there is no record; raise CheckpointError as :func:`read_record` does."""
    try:
        read_record(path, recipe_digest)
    except NotMeasured:
        return False
    return True


def contradictions(record: ResultRecord) -> Iterator[str]:
    """Yield what in a record contradicts another part of it."""
    recipe, count, left_out = record.recipe, record.dataset.count, len(record.skipped_images)
    if (record.method == "fp") != (recipe is None):
        yield f"method {record.method!r:.99} and its recipe do not go together"
    elif recipe is None:
        none, bits = (record.seed, record.calibration, record.modules), (record.w_bit, record.a_bit)
        if none != (None, None, None) or record.recipe_digest or bits != (OFF, OFF):
            yield "it is of the full-precision model, with facts that only quantized models have"
    else:
        fields = {"method": "method", "w_bit": "w_bits", "a_bit": "a_bits", "seed": "seed"}
        for name, field in fields.items():
            if (own := getattr(record, name)) != (other := recipe.get(field)):
                yield f"{name} is {own!r:.99}, and {other!r:.99} in its recipe"
        if (scope := recipe.get("scope")) and not record.variant.endswith(f" [{scope}]"):
            yield f"its variant {record.variant!r:.99} does not name its scope {scope!r:.99}"
        # A recipe of another version of fimaq has a digest that this version cannot compute.
        with contextlib.suppress(ValidationError):
            if Recipe.model_validate(recipe).digest() != record.recipe_digest:
                yield "its recipe has another digest than the record says"
    if (own := record.exported) is not None:
        if recipe is None:
            yield "it is of the full-precision model, and of an export, which is quantized"
        if not own.integer_macs <= own.quantized_macs <= own.macs:
            yield "its export has more multiply-adds in integers, or of quantized layers, than all"
    if not count - left_out <= record.n <= count:
        yield f"n is {record.n}, with {count} samples and {left_out} damaged images"
    known = METRICS.get(record.task, "")
    for name in record.metrics.keys() | record.fp_metrics.keys() if known else ():
        if not re.fullmatch(known, name):
            yield f"task {record.task} has no metric {name!r:.99}"


def _other_cell(record: ResultRecord, path: Path, recipe_digest: str | None) -> str | None:
    """Return a text that names the record's cell and that of its folder; None if they agree.

    A folder without the form of a cell's folder can hold any record. A record without an identity
    is compared by the names in the path, and by ``recipe_digest`` if it is given.
    """
    folder = Path(os.path.abspath(path)).parent
    digits, bits = folder.name[-10:], bits_name(record.w_bit, record.a_bit)
    seed = "" if record.recipe is None else f"seed{record.seed}-"
    tail = f"{seed}{record.identity[:10] or digits}"
    own = Path(record.task, record.model, record.method, bits, tail)
    form = r"(fp|w\d+a\d+)/(seed\d+-)?[0-9a-f]{10}"
    if not re.fullmatch(form, "/".join(folder.parts[-2:])):
        return None
    there = Path(*folder.parts[-len(own.parts) :])
    if own != there:
        return f"it is of {own}, and its folder of {there}"
    if not record.identity and recipe_digest not in (None, record.recipe_digest):
        return f"it is of {own} with other settings than the cell of this folder"
    return None


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
