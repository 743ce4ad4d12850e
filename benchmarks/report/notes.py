"""Words around the numbers: data, settings, expected orders, machines and versions, tables of axes."""

from collections.abc import Sequence

from benchmarks.cells import Cell
from benchmarks.report.groups import Group
from benchmarks.results.scores import Measured, sample_counts, scores, unique
from benchmarks.schema import Grid
from benchmarks.tables.ablation import axis_table
from benchmarks.tables.order import order_lines
from benchmarks.tables.settings import settings_lines
from fimaq_core.errors import FimaqError


def data_lines(measured: Sequence[Measured]) -> list[str]:
    """What the section was measured on: data set, split and number of samples."""
    return unique(
        f"{record.dataset.name}, split {record.dataset.split}, {sample_counts(record.n, record.dataset.captions)}"
        for record in (item.record for item in measured)
    )


def note_lines(own: Sequence[Group], metric: str, measured: Sequence[Measured]) -> list[str]:
    """Settings, the sampling error, and whether methods came out in the orders that are expected."""
    mine = [item for group in own for item in group.items]
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
        table = scores(items)
        lines += order_lines(table[table["metric"] == metric], items, mark)
    return lines


def facts(measured: Sequence[Measured]) -> list[tuple[str, list[str]]]:
    """What a reader asks first: data, machines, versions, revisions; each distinct value once."""
    records = [item.record for item in measured]
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for name, version in record.environment.versions.items():
            versions.setdefault(name, {})[version] = None
    return [
        ("Data", data_lines(measured)),
        ("Machines", unique(record.environment.device for record in records)),
        ("Versions", [f"{name} {' / '.join(found)}" for name, found in versions.items()]),
        ("Git revisions", unique(record.environment.git_revision[:19] for record in records)),
    ]


def axis_tables(
    grid: Grid, cells: Sequence[Cell], measured: Sequence[Measured], metric: str
) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table an axis and method: its title, its head, and its rows; none of a grid without axes."""
    tables = []
    for axis, points in grid.axes.items():
        here = [cell for cell in cells if any(place[0] == axis for place in cell.places)]
        for method in unique(cell.method for cell in here):
            table = axis_table(axis, list(points), metric, measured, [cell for cell in cells if cell.method == method])
            rows = [[str(point), *map(str, row)] for point, row in zip(table.index, table.to_numpy().tolist(), strict=True)]
            tables.append((f"{axis}: {method}", [axis, *map(str, table.columns)], rows))
    return tables
