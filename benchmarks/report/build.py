"""From records to the page: gathers, computes every part, renders with everything escaped, and writes."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import reference
from benchmarks.cells import Adapter, RunOptions
from benchmarks.published.layout import Layout
from benchmarks.published.table import PublishedTable
from benchmarks.report import charts, figures
from benchmarks.report.examples import Fetch, Pictures, Told, fetch, make_boards, make_pictures, read_all
from benchmarks.report.gather import Gathered, gather
from benchmarks.report.groups import Group, make_groups, rows_of
from benchmarks.report.notes import axis_tables, data_lines, facts, note_lines
from benchmarks.report.provenance import module_maps, origin
from benchmarks.report.published import published, published_table
from benchmarks.report.tables import recovery_table, wide_table
from benchmarks.results.scores import FULL, main_metric, metric_title, scores, unique, write_text
from benchmarks.schema import Grid
from fimaq_core.errors import FimaqError


def write_report(
    grid: Grid,
    options: RunOptions,
    adapter: Adapter,
    path: Path,
    get: Fetch = fetch,
    table: PublishedTable | None = None,
) -> dict[str, Any]:
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
    gathered = gather(grid, options, adapter)
    if not gathered.measured:
        kind = "profile" if table is None else "table"
        problems = gathered.problems
        unread = f" {len(problems)} files could not be read: {problems[0][1]}" if problems else ""
        raise FimaqError(
            f"Nothing of {kind} '{grid.name}' is measured under {options.results / 'runs'}: "
            f"run `make reproduce-table {kind.upper()}={grid.name}` first.{unread}"
        )
    page = make_page(gathered, get, table)
    # A record may hold half of a surrogate pair, which no file can.
    write_text(path, render(page).encode("utf-8", "replace").decode("utf-8"))
    return page


def make_page(gathered: Gathered, get: Fetch, table: PublishedTable | None = None) -> dict[str, Any]:
    """Compute everything the page shows."""
    grid, measured = gathered.grid, gathered.measured
    groups = make_groups(measured)
    names = unique(item.cell.section for item in measured)
    looks = {**charts.looks([name for name in rows_of(gathered.cells) if name != "fp"]), "fp": "fp"}
    told = read_all(groups, gathered)
    pictures = make_pictures(list(told.values()), get, gathered)
    stages = figures.stage_colours(groups)
    sections = [make_section(gathered, name, index, groups, told, pictures, looks, stages) for index, name in enumerate(names)]
    dates = sorted(item.record.finished[:10] for item in measured)
    subjects = unique(group.cell.subject for group in groups if group.cell.method != "fp")
    done = len({item.cell.key for item in measured})
    return {
        "title": f"{'Profile' if table is None else 'Table'} {grid.name}",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "dates": unique([dates[0], dates[-1]]),
        "gathered": gathered,
        "done": done,
        "missing": len(gathered.cells) - done - len(gathered.failed),
        "facts": facts(measured),
        "sections": sections,
        "with_blocks": {name for section in sections for figure in section["errors"] for name in figure["head"][1:]},
        "empty": [name for name in grid.tasks if name not in names],
        "published": published(measured),
        "table": None if table is None else published_table(Layout(table, measured)),
        "pictures": list(pictures.values()),
        "filters": {
            "task": names,
            "model": subjects or unique(group.cell.model for group in groups),
            "bits": unique(group.cell.bits for group in groups if group.cell.bits != FULL),
            "method": rows_of([item.cell for item in measured]),
        },
        "looks": looks,
        "reference": reference.compare(grid, measured),
        "stages": stages,
    }


def make_section(
    gathered: Gathered,
    name: str,
    index: int,
    all_groups: Sequence[Group],
    told: Mapping[str, Told],
    pictures: Pictures,
    looks: Mapping[str, str],
    stages: Mapping[str, str],
) -> dict[str, Any]:
    """Compute everything about section ``name`` of the grid, one task on one data set; ``index`` makes ids of it."""
    cells = [cell for cell in gathered.cells if cell.section == name]
    groups = [group for group in all_groups if group.cell.section == name]
    mine = [item for group in groups for item in group.items]
    metric = main_metric(cells[0].task, scores(mine))
    # Charts are about the grid's own settings; axis points have their rows in tables, and tables of their own.
    own = [group for group in groups if not group.cell.point]
    others = [other for other in unique(found for group in groups for found in group.scores) if other != metric]
    return {
        "name": name,
        "metric": metric_title(metric),
        "data": data_lines(mine),
        "table": wide_table(f"t{index}-", metric_title(metric), groups, cells, metric, main=True),
        "others": [
            wide_table(f"o{index}-{place}", metric_title(other), groups, cells, other) for place, other in enumerate(others)
        ],
        "notes": note_lines(own, metric, mine),
        "by_bits": figures.bits_figures(f"b{index}-", own, metric, looks),
        "compared": figures.dot_figures(f"d{index}-", own, metric, looks),
        "recovery": recovery_table(f"r{index}-", groups, cells, metric),
        "errors": figures.block_figures(f"e{index}-", own, looks, "error"),
        "fisher": figures.block_figures(f"f{index}-", own, looks, "fisher"),
        "without_blocks": sum(
            1
            for record in (item.record for group in own for item in group.items)
            if record.recipe is not None and record.recipe.get("reconstruct") and not record.blocks
        ),
        "times": figures.stage_figures(f"s{index}-", own, stages),
        "memory": figures.stage_figures(f"m{index}-", own, stages, memory=True),
        "costs": figures.cost_figures(f"c{index}-", own, metric, looks),
        "modules": module_maps(groups),
        "boards": make_boards(own, told, pictures),
        "without_examples": sum(1 for group in own if group.id not in told),
        "origins": [origin(group, metric, gathered) for group in groups],
        "axes": axis_tables(gathered.grid, cells, mine, metric),
    }


def render(page: dict[str, Any]) -> str:
    """Return the page as HTML, with a policy that lets it load and run nothing from elsewhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("benchmarks.report")
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates.filters["px"] = charts.px
    # Our own files, the only text that is not escaped; nothing of a record gets into them. The policy names them by their hash.
    style, script = (loader.get_source(templates, name)[0] for name in ("page.css", "page.js"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    template = templates.get_template("page.html.j2")
    return template.render(page=page, style=Markup(style), script=Markup(script), policy=policy)
