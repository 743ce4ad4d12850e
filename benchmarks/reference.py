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

from benchmarks.costs import REFERENCE, cost_row, costs_path, costs_text
from benchmarks.schema import Grid
from benchmarks.summary import pooled_sd
from benchmarks.tables import (
    FULL,
    Measured,
    csv_text,
    frame,
    is_percent,
    over_seeds,
    read_csv,
    sample_counts,
    unique,
    write_text,
)

#: Points. Below the first a difference is never worth a word; seeds spread by at least the second, however alike two of them
#: happen to be; full precision has no seeds, and other machines only flip near-ties.
SMALLEST, SPREAD_FLOOR, FP_TOLERANCE = 1.0, 0.3, 0.2


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
    name = ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


def write_reference(grid: Grid, measured: Sequence[Measured], text: str, folder: Path = REFERENCE) -> list[Path]:
    """Write the reference of a profile (CSV, Markdown, provenance as JSON, costs as CSV) and return the files."""
    origin = provenance(grid, measured)
    content = {"machine": origin.machine, "versions": origin.versions, "date": origin.date, "settings": origin.settings,
               "data": origin.data}  # fmt: skip
    title, _, body = text.partition("\n\n")
    files = {
        folder / f"{grid.name}.csv": csv_text(frame(measured)),
        folder / f"{grid.name}.md": f"{title}\n\nReference: {origin.line()}.\n\n{body}",
        folder / f"{grid.name}.json": json.dumps(content, indent=1) + "\n",
        costs_path(grid.name, folder): costs_text(cost_row(item.cell, item.record) for item in measured),
    }
    for path, words in files.items():
        write_text(path, words)
    return list(files)


def tolerances(reference: pd.DataFrame, mine: pd.DataFrame) -> pd.DataFrame:
    """Return the cells both tables have, with their difference and the tolerance for it.

    On another machine rounding errors differ, and thousands of optimisation steps turn them into what amounts to other
    seeds. So a difference of means may be as large as seeds allow: ``max(1.0, 3·s·√(1/k_ref + 1/k_mine))`` points, with
    ``s`` the reference's standard deviation over seeds, pooled over the models of one method, variant and bits (two seeds
    alone say little) and at least 0.3. The new table's own spread is left out on purpose: a broken installation must not widen
    its own tolerance. Full precision, without seeds, may differ by 0.2.
    Median ranks have the same rule in ranks, and may differ by one in full precision too.

    Args:
        reference, mine: tables of cells and metrics.
    """
    keys = ["task", "dataset", "model", "method", "variant", "bits", "metric"]
    alike = ["task", "dataset", "method", "variant", "bits", "metric"]
    ours, theirs = over_seeds(mine), over_seeds(reference)
    spread = {key: pooled_sd(rows) for key, rows in theirs.groupby(alike)}
    both = theirs.merge(ours, on=keys, suffixes=("_ref", "_mine"))
    limits = []
    for row in both.to_dict("records"):
        sd = spread[tuple(row[name] for name in alike)]
        sd = max(SPREAD_FLOOR, 0.0 if math.isnan(sd) else sd)
        noise = 3 * sd * math.sqrt(1 / row["k_ref"] + 1 / row["k_mine"])
        without_seeds = FP_TOLERANCE if is_percent(row["metric"]) else SMALLEST
        limits.append(without_seeds if row["method"] == "fp" else max(SMALLEST, noise))
    return both.assign(difference=both["mean_mine"] - both["mean_ref"], tolerance=limits)


def compare(grid: Grid, measured: Sequence[Measured], folder: Path = REFERENCE) -> list[str]:
    """Return what a reader should know of ``measured`` against the committed reference; empty without a reference."""
    table_path, origin_path = folder / f"{grid.name}.csv", folder / f"{grid.name}.json"
    if not table_path.is_file() or not origin_path.is_file():
        return []
    try:
        origin = Provenance(**json.loads(origin_path.read_text(encoding="utf-8")))
        reference = read_csv(table_path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return [f"The reference {table_path.name} cannot be read, so nothing is compared with it: {error}"]
    about = f"(reference: {origin.line()})"
    alike, lines = _alike(grid, measured, origin)
    both = tolerances(reference, frame(alike))
    if both.empty:
        return [f"{line} {about}" for line in lines or ["No cell of this run is in the reference."]]
    off = both[both["difference"].abs() > both["tolerance"]]
    largest = both.iloc[int(both["difference"].abs().to_numpy().argmax())]
    if off.empty:
        lines.append(
            f"Agrees with the reference in all {len(both)} cells: largest difference {largest['difference']:+.2f} "
            f"{'points' if is_percent(largest['metric']) else 'ranks'} at {_name(largest, grid)}, "
            f"tolerance {largest['tolerance']:.2f}. {about}"
        )
        return lines
    lines.append(f"WARNING: {len(off)} of {len(both)} cells differ from the reference by more than seeds spread {about}:")
    for _, row in off.iterrows():
        lines.append(
            f"  {_name(row, grid)}: {row['mean_mine']:.2f} here, {row['mean_ref']:.2f} in the reference "
            f"({row['difference']:+.2f}, tolerance {row['tolerance']:.2f})"
        )
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
