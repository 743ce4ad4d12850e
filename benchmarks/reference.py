"""The committed reference of a profile: what a sound installation should measure, and the comparison with it."""

import json
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import known_answers
from benchmarks.agreement import ALPHA, FIGURES, RATIOS, compared, observations
from benchmarks.costs import REFERENCE, cost_row, costs_path, costs_text
from benchmarks.orders import count
from benchmarks.schema import Grid
from benchmarks.tables import COLUMNS, FULL, Measured, is_percent, sample_counts, unique, write_text
from fimaq_core.errors import FimaqError
from tasks.common.machine import processor


@dataclass(frozen=True)
class Provenance:
    """Where, when and from what a reference was measured."""

    machine: str
    versions: dict[str, str]
    date: str
    settings: dict[str, Any]
    data: list[str]

    def line(self) -> str:
        """Return it in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"measured {self.date} on {self.machine}; {versions}"


def provenance(grid: Grid, measured: Sequence[Measured]) -> Provenance:
    """Describe the present measurements. No host names and no paths: they say nothing and do not belong in a repository."""
    versions: dict[str, set[str]] = {"python": {platform.python_version()}}
    for item in measured:
        for name, version in item.record.environment.versions.items():
            versions.setdefault(name, set()).add(version)
    return Provenance(
        machine=machine(),
        versions={name: " / ".join(sorted(found)) for name, found in sorted(versions.items())},
        date=max((item.record.finished[:10] for item in measured), default=datetime.now(UTC).date().isoformat()),
        settings=_settings(grid),
        data=_data(measured),
    )


def _settings(grid: Grid) -> dict[str, Any]:
    # What tasks set by themselves decides numbers as much as what the grid does.
    effective = {section: grid.overrides_of(section) for section in grid.tasks}
    apart = {
        section: {name: value for name, value in found.items() if name not in grid.overrides or value != grid.overrides[name]}
        for section, found in effective.items()
    }
    own = {section: found for section, found in apart.items() if found}
    named = {
        "variant": grid.variant,
        "overrides": grid.overrides,
        **({"sections": own} if own else {}),
        **({"axes": grid.axes} if grid.axes else {}),
    }
    settings: dict[str, Any] = json.loads(json.dumps(named))
    return settings


def _settings_of(settings: dict[str, Any], section: str) -> dict[str, Any]:
    """What of a grid's settings bears on a section."""
    overrides = {**settings.get("overrides", {}), **settings.get("sections", {}).get(section, {})}
    return {name: value for name, value in settings.items() if name != "sections"} | {"overrides": overrides}


def _data(measured: Sequence[Measured]) -> list[str]:
    sets = {item.record.dataset for item in measured}
    return sorted({f"{d.name}, {d.split}, {sample_counts(d.count, d.captions)}, {d.fingerprint[:16]}" for d in sets})


def machine() -> str:
    """Processor, cores and system of this machine."""
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()}"


def write_reference(grid: Grid, measured: Sequence[Measured], text: str, folder: Path = REFERENCE) -> list[Path]:
    """Write the reference of a profile (CSV, Markdown, provenance as JSON, costs as CSV) and return the files."""
    origin = provenance(grid, measured)
    content = {"machine": origin.machine, "versions": origin.versions, "date": origin.date, "settings": origin.settings,
               "data": origin.data}  # fmt: skip
    title, _, body = text.partition("\n\n")
    files = {
        folder / f"{grid.name}.csv": _csv(observations(measured)),
        folder / f"{grid.name}.md": f"{title}\n\nReference: {origin.line()}.\n\n{body}",
        folder / f"{grid.name}.json": json.dumps(content, indent=1) + "\n",
        costs_path(grid.name, folder): costs_text(cost_row(item.cell, item.record) for item in measured),
    }
    for path, words in files.items():
        write_text(path, words)
    return list(files)


def add_processor(grid: Grid, measured: Sequence[Measured], folder: Path = REFERENCE) -> Path:
    """Add cells measured on other processors to the reference's table, in place of these cells' former rows.

    Raises:
        FimaqError: there is no reference, or it has other settings or data.
    """
    path, origin_path = folder / f"{grid.name}.csv", folder / f"{grid.name}.json"
    if not path.is_file() or not origin_path.is_file():
        raise FimaqError(f"Profile '{grid.name}' has no reference yet: write it first, without --add.")
    origin = Provenance(**json.loads(origin_path.read_text(encoding="utf-8")))
    alike, lines = _alike(grid, measured, origin)
    if len(alike) < len(measured):
        raise FimaqError(" ".join(lines))
    kept, new = read_csv(path), observations(measured)
    same = [*COLUMNS[: COLUMNS.index("metric")], "processor"]
    cells = pd.MultiIndex.from_frame(new[same].fillna(-1))
    kept = kept[~pd.MultiIndex.from_frame(kept[same].fillna(-1)).isin(cells)]
    write_text(path, _csv(pd.concat([kept, new])))
    return path


