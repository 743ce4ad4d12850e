"""Words around the numbers: data, settings, expected orders, machines, tables of axes."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.grid.cell import Cell
from benchmarks.grid.schema import Grid
from benchmarks.report.groups import Group
from benchmarks.results.scores import Measured, sample_counts, scores, unique
from benchmarks.tables.ablation import axis_table, methods_on
from benchmarks.tables.expected_orders import order_lines
from benchmarks.tables.settings import settings_lines
from benchmarks.tables.summary import sampling_line
from fimaq_core.errors import FimaqError


def data_lines(measured: Sequence[Measured]) -> list[str]:
    """Return data set, split and number of samples."""
    sets = ((item.record.dataset, item.record.n) for item in measured)
    return unique(f"{d.name}, split {d.split}, {sample_counts(n, d.captions)}" for d, n in sets)


def note_lines(groups: Sequence[Group], metric: str, measured: Sequence[Measured]) -> list[str]:
    """Return settings of ``groups``, the sampling error, and whether methods came out in order."""
    mine = [item for group in groups for item in group.items]
    try:
        lines = settings_lines(mine)
    except FimaqError as error:  # a recipe of another version
        lines = [str(error)]
    table = scores(measured)
    lines.append(sampling_line(table.loc[table["metric"] == metric, "stderr"]))
    for mark in unique(item.cell.mark for item in mine if item.cell.method != "fp"):
        items = [item for item in mine if item.cell.mark == mark]
        table = scores(items)
        lines += order_lines(table[table["metric"] == metric], items, mark)
    return lines


def facts(measured: Sequence[Measured]) -> dict[str, list[str]]:
    """Return what a reader asks first; each distinct value once."""
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


def axis_tables(
    grid: Grid, cells: Sequence[Cell], measured: Sequence[Measured], metric: str
) -> list[tuple[str, pd.DataFrame]]:
    """Return a title and a table per axis and method; none of a grid without axes."""
    tables = []
    for axis, points in grid.axes.items():
        for method in methods_on(axis, cells):
            mine = [cell for cell in cells if cell.method == method]
            table = axis_table(axis, list(points), metric, measured, mine)
            tables.append((f"{axis}: {method}", table))
    return tables
