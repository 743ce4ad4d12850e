"""``python -m benchmarks published``: the published tables, what they need and what they will cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.cells import Adapter, Cell, Key, Places, RunOptions, finished_record
from benchmarks.options import adapter, folder, places_options, results_option

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from benchmarks.costs import Cost
    from benchmarks.preflight import WeightsPlace
    from benchmarks.published.table import PublishedTable
    from tasks.common.request import Missing

#: Columns of a listing that is no terminal's.
_WIDE = 200


@click.command()
@click.option("--table", default="", help="Only this table, with all its cells; or a .yaml file.")
@click.option("--device", default="", help="As for run.")
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
def published(
    table: str, device: str, imagenet: str, coco: str, flickr: str, weights: str, results: Path
) -> None:
    """List the published tables that can be reproduced: cells, data, weights, time, memory, disk.

    Nothing is run, downloaded or changed.
    """
    from rich.console import Console

    places = Places(folder(imagenet), folder(coco), folder(flickr))
    options = RunOptions(results, places, folder(weights), device or None)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    for part in listing(table, options, adapter()):
        console.print(part, markup=False, soft_wrap=isinstance(part, str))


@dataclass(frozen=True)
class _Entry:
    """A table with its cells, what it needs, and the costs of the cells that are not done."""

    table: PublishedTable
    cells: Sequence[Cell]
    done: set[Key]
    costs: Mapping[Key, Cost | None]
    data: Mapping[str, Missing | None]
    weights: Mapping[str, WeightsPlace]

    @property
    def known(self) -> list[Cost]:
        """Known costs of the cells that are not done."""
        costs = (self.costs[cell.key] for cell in self.cells if cell.key not in self.done)
        return [cost for cost in costs if cost is not None]


def listing(name: str, options: RunOptions, adapter: Adapter) -> list[RenderableType]:
    """Return the parts of the listing: all tables, or the cells of one.

    Args:
        name: of the only table; empty for all.
        options: results, data, weights and device.
        adapter: knows the folders of finished cells.

    Raises:
        TableError: there is no such table.
    """
    from benchmarks.published.table import load_table, table_names

    tables = [load_table(each) for each in ([name] if name else table_names())]
    entries, notes = _entries(tables, options, adapter)
    shown = _one(entries[0]) if name else _all(entries)
    return [*shown, *_missing(entries, bool(name)), *notes]


def _entries(
    tables: Sequence[PublishedTable], options: RunOptions, adapter: Adapter
) -> tuple[list[_Entry], list[str]]:
    from benchmarks.costs import Costs, cost_row, other_rows
    from benchmarks.grid import Filters, expand
    from benchmarks.preflight import missing_data, weights_place

    grids = [table.grid() for table in tables]
    cells = [expand(grid, Filters(), options) for grid in grids]
    # Tables share cells: each is looked for once.
    every = {cell.key: cell for each in cells for cell in each}
    found = ((cell, finished_record(cell, adapter)) for cell in every.values())
    finished = [(cell, cost_row(cell, record)) for cell, record in found if record is not None]
    done = {cell.key for cell, _ in finished}
    rows, notes = other_rows([grid.name for grid in grids], options.results)
    costs = Costs(finished, rows, every.values())
    each = {key: costs.of(cell) for key, cell in every.items()}
    entries = []
    for table, grid, mine in zip(tables, grids, cells, strict=True):
        sections = {cell.section: cell for cell in mine}
        data = {
            grid.tasks[section].data.upper(): missing_data(cell)
            for section, cell in sections.items()
            if grid.tasks[section].data != "own"
        }
        models = {cell.model: cell for cell in mine}
        weights = {_weights(cell): weights_place(cell) for cell in models.values()}
        entries.append(_Entry(table, mine, done, each, data, weights))
    return entries, notes


def _weights(cell: Cell) -> str:
    from tasks.common import registry

    return registry.model_tag(cell.task, cell.request.model)


def _all(entries: Sequence[_Entry]) -> list[RenderableType]:
    names = ("table", "what it is", "cells", "done", "data", "weights", "time", "known from", "memory", "disk")
    table = _table(names)
    for entry in entries:
        here = sum(place.here for place in entry.weights.values())
        table.add_row(
            entry.table.name, entry.table.title, str(len(entry.cells)),
            str(sum(cell.key in entry.done for cell in entry.cells)), _data(entry),
            f"{here} of {len(entry.weights)}", *_totals(entry),
        )  # fmt: skip
    return [
        table,
        "Time is of the cells that are not done, one after the other. Memory is the largest of a cell.",
        "make tables TABLE=NAME shows the cells of a table, make reproduce-table TABLE=NAME runs them.",
    ]


def _one(entry: _Entry) -> list[RenderableType]:
    from benchmarks.doctor.findings import size_text
    from benchmarks.estimate import duration

    table = _table(("model", "method", "bits", "point", "done", "time", "memory", "disk", "known from"))
    for cell in entry.cells:
        cost = entry.costs[cell.key]
        about = "" if cell.key in entry.done else "~"
        sizes = (None, None) if cost is None else (cost.memory, cost.disk)
        table.add_row(
            cell.subject, cell.method, cell.bits, cell.point or "-",
            "yes" if cell.key in entry.done else "no",
            "not known" if cost is None else f"{about}{duration(cost.seconds)} {cost.device.upper()}",
            *("-" if size is None else f"{about}{size_text(size)}" for size in sizes),
            "-" if cost is None else cost.origin,
        )  # fmt: skip
    time, sources, memory, disk = _totals(entry)
    return [
        f"{entry.table.name}: {entry.table.title} ({entry.table.paper})", table,
        f"To run: {time} ({sources}); largest memory of a cell {memory}; disk {disk}. Data: {_data(entry)}.",
        *_protocol(entry.cells),
    ]  # fmt: skip


def _table(names: Iterable[str]) -> Table:
    from rich import box
    from rich.table import Table

    return Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)


def _data(entry: _Entry) -> str:
    given = {True: "here", False: "not here"}
    return ", ".join(f"{name} {given[lacking is None]}" for name, lacking in entry.data.items())


def _totals(entry: _Entry) -> tuple[str, str, str, str]:
    """Return time, its sources, memory and disk of what is to run, for people."""
    from benchmarks.costs import origins
    from benchmarks.doctor.findings import size_text
    from benchmarks.estimate import duration

    known = entry.known
    unknown = sum(cell.key not in entry.done for cell in entry.cells) - len(known)
    seconds = {
        device: sum(cost.seconds for cost in known if cost.device == device) for device in ("gpu", "cpu")
    }
    times = [f"{device.upper()} {duration(time)}" for device, time in seconds.items() if time]
    sources = [*([origins(known)] if known else []), *([f"{unknown} not known"] if unknown else [])]
    memory = max(
        ((cost.memory, cost.note) for cost in known if cost.memory is not None), default=None
    )
    disk = [cost.disk for cost in known if cost.disk is not None]
    return (
        " + ".join(times) or "-",
        "; ".join(sources) or "-",
        "-" if memory is None else f"{size_text(memory[0])} ({memory[1]})",
        size_text(sum(disk)) if disk else "-",
    )


def _protocol(cells: Sequence[Cell]) -> list[str]:
    """Return the settings of each method, one line for methods that share them."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        recipe = cell.request.recipe
        if recipe is None:
            continue
        words = f"{recipe.calibration_images} calibration images ({recipe.calibration_transform} transform)"
        if recipe.reconstruct_mlp:
            words += f", {recipe.mlp_steps} steps of {recipe.mlp_batch} images per MLP"
        if recipe.reconstruct:
            words += f", {recipe.steps} steps of {recipe.batch_size} images per block"
        found.setdefault(f"{words}, seed {recipe.seed}", {})[cell.method] = None
    return [f"Protocol of {', '.join(methods)}: {words}." for words, methods in found.items()]


def _missing(entries: Sequence[_Entry], commands: bool) -> list[str]:
    """Return lines on data and weights that are not here, and how they are fetched."""
    from tasks.common.request import describe_missing

    data = {item.what: item for entry in entries for item in entry.data.values() if item}
    lines = (describe_missing(data.values()) or "").splitlines()
    weights = {
        name: place
        for entry in entries
        for name, place in entry.weights.items()
        if not place.here
    }
    lines += ["Missing weights:"] if weights else []
    for name, place in weights.items():
        where = place.command if commands else place.repository
        lines.append(f"  {name}: {where or 'no hub has them, put the file into the WEIGHTS folder'}")
    if any(place.repository for place in weights.values()):
        lines.append("Weights of the hub are fetched by the first run that needs them.")
    return lines
