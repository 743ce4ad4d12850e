"""Records of measured speed: one a device and model, kept in one JSON file."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fimaq_core.errors import CheckpointError
from fimaq_core.files import replaced_whole


class SpeedRecord(BaseModel):
    """What was measured of a model on a device.

    Attributes:
        device: its name, and the threads of a CPU.
        model: short name.
        step_ms: milliseconds of a step of the model's most frequent block by engine; an engine the device lacks is left out.
        floor_ms: what such a step cannot be faster than, the larger of ``floors_ms``.
        stages_s: seconds that the stages took in this run, at its sizes.
        peak_bytes: memory of reconstructing a block; None if it was not measured.
        full_protocol_min: minutes of the full protocol, extrapolated (``full_protocol_s`` by stage).
        published_min: minutes that are published for it, on another device.
        versions: of the software.
        date: of the run.
        extrapolated: whether the full protocol was calculated from parts.
        full_protocol_engine: whose steps it counts.
        fisher_share: share of the Fisher passes in it.
        measured: sizes of the run.
        rates: operations and bytes a second of this machine.
        floors_ms: by arithmetic and by bytes.
        calls_a_step, calls_are: CUDA kernels, or operator calls, of a step.
        calibration_s: seconds of calibration by number of images.
        fisher_check: seconds of whole Fisher passes over the sum of their parts.
        step_ms_by_make: steps of every make of blocks.
        memory: peak and formula.
        search: calibration beside direct candidate search.
        scaling: 24 blocks beside 12.
        notes: what was left out.
        revision: of this project.
    """

    model_config = ConfigDict(extra="forbid")

    device: str
    model: str
    step_ms: dict[str, float]
    floor_ms: float
    stages_s: dict[str, float]
    peak_bytes: int | None
    full_protocol_min: float
    published_min: float | None
    versions: dict[str, str]
    date: str
    extrapolated: bool
    full_protocol_s: dict[str, float]
    full_protocol_engine: str
    fisher_share: float
    measured: dict[str, Any]
    rates: dict[str, float]
    floors_ms: dict[str, float]
    calls_a_step: dict[str, int]
    calls_are: str
    calibration_s: dict[str, float]
    fisher_check: float | None
    step_ms_by_make: list[dict[str, Any]]
    memory: dict[str, float] | None
    search: dict[str, float] | None
    scaling: dict[str, float] | None
    notes: list[str]
    revision: str


_LIST = TypeAdapter(list[SpeedRecord])


def read_records(path: Path) -> list[SpeedRecord]:
    """All records of a file; none where there is no file.

    Raises:
        CheckpointError: the file holds something else.
    """
    if not path.is_file():
        return []
    try:
        return _LIST.validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path} does not hold records of speed: move it away. {error.errors()[0]['msg']}.") from error


def write_record(path: Path, record: SpeedRecord) -> None:
    """Add a record to a file, in place of the one of the same device and model."""
    kept = [other for other in read_records(path) if (other.device, other.model) != (record.device, record.model)]
    content = [_rounded(item) for item in _LIST.dump_python([*kept, record], mode="json")]
    with replaced_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    """Five digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