def _csv(table: pd.DataFrame) -> str:
    return str(table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def read_csv(path: Path) -> pd.DataFrame:
    """Read the table of a reference; see :func:`benchmarks.agreement.observations`."""
    missing = {"seed": [""], "fp_value": [""]}
    return pd.read_csv(path, dtype={"seed": "Int64"}, keep_default_na=False, na_values=missing)


def compare(grid: Grid, measured: Sequence[Measured], folder: Path = REFERENCE) -> list[str]:
    """Say whether ``measured`` agrees with the committed reference; nothing without a reference.

    Args:
        grid: the profile.
        measured: finished cells.
        folder: holds the references.

    Returns:
        Lines. The first says ``Agrees with the reference`` or ``DIFFERS from the reference``.
    """
    table_path, origin_path = folder / f"{grid.name}.csv", folder / f"{grid.name}.json"
    if not table_path.is_file() or not origin_path.is_file():
        return []
    try:
        origin = Provenance(**json.loads(origin_path.read_text(encoding="utf-8")))
        reference = read_csv(table_path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return [f"The reference {table_path.name} cannot be read, so nothing is compared with it: {error}"]
    about = f"(reference: {origin.line()})"
    wrong = known_answers.wrong()
    if wrong:
        return ["DIFFERS from the reference: the code here gives wrong answers to problems whose answers are known.", *wrong]
    alike, lines = _alike(grid, measured, origin)
    both = compared(reference, observations(alike))
    if both.empty:
        return [f"{line} {about}" for line in lines or ["No cell of this run is in the reference."]]
    known = {tuple(row) for row in both[["dataset", "model", "method", "variant", "bits"]].itertuples(index=False)}
    mine = {(i.record.dataset.name, i.cell.model, i.cell.method, i.record.variant, i.cell.bits) for i in alike}
    if mine - known:
        lines.append(f"Not in the reference, so not compared: {count(len(mine - known), 'cell')}.")
    off = both[both["p"] < ALPHA]
    processors = count(reference["processor"].nunique(), "processor")
    basis = f"{count(len(both), 'comparison')}, family-wise error {ALPHA:.0%}, {processors} in the reference"
    if off.empty:
        score = both[~both["metric"].isin(FIGURES)]
        largest = score.iloc[int(score["difference"].abs().to_numpy().argmax())]
        lines.append(
            f"Agrees with the reference ({basis}). Largest difference of a score: {largest['difference']:+.2f} "
            f"{'points' if is_percent(largest['metric']) else 'ranks'} at {_name(largest, grid)}. {about}"
        )
        return lines
    lines.append(
        f"DIFFERS from the reference in {len(off)} of {basis}. Processors do not cause this: check the installation with "
        f"`make test`, and `git status` for changed code. {about}"
    )
    for row in off.sort_values("p").to_dict("records"):
        values = [math.exp(row[side]) if row["metric"] in RATIOS else row[side] for side in ("mean_mine", "mean_ref")]
        here, there = (f"{value:.4g}" if row["metric"] in FIGURES else f"{value:.2f}" for value in values)
        lines.append(f"  {_name(row, grid)}: {here} here, {there} in the reference (p = {row['p']:.1g})")
    return lines


def _alike(grid: Grid, measured: Sequence[Measured], origin: Provenance) -> tuple[list[Measured], list[str]]:
    """Return the cells of the sections with the reference's settings and data, and a line for each other section."""
    sections = unique(item.cell.section for item in measured)
    alike, lines = [], []
    for section in sections:
        mine = [item for item in measured if item.cell.section == section]
        name = f" in {section}" if len(grid.tasks) > 1 else ""
        theirs = _settings_of(origin.settings, section)
        if theirs != _settings_of(_settings(grid), section):
            lines.append(f"Not compared with the reference{name}: it has other settings, {theirs}.")
        elif not set(_data(mine)) <= set(origin.data):
            lines.append(f"Not compared with the reference{name}: it was measured on other data, {'; '.join(origin.data)}.")
        else:
            alike += mine
    return alike, lines


def _name(row: Any, grid: Grid) -> str:
    bits = "" if row["bits"] == FULL else f" {row['bits']}"
    scope = re.search(r" \[[^\]]*\]$", row["variant"])  # as variant_name writes it
    subject = f"{row['model']}{scope[0] if scope else ''}"
    variant = f" ({row['variant']})" if grid.axes and row["method"] != "fp" else ""
    dataset = f" on {row['dataset']}" if len(grid.tasks) > 1 else ""
    return f"{subject} {row['method']}{bits}{variant} {row['metric']}{dataset}"
