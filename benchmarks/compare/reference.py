"""Reference of a profile: committed results of intact installations, for comparison."""

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.compare.agreement import ALPHA, FIGURES, RATIOS, compared, observations
from benchmarks.console import csv_cell, csv_value
from benchmarks.costs.sources import REFERENCE, cost_row, costs_path, costs_text
from benchmarks.grid.cell import EXPORT
from benchmarks.grid.schema import Grid
from benchmarks.results import scores
from benchmarks.results.scores import COLUMNS, FULL, Items, Measured, count
from fimaq_core.documents import parse_json, read_json
from fimaq_core.errors import FimaqError
from tasks.common.cell.machine import processor

#: Keys of the provenance of a reference.
_ABOUT = {"machine", "versions", "date", "settings", "data"}


def facts_of(grid: Grid, measured: Items) -> dict[str, Any]:
    """Return machine (without host name), versions, date, settings and data of measurements."""
    versions: dict[str, set[str]] = {"python": {platform.python_version()}}
    for item in measured:
        for name, version in item.record.environment.versions.items():
            versions.setdefault(name, set()).add(version)
    dates = [item.record.finished[:10] for item in measured]
    return {
        "machine": machine(),
        "versions": {name: " / ".join(sorted(found)) for name, found in sorted(versions.items())},
        "date": max(dates, default=datetime.now(UTC).date().isoformat()),
        "settings": _settings(grid),
        "data": _data(measured),
        "weights": _weights(measured),
        "calibration": _calibration(measured),
    }


