"""Words around the numbers: data, settings, expected orders, machines and versions, tables of axes."""

from collections.abc import Sequence
from typing import Any

from benchmarks.ablation import axis_table
from benchmarks.cells import Cell
from benchmarks.orders import order_lines
from benchmarks.report.groups import Group
from benchmarks.results.scores import Measured, sample_counts, unique
from benchmarks.schema import Grid
from benchmarks.settings import settings_lines
from benchmarks.tables import frame
from fimaq_core.errors import FimaqError


def data_lines(measured: Sequence[Measured]) -> list[str]:
    """Return data set, split and number of samples."""
    return unique(
        f"{record.dataset.name}, split {record.dataset.split}, {sample_counts(record.n, record.dataset.captions)}"
        for record in (item.record for item in measured)
    )


def note_lines(groups: Sequence[Group], metric: str, measured: Sequence[Measured]) -> list[str]:
    """Return settings of ``groups``, the sampling error, and whether methods came out in the orders that are expected."""
    mine = [item for group in groups for item in group.items]
    try:
        lines = settings_lines(mine)
    except FimaqError as error:  # a recipe of another version
        lines = [str(error)]
    errors = [item.record.metrics[metric].stderr for item in measured if metric in item.record.metrics]
    lines.append(
        f"Standard error of one cell from its finite number of samples: {min(errors):.2f} to {max(errors):.2f} points. Methods "
        "are measured on the same samples, so their differences are surer than that."
    )
    for mark in unique(item.cell.mark for item in mine if item.cell.method != "fp"):
        items = [item for item in mine if item.cell.mark == mark]
        table = frame(items)
        lines += order_lines(table[table["metric"] == metric], items, mark)
    return lines


def facts(measured: Sequence[Measured]) -> dict[str, list[str]]:
    """Return what a reader asks first: data, machines, versions, revisions; each distinct value once."""
    machines = [item.record.environment for item in measured]
    versions: dict[str, dict[str, None]] = {}
    for name, version in (pair for machine in machines for pair in machine.versions.items()):
        versions.setdefault(name, {})[version] = None
    return {
        "Data": data_lines(measured),
        "Machines": unique(machine.device for machine in machines),
        "Versions": [f"{name} {' / '.join(found)}" for name, found in versions.items()],
        "Git revisions": unique(machine.git_revision[:19] for machine in machines),
    }


def axis_tables(grid: Grid, cells: Sequence[Cell], measured: Sequence[Measured], metric: str) -> list[tuple[str, Any]]:
    """Return a title and a table per axis and method; none of a grid without axes."""
    tables = []
    for axis, points in grid.axes.items():
        here = [cell for cell in cells if any(place[0] == axis for place in cell.places)]
        for method in unique(cell.method for cell in here):
            table = axis_table(axis, list(points), metric, measured, [cell for cell in cells if cell.method == method])
            tables.append((f"{axis}: {method}", table))
    return tables
