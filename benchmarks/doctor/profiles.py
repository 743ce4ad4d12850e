"""Whether a profile can run: its data and weights, and what memory and disk it needs as far as that is known."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import Adapter, Cell, RunOptions
from benchmarks.doctor.findings import size_text
from benchmarks.doctor.packages import ROOT
from benchmarks.grid import GRIDS, Filters, expand, load_grid
from benchmarks.preflight import weights_place
from fimaq_core.errors import FimaqError
from tasks.common import registry
from tasks.common.record import ResultRecord
from tasks.common.request import Missing, describe_missing

REFERENCE = ROOT / "results" / "reference"


@dataclass(frozen=True)
class Section:
    """A section of a profile.

    Attributes:
        missing: messages on what is not there; empty where it can run.
        fixes: commands that fetch some of it.
        weights: by model ``here``, the hub's repository that has them, or ``missing``.
    """

    name: str
    models: tuple[str, ...]
    cells: int
    missing: tuple[str, ...] = ()
    fixes: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Need:
    """What one of a profile's models took where it was measured: ``memory`` and, a cell, ``disk`` in bytes (None: not known)."""

    model: str
    memory: float
    disk: float | None
    source: str

    @property
    def text(self) -> str:
        """For people."""
        disk = "" if self.disk is None else f", {size_text(self.disk)} of disk a cell"
        return f"{self.model} took {size_text(self.memory)} of memory{disk} ({self.source})"


@dataclass(frozen=True)
class Profile:
    """A profile. ``problem`` says why it cannot be read; ``notes`` are worth knowing before a run."""

    name: str
    sections: tuple[Section, ...] = ()
    needs: tuple[Need, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""

    @property
    def can_run(self) -> bool:
        """Whether all of it can."""
        return not self.problem and not any(section.missing for section in self.sections)


def names(asked: str) -> list[str]:
    """The profile asked for first, then all others that come along."""
    return list(dict.fromkeys([asked, *sorted(path.stem for path in GRIDS.glob("*.yaml"))]))


def examine(
    name: str, options: RunOptions, adapter: Adapter, records: Sequence[tuple[Path, ResultRecord]], cuda: bool,
    memory: float | None = None,
) -> Profile:  # fmt: skip
    """Examine a profile; whatever fails in that is a reason why it cannot run.

    Args:
        name: of the profile, or its file.
        options: results, data and weights.
        adapter: asked what is missing.
        records: measured before.
        cuda: whether PyTorch sees a GPU.
        memory: bytes that may be used.
    """
    try:
        grid = load_grid(name)
        cells = expand(grid, Filters(), options)
        sections = tuple(_section(label, [cell for cell in cells if cell.section == label], adapter) for label in grid.tasks)
        needs = tuple(_needs(cells, records))
        notes = []
        if grid.device == "auto" and not cuda:
            notes.append("no GPU is visible to PyTorch, and this profile takes very long without one")
        problem = f"its device is {grid.device}, and PyTorch sees no GPU" if grid.device.startswith("cuda") and not cuda else ""
        most = max(needs, key=lambda need: need.memory, default=None)
        if most is not None and memory is not None and not cuda and most.memory > memory:
            notes.append(f"{most.text}, and {size_text(memory)} may be used here")
        return Profile(name, sections, needs, tuple(notes), problem)
    except FimaqError as error:
        return Profile(name, problem=str(error))
    except Exception as error:  # noqa: BLE001 a broken package that a check needs is a finding
        return Profile(name, problem=f"it cannot be examined: {type(error).__name__}: {error}")


def _section(label: str, cells: Sequence[Cell], adapter: Adapter) -> Section:
    found: list[Missing] = []
    errors: dict[str, None] = {}
    weights: dict[str, str] = {}
    fixes: list[str] = []
    models = {cell.model: cell for cell in cells}
    for model, cell in models.items():
        try:
            lacking = adapter.preflight(cell.request)
        except FimaqError as error:
            errors.setdefault(str(error))
            continue
        found += lacking
        place = weights_place(cell)
        if any(item.what.startswith("the weights") for item in lacking):
            weights[model] = "missing"
            fixes += [place.command] if place.command else []
        else:
            weights[model] = place.repository or "here"
    messages = (*errors, *(describe_missing(found) or "").splitlines())
    return Section(label, tuple(models), len({cell.key for cell in cells}), messages, tuple(dict.fromkeys(fixes)), weights)


def _needs(cells: Sequence[Cell], records: Sequence[tuple[Path, ResultRecord]]) -> list[Need]:
    """Return memory and disk of each model: from records, else from committed measurements."""
    by_tag: dict[tuple[str, str], list[tuple[Path, ResultRecord]]] = {}
    for path, record in records:
        by_tag.setdefault((record.task, record.model), []).append((path, record))
    measured, found = _measured(), []
    for task, model, request in {(cell.task, cell.model): (cell.task, cell.model, cell.request.model) for cell in cells}.values():
        try:
            tag = registry.model_tag(task, request)
        except FimaqError:
            continue  # its weights are missing, which is said elsewhere
        own = [*by_tag.get((task, tag), ()), *(by_tag.get((task, model), ()) if tag != model else ())]
        if own:
            peak = max(record.peak_memory_bytes for _, record in own)
            disk = max(_folder_size(path.parent) for path, _ in own)
            devices = ", ".join(dict.fromkeys(record.environment.device for _, record in own))
            found.append(Need(model, peak, disk, f"{len(own)} records here, {devices}"))
        elif (known := measured.get(model) or measured.get(tag.partition(".")[0])) is not None:
            found.append(Need(model, known[0], None, known[1]))
    return found


def _folder_size(folder: Path) -> float:
    return float(sum(file.stat().st_size for file in folder.iterdir() if file.is_file()))


def _measured() -> dict[str, tuple[float, str]]:
    """Peak bytes and their source by name of model, from the committed measurements."""
    found: dict[str, tuple[float, str]] = {}
    for entry in _read(REFERENCE / "speed.json") or []:
        images = entry.get("memory", {}).get("images")
        words = f"a block, {images:g} images, {entry['device']}; results/reference/speed.json"
        found[entry["model"]] = (float(entry["peak_bytes"]), words)
    rehearsed = (_read(REFERENCE / "rehearsal.json") or {"cells": []})["cells"]
    for row in sorted(rehearsed, key=lambda row: float(row["peak_memory_bytes"])):
        words = f"estimated from a rehearsal on {row['device']}; results/reference/rehearsal.json"
        found[row["model"]] = (float(row["peak_memory_bytes"]), words)
    return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