def _line(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"measured {about['date']} on {about['machine']}; {versions}"


def _settings(grid: Grid) -> dict[str, Any]:
    """Return the settings of a grid and of its sections, in the types of JSON."""
    common, sections = grid.overrides.items(), {}
    for section in grid.tasks:
        own = {k: v for k, v in grid.overrides_of(section).items() if (k, v) not in common}
        if own:
            sections[section] = own
    found = {"variant": grid.variant, "overrides": grid.overrides}
    found |= {k: v for k, v in (("sections", sections), ("axes", grid.axes)) if v}
    return dict(parse_json(json.dumps(found), "The settings", FimaqError))


def _settings_of(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return the settings of one section, from those of :func:`_settings`."""
    rest = {name: value for name, value in settings.items() if name != "sections"}
    own = settings.get("sections", {}).get(section, {})
    return rest | {"overrides": {**settings.get("overrides", {}), **own}}


def _data(measured: Items) -> list[str]:
    sets = {item.record.dataset for item in measured}
    return sorted({
        f"{d.name}, {d.split}, {scores.sample_counts(d.count, d.captions)}, {d.fingerprint[:16]}"
        for d in sets
    })  # fmt: skip


def _weights(measured: Items) -> list[str]:
    files = [item.record.weights for item in measured]
    return sorted({f"{weights.tag}, {weights.sha256[:16]}" for weights in files})


def _calibration(measured: Items) -> list[str]:
    """Return the parts that calibrated the cells; a list of images is not one of them."""
    found = (item.record.calibration for item in measured)
    return sorted({
        f"{own.dataset}, {own.split}{', listed' if own.listed else ''}"
        for own in found
        if own is not None and own.split is not None
    })  # fmt: skip


def machine() -> str:
    """Return processor, cores and system of this machine."""
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()}"


def write_reference(grid: Grid, measured: Items, text: str, folder: Path = REFERENCE) -> list[Path]:
    """Write the reference of a profile (CSV, Markdown, provenance, costs); return its files."""
    about = facts_of(grid, measured)
    title, _, body = text.partition("\n\n")
    files = {
        folder / f"{grid.name}.csv": _csv(observations(measured)),
        folder / f"{grid.name}.md": f"{title}\n\nReference: {_line(about)}.\n\n{body}",
        folder / f"{grid.name}.json": json.dumps(about, indent=1) + "\n",
        costs_path(grid.name, folder): costs_text(cost_row(it.cell, it.record) for it in measured),
    }
    for path, words in files.items():
        scores.write_text(path, words)
    return list(files)


def add_processor(grid: Grid, measured: Items, folder: Path = REFERENCE) -> Path:
    """Add the cells of another processor to the table of a reference; replace their old rows.

    Raises FimaqError if there is no reference, or if it has other settings or data.
    """
    found = _read(grid, folder)
    if found is None:
        missing = f"Profile '{grid.name}' has no reference yet"
        raise FimaqError(f"{missing}: write it first, without --add.")
    kept, about = found
    alike, lines = _alike(grid, measured, about)
    if len(alike) < len(measured):
        raise FimaqError(" ".join(lines))
    new, path = observations(measured), folder / f"{grid.name}.csv"
    same = [*COLUMNS[: COLUMNS.index("metric")], "processor"]
    old, own = (pd.MultiIndex.from_frame(table[same].fillna(-1)) for table in (kept, new))
    scores.write_text(path, _csv(pd.concat([kept[~old.isin(own)], new])))
    return path


def _csv(table: pd.DataFrame) -> str:
    columns = table[[*COLUMNS, "processor"]]
    return str(columns.map(csv_cell).to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def read_csv(path: Path) -> pd.DataFrame:
    """Read a table of scores or of a reference, with the column ``bits``."""
    missing = {"seed": [""], "fp_value": [""]}
    table = pd.read_csv(path, dtype={"seed": "Int64"}, keep_default_na=False, na_values=missing)
    return scores.with_bits(table.map(csv_value))


def _read(grid: Grid, folder: Path) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """Return table and provenance of a reference, if any. Raises FimaqError if damaged."""
    path, about = folder / f"{grid.name}.csv", folder / f"{grid.name}.json"
    if not path.is_file() or not about.is_file():
        return None
    try:
        content = read_json(about, FimaqError, "provenance")
        if missing := sorted(_ABOUT - content.keys()):
            raise ValueError(f"{about.name} lacks {', '.join(missing)}")
        return read_csv(path), content
    except (FimaqError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FimaqError(f"The reference {path.name} cannot be read: {error}") from error


def compare(grid: Grid, measured: Items, folder: Path = REFERENCE) -> list[str]:
    """Compare finished cells with the committed reference of their profile.

    Returns the lines to print. The result begins with ``Agrees with the reference`` or ``DIFFERS
    from the reference``. Without a reference there are no lines.
    """
    try:
        found = _read(grid, folder)
    except FimaqError as error:
        return [f"{error}. No result is compared with the reference."]
    if found is None:
        return []
    from benchmarks.compare import known_answers  # imports PyTorch: memory and time

    reference, about = found
    if wrong := known_answers.wrong():
        why = "the code gives wrong answers to problems with known answers"
        return [f"DIFFERS from the reference: {why}.", *wrong]
    where = f"(reference: {_line(about)})"
    alike, lines = _alike(grid, measured, about)
    own = observations(alike)
    both = compared(reference, own)
    if both.empty:
        return [f"{line} {where}" for line in lines or ["No cell of this run is in the reference."]]
    cell = ["dataset", "model", "method", "variant", "bits"]
    known, mine = (set(map(tuple, table[cell].to_numpy())) for table in (both, own))
    if mine - known:
        lines.append(f"Not in the reference, so not compared: {count(len(mine - known), 'cell')}.")
    off = both[both["p"] < ALPHA]
    basis = f"{count(len(both), 'comparison')}, family-wise error {ALPHA:.0%}, "
    basis += f"{count(reference['processor'].nunique(), 'processor')} in the reference"
    if off.empty:
        score = both[~both["metric"].isin(FIGURES)]
        largest = score.iloc[int(score["difference"].abs().to_numpy().argmax())]
        unit = "points" if scores.is_percent(largest["metric"]) else "ranks"
        gap = f"{largest['difference']:+.2f} {unit} at {_name(largest, grid)}"
        result = f"Agrees with the reference ({basis}). Largest difference of a score: {gap}."
        return [*lines, f"{result} {where}"]
    lines.append(
        f"DIFFERS from the reference in {len(off)} of {basis}. Another processor does not cause "
        "this: run `make test` to check the installation, and `git status` to find changed code. "
        f"{where}"
    )
    for row in off.sort_values("p").to_dict("records"):
        values = [row["mean_mine"], row["mean_ref"]]
        values = [math.exp(value) if row["metric"] in RATIOS else value for value in values]
        digits = ".4g" if row["metric"] in FIGURES else ".2f"
        here, there = (f"{value:{digits}}" for value in values)
        text = f"{_name(row, grid)}: {here} here, {there} in the reference (p = {row['p']:.1g})"
        lines.append(f"  {text}")
    return lines


def _alike(
    grid: Grid, measured: Items, about: Mapping[str, Any]
) -> tuple[list[Measured], list[str]]:
    """Return the cells with the reference's settings and data, and one line per other section."""
    alike, lines = [], []
    for section in scores.unique(item.cell.section for item in measured):
        mine = [item for item in measured if item.cell.section == section]
        where = f" in {section}" if len(grid.tasks) > 1 else ""
        start = f"Not compared with the reference{where}: it"
        theirs = _settings_of(about["settings"], section)
        if theirs != _settings_of(_settings(grid), section):
            lines.append(f"{start} has other settings, {theirs}.")
        elif other := [
            f"{what} {'; '.join(about[name])}"
            for name, what, own in (
                ("data", "was measured on other data,", _data(mine)),
                ("weights", "has other weights,", _weights(mine)),
                ("calibration", "was calibrated on other data,", _calibration(mine)),
            )
            if not set(own) <= set(about.get(name, own))
        ]:
            lines.append(f"{start} {' and '.join(other)}.")
        else:
            alike += mine
    return alike, lines


def _name(row: Any, grid: Grid) -> str:
    """Return the name of a comparison; data set and variant only if the grid has several.

    The variant of an export is always named.
    """
    bits = "" if row["bits"] == FULL else f" {row['bits']}"
    scope = re.search(r" \[[^\]]*\]$", row["variant"])  # as variant_name writes it
    subject = f"{row['model']}{scope[0] if scope else ''}"
    exported = re.fullmatch(EXPORT + r"( \[.*\])?", row["variant"])
    several = exported or (grid.axes and row["method"] != "fp")
    variant = f" ({row['variant']})" if several else ""
    dataset = f" on {row['dataset']}" if len(grid.tasks) > 1 else ""
    return f"{subject} {row['method']}{bits}{variant} {row['metric']}{dataset}"
