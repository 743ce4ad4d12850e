"""Speed records, one per device and model, in one JSON file; and their tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from benchmarks.console import markdown_cell
from fimaq_core.errors import CheckpointError
from fimaq_core.files import replaced_whole

#: Columns of the table of steps, in this order.
_ENGINES = ("eager", "fused", "compiled", "graph")


class SpeedRecord(BaseModel):
    """Measured speed of a model on a device, and the full protocol extrapolated from it."""

    device: str  #: name, with the number of threads of a CPU
    model: str  #: short name
    step_ms: dict[str, float]  #: milliseconds of the most frequent block's step by engine
    floor_ms: float  #: limit of such a step, the larger of ``floors_ms``
    stages_s: dict[str, float]  #: seconds of this run, at its sizes
    peak_bytes: int | None  #: memory of reconstructing a block
    full_protocol_min: float
    published_min: float | None  #: minutes on another device
    versions: dict[str, str]
    date: str
    extrapolated: bool  #: True: the full protocol is calculated from its parts
    full_protocol_s: dict[str, float]  #: seconds by stage
    full_protocol_engine: str
    measured: dict[str, Any]  #: sizes of the run
    rates: dict[str, float]  #: operations and bytes per second of this machine
    floors_ms: dict[str, float]  #: by arithmetic and by bytes
    calibration_s: dict[str, float]  #: seconds by number of images
    step_ms_by_make: list[dict[str, Any]]
    notes: list[str]  #: reasons why measurements were left out
    revision: str  #: git revision of this project


class _Keyed(Protocol):
    """Record that replaces an older record of the same device and model."""

    device: str
    model: str


Record = TypeVar("Record", bound=_Keyed)


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """Return all records of a file; an empty list if there is no file.

    Raises:
        CheckpointError: the file holds something else.
    """
    if not path.is_file():
        return []
    try:
        return TypeAdapter(list[kind]).validate_json(path.read_bytes())
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise CheckpointError(f"{path} holds no speed records: move it away. {reason}.") from error


def write_record(path: Path, record: Record) -> None:
    """Add a record to a file; it replaces the record of the same device and model."""
    key = (record.device, record.model)
    others = read_records(path, type(record))
    kept = [other for other in others if (other.device, other.model) != key]
    text = TypeAdapter(list[type(record)]).dump_json([*kept, record])
    # Five digits of every number: more would be noise.
    content = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.5g}"))
    with replaced_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    """Return a number with three digits, or without decimals from 100 on."""
    return _number(value, 0) if value is None or abs(value) >= 100 else f"{value:.3g}"


def _steps(record: SpeedRecord) -> dict[str, str]:
    """Return a row of the table of steps."""
    best = min(record.step_ms.values())
    return {
        "model": record.model,
        **{name: _short(record.step_ms.get(name)) for name in _ENGINES},
        **{name: _short(record.floors_ms[name]) for name in ("arithmetic", "bytes")},
        "best / floor": _number(best / record.floor_ms, 1),
    }


def _stages(record: SpeedRecord) -> dict[str, str]:
    """Return a row of the table of stages."""
    peak = None if record.peak_bytes is None else record.peak_bytes / 1e6
    share = record.full_protocol_s["fisher"] / sum(record.full_protocol_s.values())
    return {
        "model": record.model,
        **{name: _short(seconds / 60) for name, seconds in record.full_protocol_s.items()},
        "all": _short(record.full_protocol_min),
        "engine": record.full_protocol_engine,
        "Fisher's share": f"{100 * share:.0f} %",
        "published": _short(record.published_min),
        "peak, MB": _number(peak, 0),
    }


def tables(records: Sequence[SpeedRecord], form: str = "github") -> str:
    """Return all tables, device by device; ``form`` is tabulate's name of the layout."""

    def grid(rows: list[dict[str, str]]) -> str:
        settings = {"disable_numparse": True, "stralign": "right"}
        cells = [{key: markdown_cell(cell) for key, cell in row.items()} for row in rows]
        return str(tabulate(cells, headers="keys", tablefmt=form, **settings))

    parts = []
    for device in dict.fromkeys(record.device for record in records):
        mine = [record for record in records if record.device == device]
        dates = sorted(record.date for record in mine)
        torch = ", ".join(sorted({record.versions["torch"] for record in mine}))
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        parts += [
            f"{'### ' if form == 'github' else ''}{device} ({when}, torch {torch})",
            "Milliseconds of a step of the most frequent block, and its floors:",
            grid([_steps(record) for record in mine]),
            "Minutes of the full protocol, extrapolated, by stage:",
            grid([_stages(record) for record in mine]),
            *(f"{record.model}: {note}." for record in mine for note in record.notes),
        ]
    return "\n\n".join(parts)
