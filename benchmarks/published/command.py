"""``python -m benchmarks published``: published tables, what they need, what they will cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from benchmarks.console import duration, size_text
from benchmarks.costs.sources import REFERENCE, Cost, Costs, cost_row, origins, other_rows
from benchmarks.grid.cell import Adapter, Cell, Key, RunOptions, finished_record
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.options import adapter, folder, places, places_options, results_option
from benchmarks.grid.preflight import WeightsPlace, missing_data, weights_place
from benchmarks.published.table import PublishedTable, load_table, table_names
from tasks.common import registry
from tasks.common.request import Missing, describe_missing

#: Columns of a listing that is no terminal's.
_WIDE = 200


@click.command()
@click.option("--table", default="", help="Only this table, with all its cells; or a .yaml file.")
@click.option("--device", default="", help="As for run.")
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
def published(table: str, device: str, weights: str, results: Path, **texts: str) -> None:
    """List the published tables that can be reproduced: cells, data, weights, time, memory, disk.

    Nothing is run, downloaded or changed.
    """
    options = RunOptions(results, places(texts), folder(weights), device or None)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    for part in listing(table, options, adapter()):
        console.print(part, markup=False, soft_wrap=isinstance(part, str))


class _Entry(NamedTuple):
    """A table with its cells, what they need, and what they cost or will cost."""

    table: PublishedTable
    cells: Sequence[Cell]
    done: set[Key]
    costs: Mapping[Key, Cost | None]
    data: Mapping[str, Missing | None]
    weights: Mapping[str, WeightsPlace]


def listing(name: str, options: RunOptions, adapter: Adapter) -> list[RenderableType]:
    """Return the parts of the listing: all tables, or the cells of the one called ``name``.

    Raises:
        TableError: there is no such table.
    """
    tables = [load_table(each) for each in ([name] if name else table_names())]
    grids = [table.grid() for table in tables]
    cells = [expand(grid, Filters(), options) for grid in grids]
    # Tables share cells: each is looked for once.
    every = {cell.key: cell for each in cells for cell in each}
    found = ((cell, finished_record(cell, adapter)) for cell in every.values())
    finished = [(cell, cost_row(cell, record)) for cell, record in found if record is not None]
    done = {cell.key for cell, _ in finished}
    rows, notes = other_rows([grid.name for grid in grids], options.results, REFERENCE)
    costs = Costs(finished, rows, every.values())
    each = {key: costs.of(cell) for key, cell in every.items()}
    entries = []
    for table, grid, mine in zip(tables, grids, cells, strict=True):
        data: dict[str, Missing | None] = {}
        for section, cell in {cell.section: cell for cell in mine}.items():
            place = grid.tasks[section].data.upper()
            data[place] = data.get(place) or missing_data(cell)
        weights = {
            registry.model_tag(cell.task, cell.request.model): weights_place(cell)
            for cell in {cell.model: cell for cell in mine}.values()
        }
        entries.append(_Entry(table, mine, done, each, data, weights))
    shown = _one(entries[0]) if name else _all(entries)
    return [*shown, *_missing(entries, bool(name)), *notes]


def _all(entries: Sequence[_Entry]) -> list[RenderableType]:
    rows = []
    for entry in entries:
        here = sum(place.here for place in entry.weights.values())
        data = (f"{name}: {'no' if item else 'yes'}" for name, item in entry.data.items())
        row = {
            "table": entry.table.name,
            "what it is": entry.table.title,
            "cells": str(len(entry.cells)),
            "done": str(sum(cell.key in entry.done for cell in entry.cells)),
            "data here": ", ".join(data),
            "weights here": f"{here} of {len(entry.weights)}",
        }
        rows.append(row | _totals(entry))
    return [
        _table(rows),
        "Times are of the cells that are not done, one at a time; memory is the largest of a cell.",
        "make tables TABLE=NAME shows a table's cells, make reproduce-table TABLE=NAME runs them.",
    ]


def _one(entry: _Entry) -> list[RenderableType]:
    rows = []
    for cell in entry.cells:
        cost, done = entry.costs[cell.key], cell.key in entry.done
        row = {"model": cell.subject, "method": cell.method, "bits": cell.bits, "point": cell.point}
        row |= {"done": "yes" if done else "no", "time": "not known"}
        row |= {"memory": "", "disk": "", "known from": ""}
        if cost is not None:
            about = "" if done else "~"
            row["time"] = f"{about}{duration(cost.seconds)} {cost.device.upper()}"
            for name, size in (("memory", cost.memory), ("disk", cost.disk)):
                row[name] = "" if size is None else f"{about}{size_text(size)}"
            row["known from"] = cost.origin
        rows.append(row)
    totals = _totals(entry)
    origin = totals.pop("known from")
    shown = ", ".join(f"{name} {text}" for name, text in totals.items() if text) or "nothing known"
    return [
        f"{entry.table.name}: {entry.table.title} ({entry.table.paper})",
        _table(rows),
        *([f"To run: {shown} ({origin})."] if origin else []),
        *_protocol(entry.cells),
    ]


def _table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return a table of the columns that have something in them; sentences may wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    for name in names:
        table.add_column(name, no_wrap=name not in ("what it is", "known from"), overflow="fold")
    for row in rows:
        table.add_row(*(row[name] or "-" for name in names))
    return table


def _totals(entry: _Entry) -> dict[str, str]:
    """Return times by kind of device, memory, disk, and the origins, of what is to run."""
    costs = [entry.costs[cell.key] for cell in entry.cells if cell.key not in entry.done]
    known = [cost for cost in costs if cost is not None]
    found = {}
    for device in ("gpu", "cpu"):
        seconds = [cost.seconds for cost in known if cost.device == device]
        found[f"{device.upper()} time"] = duration(sum(seconds)) if seconds else ""
    memory = [(c.memory, c.memory_note or c.note) for c in known if c.memory is not None]
    disk = [cost.disk for cost in known if cost.disk is not None]
    most, machine = max(memory, default=(0, ""))
    found["memory"] = f"{size_text(most)} ({machine})" if memory else ""
    found["disk"] = size_text(sum(disk)) if disk else ""
    unknown = len(costs) - len(known)
    sources = [origins(known), f"{unknown} not known" if unknown else ""]
    return {**found, "known from": "; ".join(filter(None, sources))}


def _protocol(cells: Sequence[Cell]) -> list[str]:
    """Return the settings of each method, one line for methods that share them."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        recipe = cell.request.recipe
        if recipe is None:
            continue
        words = f"{recipe.calibration_images} calibration images "
        words += f"({recipe.calibration_transform} transform)"
        if recipe.reconstruct_mlp:
            words += f", {recipe.mlp_steps} steps of {recipe.mlp_batch} images per MLP"
        if recipe.reconstruct:
            words += f", {recipe.steps} steps of {recipe.batch_size} images per block"
        found.setdefault(f"{words}, seed {recipe.seed}", {})[cell.method] = None
    return [f"Protocol of {', '.join(methods)}: {words}." for words, methods in found.items()]


def _missing(entries: Sequence[_Entry], commands: bool) -> list[str]:
    """Return lines on data and weights that are not here, and how they are fetched."""
    data = {item.what: item for entry in entries for item in entry.data.values() if item}
    lines = (describe_missing(data.values()) or "").splitlines()
    places = {name: place for entry in entries for name, place in entry.weights.items()}
    weights = {name: place for name, place in places.items() if not place.here}
    lines += ["Missing weights:"] if weights else []
    for name, place in weights.items():
        where = place.command if commands else place.repository
        where = where or "no hub has them, put the file into the WEIGHTS folder"
        lines.append(f"  {name}: {where}")
    if any(place.repository for place in weights.values()):
        lines.append("Weights of the hub are fetched by the first run that needs them.")
    return lines
