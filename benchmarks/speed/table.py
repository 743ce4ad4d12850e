"""Tables of speed records, for the terminal and for the README."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from benchmarks.speed.record import SpeedRecord
from fimaq_core.errors import CheckpointError
from fimaq_core.files import replaced_whole

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
ENGINES = ("eager", "fused", "compiled", "graph")

Cell = Callable[[SpeedRecord], str]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _best(record: SpeedRecord) -> float:
    return min(record.step_ms.values())


def _calls(record: SpeedRecord) -> str:
    return " / ".join(f"{name} {count}" for name, count in record.calls_a_step.items()) or "-"


STEPS: dict[str, Cell] = {
    "model": lambda record: record.model,
    **{name: lambda record, name=name: _short(record.step_ms.get(name)) for name in ENGINES},  # type: ignore[misc]
    "arithmetic": lambda record: _short(record.floors_ms["arithmetic"]),
    "bytes": lambda record: _short(record.floors_ms["bytes"]),
    "best / floor": lambda record: _number(_best(record) / record.floor_ms, 1),
    "kernels or calls": _calls,
}

STAGES: dict[str, Cell] = {
    "model": lambda record: record.model,
    **{
        name: lambda record, name=name: _short(record.full_protocol_s.get(name, 0.0) / 60)  # type: ignore[misc]
        for name in ("calibration", "tape", "fisher", "steps", "compile")
    },
    "all": lambda record: _short(record.full_protocol_min),
    "engine": lambda record: record.full_protocol_engine,
    "Fisher's share": lambda record: f"{100 * record.fisher_share:.0f} %",
    "published": lambda record: _short(record.published_min),
    "peak, MB": lambda record: "-" if record.peak_bytes is None else f"{record.peak_bytes / 1e6:.0f}",
    "peak / formula": lambda record: "-" if record.memory is None else _number(record.memory["ratio"]),
}


def goals(record: SpeedRecord) -> dict[str, str]:
    """The ratios that goals are set for, as far as they were measured, by what they are."""
    found: dict[str, str] = {}
    if "eager" in record.step_ms and len(record.step_ms) > 1:
        best = min((name for name in record.step_ms if name != "eager"), key=lambda name: record.step_ms[name])
        found[f"step: eager / {best}"] = _number(record.step_ms["eager"] / record.step_ms[best])
    if record.search is not None:
        images = f"{record.search['images']:.0f} images"
        found[f"weight search: direct / fast, {images}"] = _number(record.search["weights_speedup"], 1)
        found["weight search: rows with the same choice"] = f"{100 * record.search['same_rows']:.2f} %"
        found[f"calibration: direct / fast, {images}"] = _number(record.search["calibration_speedup"], 1)
    (few, few_s), (many, many_s) = record.calibration_s.items()
    found[f"calibration: {many} / {few} images"] = _number(many_s / few_s)
    if record.scaling is not None:
        found["24 / 12 blocks, full protocol"] = _number(record.scaling["depth_ratio_12_24"])
        shares = (100 * record.scaling[f"fisher_share_{depth}"] for depth in (12, 24))
        found["Fisher passes' share at 12 and 24 blocks"] = " and ".join(f"{share:.0f} %" for share in shares)
    if record.fisher_check is not None:
        found["Fisher pass: measured / sum of its parts"] = _number(record.fisher_check)
    if record.memory is not None:
        found[f"peak memory / formula, {record.memory['images']:.0f} images"] = _number(record.memory["ratio"])
    return found


def _grid(records: Sequence[SpeedRecord], columns: dict[str, Cell], form: str) -> str:
    rows = [[cell(record) for cell in columns.values()] for record in records]
    return str(tabulate(rows, list(columns), tablefmt=form, disable_numparse=True, stralign="right"))


def tables(records: Sequence[SpeedRecord], form: str = "github") -> str:
    """All tables, device by device.

    Args:
        records: of any devices and models.
        form: tabulate's name of the layout.
    """
    heading = "### {}" if form == "github" else "{}"
    parts = []
    for device in dict.fromkeys(record.device for record in records):
        mine = [record for record in records if record.device == device]
        dates = sorted({record.date for record in mine})
        torch = ", ".join(sorted({record.versions["torch"] for record in mine}))
        parts.append(heading.format(f"{device} ({' to '.join(dict.fromkeys((dates[0], dates[-1])))}, torch {torch})"))
        parts.append("Milliseconds of a step of the most frequent block, and its floors:")
        parts.append(_grid(mine, STEPS, form))
        parts.append("Minutes of the full protocol, extrapolated, by stage:")
        parts.append(_grid(mine, STAGES, form))
        parts.append("Ratios:")
        rows = [[record.model, name, value] for record in mine for name, value in goals(record).items()]
        parts.append(str(tabulate(rows, ["model", "ratio", "found"], tablefmt=form, disable_numparse=True)))
        parts += [f"{record.model}: {note}." for record in mine for note in record.notes]
    return "\n\n".join(parts)


def rewrite(records: Sequence[SpeedRecord], path: Path = README) -> None:
    """Put the tables between the markers of a Markdown file.

    Raises:
        CheckpointError: the file has no such markers.
    """
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise CheckpointError(f"{path} has no lines {BEGIN} and {END} to put the tables between.")
    with replaced_whole(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{tables(records)}\n\n{END}{after}", encoding="utf-8")
