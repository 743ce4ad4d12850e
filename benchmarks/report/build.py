"""From records to the page: gathers, computes every part, renders and writes."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.cells import Adapter, RunOptions
from benchmarks.published.layout import Layout
from benchmarks.published.table import PublishedTable
from benchmarks.report import scores
from benchmarks.report.blocks import error_figures, fisher_figures, without_blocks
from benchmarks.report.charts.shapes import Style, styles
from benchmarks.report.cost import cost_figures, memory_figures, stage_colours, time_figures
from benchmarks.report.examples.boards import Told, make_boards, read_all
from benchmarks.report.examples.pictures import Fetch, fetch, make_pictures
from benchmarks.report.gather import Gathered, gather
from benchmarks.report.groups import Group, main_metric, make_groups, rows_of
from benchmarks.report.model import Page, Section
from benchmarks.report.modules import module_maps
from benchmarks.report.notes import axis_tables, data_lines, facts, note_lines
from benchmarks.report.provenance import origin
from benchmarks.report.published import published, published_table
from benchmarks.report.views import Picture
from benchmarks.results import reference
from benchmarks.schema import Grid
from benchmarks.tables import is_percent, unique, write_text
from fimaq_core.errors import FimaqError


def write_report(
    grid: Grid,
    options: RunOptions,
    adapter: Adapter,
    path: Path,
    get: Fetch = fetch,
    table: PublishedTable | None = None,
) -> Page:
    """Write the report of what ``grid`` measured to ``path`` and return its content.

    Args:
        grid: the profile.
        options: where results and data are.
        adapter: of the tasks.
        path: of the HTML file.
        get: fetches the pictures of samples.
        table: the published table that the grid is of.

    Raises:
        FimaqError: nothing is measured, or the file cannot be written.
    """
    from benchmarks.report.page import render

    gathered = gather(grid, options, adapter)
    if not gathered.measured:
        kind = "profile" if table is None else "table"
        unread = f" {len(gathered.problems)} files could not be read: {gathered.problems[0].message}" if gathered.problems else ""
        raise FimaqError(
            f"Nothing of {kind} '{grid.name}' is measured under {options.results / 'runs'}: "
            f"run `make reproduce-table {kind.upper()}={grid.name}` first.{unread}"
        )
    page = make_page(gathered, get, table)
    # A record may hold half of a surrogate pair, which no file can.
    write_text(path, render(page).encode("utf-8", "replace").decode("utf-8"))
    return page


def make_page(gathered: Gathered, get: Fetch, table: PublishedTable | None = None) -> Page:
    """Compute everything the page shows."""
    grid, measured = gathered.grid, gathered.measured
    looks = styles([name for name in rows_of(gathered.cells) if name != "fp"])
    looks["fp"] = Style(0, "circle")
    names = unique(item.cell.section for item in measured)
    groups: dict[str, list[Group]] = {}
    for name in names:
        start = 1 + sum(map(len, groups.values()))
        groups[name] = make_groups([item for item in measured if item.cell.section == name], start)
    told = {name: read_all(found, gathered) for name, found in groups.items()}
    pictures = make_pictures([one for found in told.values() for one in found.values()], get, gathered)
    stages = stage_colours([group for found in groups.values() for group in found])
    sections = [
        make_section(gathered, name, groups[name], told[name], pictures, looks, stages, index) for index, name in enumerate(names)
    ]
    done = {item.cell.key for item in measured}
    planned = len(gathered.cells)
    dates = sorted(item.record.finished for item in measured)
    return Page(
        title=f"{'Profile' if table is None else 'Table'} {grid.name}",
        profile=grid.name,
        description=grid.description,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        measured_from=dates[0][:10],
        measured_to=dates[-1][:10],
        planned=planned,
        done=len(done),
        failed=len(gathered.failed),
        missing=planned - len(done) - len(gathered.failed),
        beyond=gathered.beyond,
        foreign=gathered.foreign,
        facts=facts(measured),
        sections=sections,
        empty=[name for name in grid.tasks if name not in names],
        published=published(measured),
        table=None if table is None else published_table(Layout(table, measured)),
        pictures=list(pictures.values()),
        failures=gathered.failed,
        problems=gathered.problems,
        filters={
            "task": names,
            "model": unique(group.cell.subject for found in groups.values() for group in found if group.cell.method != "fp")
            or unique(group.cell.model for found in groups.values() for group in found),
            "bits": unique(group.cell.bits for found in groups.values() for group in found if group.cell.bits != "fp"),
            "method": rows_of([item.cell for item in measured]),
        },
        looks={name: "fp" if name == "fp" else f"{look.css} {look.shape}" for name, look in looks.items()},
        reference=reference.compare(grid, measured),
        stages=stages,
    )


def make_section(
    gathered: Gathered,
    name: str,
    groups: Sequence[Group],
    told: Mapping[str, Told],
    pictures: Mapping[tuple[str, str], Picture],
    looks: Mapping[str, Style],
    stages: Mapping[str, int],
    index: int,
) -> Section:
    """Compute everything about a section of the grid.

    Args:
        gathered: what was read.
        name: the section's label.
        groups: its measured cells.
        told: its examples.
        pictures: of all sections.
        looks: of methods.
        stages: colours of kinds of stages.
        index: of the section, for ids.
    """
    cells = [cell for cell in gathered.cells if cell.section == name]
    mine = [item for group in groups for item in group.items]
    task = cells[0].task
    metric = main_metric(task, mine)
    # Charts are about the grid's own settings; axis points have their rows in tables, and tables of their own.
    own = [group for group in groups if not group.cell.point]
    own_cells = [cell for cell in cells if not cell.point]
    unit = " (percent)" if is_percent(metric) else ""
    others = [other for other in unique(found for item in mine for found in item.record.metrics) if other != metric]

    def picture_id(fingerprint: str, sample: str) -> str:
        found = pictures.get((fingerprint, sample))
        return "" if found is None else found.id

    def id_of(kind: str) -> str:
        return f"{kind}{index}-"

    return Section(
        name=name,
        task=task,
        metric=metric,
        unit=unit,
        data=data_lines(mine),
        table=scores.wide_table(id_of("t"), f"{metric}{unit}", groups, cells, metric, main=True),
        others=[
            scores.wide_table(
                f"{id_of('o')}{number}", f"{other}{' (percent)' if is_percent(other) else ''}", groups, cells, other, False
            )
            for number, other in enumerate(others)
        ],
        notes=note_lines(own, metric, mine),
        by_bits=scores.bits_figures(id_of("b"), own, metric, looks),
        compared=scores.dot_figures(id_of("d"), own, own_cells, metric, looks),
        recovery=scores.recovery_table(id_of("r"), f"Percent of full precision's {metric}", groups, cells, metric),
        errors=error_figures(id_of("e"), own, looks),
        fisher=fisher_figures(id_of("f"), own, looks),
        without_blocks=without_blocks(own),
        times=time_figures(id_of("s"), own, stages),
        memory=memory_figures(id_of("m"), own, stages),
        costs=cost_figures(id_of("c"), own, own_cells, metric, looks),
        modules=module_maps(groups),
        boards=make_boards(own, told, picture_id),
        without_examples=sum(1 for group in own if group.id not in told),
        origins=[origin(group, metric, gathered) for group in groups],
        axes=axis_tables(gathered.grid, cells, mine, metric),
    )
