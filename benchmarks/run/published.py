"""``python -m benchmarks published``: published tables, what they need, what they will cost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import click
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.console import duration, size_text
from benchmarks.costs.sources import MEASURED, Cost, Costs, gather, sources_text
from benchmarks.grid.cell import Cell, RunOptions
from benchmarks.grid.expand import Filters, expand
from benchmarks.grid.options import adapter, folder_options
from benchmarks.grid.preflight import fetch_weights, missing_data
from benchmarks.published.table import PublishedTable, load_table, table_names
from benchmarks.run.options import RunRequest
from benchmarks.run.plan import plan_text
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
    options = replace(options, device=device)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    if table:
        found = load_table(table)
        grid = found.grid()
        needs = [Needs.of(found, expand(grid, Filters(), options))]
        request = RunRequest(grid, options=options, adapter=adapter(), table=found)
        plan = plan_text(request, console.width if console.is_terminal else None)
        lines = [f"{found.name}: {found.title} ({found.paper})", plan]
    else:
        needs = [
            Needs.of(found, expand(found.grid(), Filters(), options))
            for found in map(load_table, table_names())
        ]
        # Tables share cells.
        every = list({cell.key: cell for each in needs for cell in each.cells}.values())
        names = [each.table.name for each in needs]
        costs, warnings = gather(every, adapter(), names, options.results)
        console.print(_listing(needs, costs))
        lines = [
            "Times are of the cells that are not done, one at a time; memory is the largest.",
            "make tables TABLE=NAME shows the cells, make reproduce-table TABLE=NAME runs them.",
            *warnings,
        ]
    for line in (*lines, *_missing(needs)):
        console.print(line, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Needs:
    """Cells of a published table, and the data and weights that they need."""

    table: PublishedTable
    cells: Sequence[Cell]
    data: Mapping[str, Missing | None]  #: by name; None: the data are here
    weights: Mapping[str, str | None]  #: see `fetch_weights`, by ``model.tag``

    @classmethod
    def of(cls, table: PublishedTable, cells: Sequence[Cell]) -> "Needs":
        """Look for the data and weights of ``cells``; the network is not asked."""
        data: dict[str, Missing | None] = {}
        for section, cell in {cell.section: cell for cell in cells}.items():
            place = table.base.tasks[section].data.upper()
            data[place] = data.get(place) or missing_data(cell)
        weights = {
            registry.model_tag(cell.task, cell.request.model): fetch_weights(cell)
            for cell in {cell.model: cell for cell in cells}.values()
        }
        return cls(table, cells, data, weights)


def _listing(needs: Sequence[Needs], costs: Costs) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in (
        "table", "title", "cells", "done", "data here", "weights here", "GPU time", "CPU time",
        "memory", "disk", "known from",
    ):  # fmt: skip
        table.add_column(name, no_wrap=name not in ("title", "known from"), overflow="fold")
    for each in needs:
        found = [costs.of(cell) for cell in each.cells]
        todo = [cost for cost in found if cost is None or cost.source != MEASURED]
        table.add_row(
            each.table.name,
            each.table.title,
            str(len(found)),
            str(len(found) - len(todo)),
            ", ".join(f"{name}: {'no' if item else 'yes'}" for name, item in each.data.items()),
            f"{list(each.weights.values()).count(None)} of {len(each.weights)}",
            *_totals([cost for cost in todo if cost is not None], todo.count(None)),
        )
    return table


def _totals(costs: Sequence[Cost], unknown: int) -> Iterator[str]:
    """Yield GPU time, CPU time, memory, disk and sources of the cells to run."""
    for device in ("gpu", "cpu"):
        seconds = sum(cost.seconds for cost in costs if cost.device == device)
        yield duration(seconds) if seconds else "-"
    memory = max((cost.memory or 0 for cost in costs), default=0)
    for size in (memory, sum(cost.disk or 0 for cost in costs)):
        yield size_text(size) if size else "-"
    sources = [sources_text(costs), f"{unknown} not known" if unknown else ""]
    yield "; ".join(filter(None, sources))


def _missing(needs: Sequence[Needs]) -> Iterator[str]:
    """Yield lines on missing data and weights, and how to get them."""
    data = {item.what: item for each in needs for item in each.data.values() if item}
    yield from (describe_missing(data.values()) or "").splitlines()
    weights = {name: text for each in needs for name, text in each.weights.items()}
    lines = [
        f"  {name}: {command or 'no hub has them, put the file into the WEIGHTS folder'}"
        for name, command in weights.items()
        if command is not None
    ]
    if lines:
        yield "Missing weights (the first run that needs weights of a hub fetches them):"
        yield from lines
