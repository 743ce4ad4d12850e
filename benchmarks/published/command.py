"""``python -m benchmarks published``: published tables, what they need, what they will cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import click
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from benchmarks.console import duration, size_text
from benchmarks.costs.sources import MEASURED, Cost, gather, sources_text
from benchmarks.grid.cell import Adapter, Cell, Key, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.options import adapter, folder_options
from benchmarks.grid.preflight import WeightsPlace, missing_data, weights_place
from benchmarks.published.table import PublishedTable, load_table, table_names
from tasks.common import registry
from tasks.common.request import Missing, describe_missing

#: Width of the listing where the output is no terminal.
_WIDE = 200


@click.command()
@click.option("--table", default="", help="Only this table, with all its cells; or a .yaml file.")
@click.option("--device", help="As for run.")
@folder_options
def published(table: str, device: str | None, options: RunOptions) -> None:
    """List the published tables that can be reproduced: cells, data, weights, time, memory, disk.

    Nothing is run, downloaded or changed.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    for part in listing(table, replace(options, device=device), adapter()):
        console.print(part, markup=False, soft_wrap=isinstance(part, str))


@dataclass(frozen=True)
class _Entry:
    """A table with its cells, their costs, and the data and weights that they need."""

    table: PublishedTable
    cells: Sequence[Cell]
    costs: Mapping[Key, Cost | None]
    data: Mapping[str, Missing | None]
    weights: Mapping[str, WeightsPlace]

    def is_done(self, cell: Cell) -> bool:
        cost = self.costs[cell.key]
        return cost is not None and cost.source == MEASURED

    def totals(self) -> dict[str, str]:
        """Return times by kind of device, memory, disk and sources of the cells to run."""
        costs = [self.costs[cell.key] for cell in self.cells if not self.is_done(cell)]
        known = [cost for cost in costs if cost is not None]
        found = {}
        for device in ("gpu", "cpu"):
            seconds = [cost.seconds for cost in known if cost.device == device]
            found[f"{device.upper()} time"] = duration(sum(seconds)) if seconds else ""
        memory, disk = (
            max((c.memory or 0 for c in known), default=0),
            sum(c.disk or 0 for c in known),
        )
        found |= {"memory": memory and size_text(memory), "disk": disk and size_text(disk)}
        unknown = len(costs) - len(known)
        sources = [sources_text(known), f"{unknown} not known" if unknown else ""]
        return {**found, "known from": "; ".join(filter(None, sources))}


def listing(name: str, options: RunOptions, adapter: Adapter) -> list[RenderableType]:
    """Return the parts of the listing: all tables, or the cells of the table ``name``.

    Raises:
        TableError: there is no such table.
    """
    tables = [load_table(each) for each in ([name] if name else table_names())]
    grids = [table.grid() for table in tables]
    cells = [expand(grid, Filters(), options) for grid in grids]
    # Tables share cells.
    every = {cell.key: cell for own in cells for cell in own}
    names = [grid.name for grid in grids]
    costs, warnings = gather(list(every.values()), adapter, names, options.results)
    known = {key: costs.of(cell) for key, cell in every.items()}
    entries = []
    for table, grid, own in zip(tables, grids, cells, strict=True):
        data: dict[str, Missing | None] = {}
        for section, cell in {cell.section: cell for cell in own}.items():
            place = grid.tasks[section].data.upper()
            data[place] = data.get(place) or missing_data(cell)
        weights = {
            registry.model_tag(cell.task, cell.request.model): weights_place(cell)
            for cell in {cell.model: cell for cell in own}.values()
        }
        entries.append(_Entry(table, own, known, data, weights))
    shown = _one_table(entries[0]) if name else _all_tables(entries)
    return [*shown, *_missing(entries, commands=bool(name)), *warnings]


def _all_tables(entries: Sequence[_Entry]) -> list[RenderableType]:
    rows = []
    for entry in entries:
        here = sum(place.here for place in entry.weights.values())
        data = (f"{name}: {'no' if item else 'yes'}" for name, item in entry.data.items())
        row = {
            "table": entry.table.name,
            "title": entry.table.title,
            "cells": str(len(entry.cells)),
            "done": str(sum(map(entry.is_done, entry.cells))),
            "data here": ", ".join(data),
            "weights here": f"{here} of {len(entry.weights)}",
        }
        rows.append(row | entry.totals())
    return [
        _table(rows),
        "Times are of the cells that are not done, one at a time; memory is the largest of a cell.",
        "make tables TABLE=NAME shows a table's cells, make reproduce-table TABLE=NAME runs them.",
    ]


def _one_table(entry: _Entry) -> list[RenderableType]:
    rows = []
    for cell in entry.cells:
        cost, done = entry.costs[cell.key], entry.is_done(cell)
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
    totals = entry.totals()
    origin = totals.pop("known from")
    shown = ", ".join(f"{name} {text}" for name, text in totals.items() if text) or "nothing known"
    return [
        f"{entry.table.name}: {entry.table.title} ({entry.table.paper})",
        _table(rows),
        *([f"To run: {shown} ({origin})."] if origin else []),
        *_protocol(entry.cells),
    ]


def _table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return a table without empty columns; sentences may wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    for name in names:
        table.add_column(name, no_wrap=name not in ("title", "known from"), overflow="fold")
    for row in rows:
        table.add_row(*(row[name] or "-" for name in names))
    return table


def _protocol(cells: Sequence[Cell]) -> list[str]:
    """Return the settings of each method; methods with the same settings share a line."""
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
    """Return lines on missing data and weights, with ``commands`` that fetch weights."""
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
        lines.append("The first run that needs weights of the hub fetches them.")
    return lines
