"""``python -m benchmarks published``: published tables with their data, weights and costs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import click
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.console import duration, size_text
from benchmarks.costs.sources import MEASURED, SOURCES, Cost, gather
from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.options import adapter, folder_options
from benchmarks.grid.preflight import fetch_weights, missing_data
from benchmarks.published.table import load_table, table_names
from benchmarks.run.options import RunRequest
from benchmarks.run.plan import make_plan
from tasks.common import registry
from tasks.common.request import Missing, describe_missing

#: Width of the listing in characters if the output is no terminal.
_WIDE = 200
_COLUMNS = (
    "table", "title", "cells", "done", "data here", "weights here", "GPU time", "CPU time",
    "memory", "disk", "known from",
)  # fmt: skip


@click.command()
@click.option("--table", default="", help="Only this table, with all its cells; or a .yaml file.")
@click.option("--device", help="Device of the cells, as in the command run.")
@folder_options
def published(table: str, device: str | None, options: RunOptions) -> None:
    """List the published tables that can be reproduced: cells, data, weights, time, memory, disk.

    Nothing is run, downloaded or changed.
    """
    console, options = Console(highlight=False), replace(options, device=device)
    tables = [load_table(name) for name in ([table] if table else table_names())]
    requests = [RunRequest(t.grid(), options=options, adapter=adapter(), table=t) for t in tables]
    cells = [request.cells() for request in requests]
    # Several tables may have the same cell.
    every = list({cell.key: cell for own in cells for cell in own}.values())
    if table:
        plan = make_plan(requests[0], console.width if console.is_terminal else None).text
        lines = [f"{tables[0].name}: {tables[0].title} ({tables[0].paper})", plan]
    else:
        costs, lines = gather(every, adapter(), [t.name for t in tables], options.results)
        listing = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name in _COLUMNS:
            listing.add_column(name, no_wrap=name not in ("title", "known from"), overflow="fold")
        for request, own in zip(requests, cells, strict=True):
            listing.add_row(*_row(request, own, [costs.of(cell) for cell in own]))
        if not console.is_terminal:
            console = Console(highlight=False, width=_WIDE)
        console.print(listing)
        lines += [
            "Times are of the cells that are not done, one after another. Memory is the maximum.",
            "make tables TABLE=NAME shows the cells, make reproduce-table TABLE=NAME runs them.",
        ]
    for line in (*lines, *_missing(requests, every)):
        console.print(line, markup=False, soft_wrap=True)


def _data(request: RunRequest, cells: Sequence[Cell]) -> dict[str, Missing | None]:
    """Return the missing part of each data set that cells need; None: nothing is missing."""
    found: dict[str, Missing | None] = {}
    for section, cell in {cell.section: cell for cell in cells}.items():
        place = request.grid.tasks[section].data.upper()
        found[place] = found.get(place) or missing_data(cell)
    return found


def _weights(cells: Sequence[Cell]) -> Mapping[str, str | None]:
    """Return the download command of the weights of each ``model.tag``; see `fetch_weights`."""
    models = {cell.model: cell for cell in cells}.values()
    return {registry.model_tag(c.task, c.request.model): fetch_weights(c) for c in models}


def _row(request: RunRequest, cells: Sequence[Cell], costs: Sequence[Cost | None]) -> list[str]:
    """Return the row of a table. Times, memory, disk and sources are of the cells to run."""
    table, weights = request.table, _weights(cells)
    assert table is not None
    todo = [cost for cost in costs if cost is None or cost.source != MEASURED]
    known = [cost for cost in todo if cost is not None]
    data = [f"{name}: {'no' if gap else 'yes'}" for name, gap in _data(request, cells).items()]
    here = f"{list(weights.values()).count(None)} of {len(weights)}"
    row = [table.name, table.title, str(len(cells)), str(len(cells) - len(todo))]
    row += [", ".join(data), here]
    for device in ("gpu", "cpu"):
        seconds = sum(cost.seconds for cost in known if cost.device == device)
        row.append(duration(seconds) if seconds else "-")
    memory = max((cost.memory or 0 for cost in known), default=0)
    for size in (memory, sum(cost.disk or 0 for cost in known)):
        row.append(size_text(size) if size else "-")
    counts = Counter("not known" if cost is None else cost.source for cost in todo)
    sources = [f"{counts[name]} {name}" for name in (*SOURCES, "not known") if counts[name]]
    return [*row, "; ".join(sources)]


def _missing(requests: Sequence[RunRequest], cells: Sequence[Cell]) -> Iterator[str]:
    """Yield lines about missing data and weights, with the commands that get them."""
    data = [item for request in requests for item in _data(request, request.cells()).values()]
    yield from (describe_missing(item for item in data if item) or "").splitlines()
    lines = [
        f"  {name}: {command or 'no hub has them, put the file into the WEIGHTS folder'}"
        for name, command in _weights(cells).items()
        if command is not None
    ]
    if lines:
        yield "Missing weights (the first run that needs them downloads weights of a hub):"
        yield from lines
