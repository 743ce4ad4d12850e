"""The page of a report: gather records, compute all parts, render HTML with escaped texts."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.compare import reference
from benchmarks.grid.cell import Adapter, RunOptions
from benchmarks.grid.schema import Grid
from benchmarks.published.table import PublishedTable
from benchmarks.report import charts, examples, figures
from benchmarks.report.figures import Looks
from benchmarks.report.gather import Gathered, gather
from benchmarks.report.groups import Group, make_groups
from benchmarks.report.provenance import module_maps, provenance
from benchmarks.report.tables import diff_table, fidelity_tables, paper_table, score_table
from benchmarks.results.scores import (
    FULL,
    Measured,
    main_metric,
    metric_title,
    rows_of,
    sample_counts,
    scores,
    unique,
    write_text,
)
from benchmarks.tables.ablation import axis_table, methods_on
from benchmarks.tables.expected_orders import order_lines
from benchmarks.tables.exports import NOTE, export_table
from benchmarks.tables.reproduction import Reproduction
from benchmarks.tables.settings import settings_lines
from benchmarks.tables.summary import sampling_line
from fimaq_core.errors import FimaqError

Dict = dict[str, Any]


def write_report(
    grid: Grid,
    options: RunOptions,
    adapter: Adapter,
    path: Path,
    *,
    get: examples.Fetch = examples.fetch,
    table: PublishedTable | None = None,
) -> Gathered:
    """Write the report of ``grid`` to ``path`` and return the cells and records that it shows.

    ``get`` fetches pictures of samples. ``table`` is the published table that the grid measures.

    Raises:
        FimaqError: no cell is measured, or the file cannot be written.
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
    page = render(make_page(gathered, get, table))
    # Texts of records may contain half a surrogate pair, which UTF-8 cannot encode.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return gathered


def make_page(gathered: Gathered, get: examples.Fetch, table: PublishedTable | None) -> Dict:
    """Compute the content of all parts of the page."""
    grid, measured = gathered.grid, gathered.measured
    groups = make_groups(measured)
    names = unique(item.cell.section for item in measured)
    methods = [name for name in rows_of(gathered.cells) if name != "fp"]
    looks = charts.looks(methods) | {"fp": "fp"}
    answers = examples.read_all(groups, gathered)
    pictures = examples.make_pictures(answers, get, gathered)
    stages = figures.stage_colours(groups)
    sections = []
    for name in names:
        mine = [group for group in groups if group.cell.section == name]
        section = make_section(mine, gathered, looks, stages)
        own = [group for group in mine if not group.cell.point]
        section["boards"] = examples.make_boards(own, answers, pictures)
        section["without_examples"] = sum(group.id not in answers for group in own)
        sections.append(section)
    dates = sorted(item.record.finished[:10] for item in measured)
    subjects = unique(group.cell.subject for group in groups if group.cell.method != "fp")
    return {
        "title": f"{'Profile' if table is None else 'Table'} {grid.name}",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "dates": unique([dates[0], dates[-1]]),
        "gathered": gathered,
        "facts": facts(measured),
        "sections": sections,
        "empty": [name for name in grid.tasks if name not in names],
        "published": diff_table(measured),
        "table": None
        if table is None
        else paper_table(Reproduction(table, measured, damaged=gathered.damaged)),
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
        "exports_note": NOTE,
    }


def make_section(groups: Sequence[Group], gathered: Gathered, looks: Looks, stages: Looks) -> Dict:
    """Compute the content of one section of the grid: one task on one data set."""
    name = groups[0].cell.section
    cells = [cell for cell in gathered.cells if cell.section == name]
    mine = [item for group in groups for item in group.items]
    metric = main_metric(cells[0].task, scores(mine))
    others = unique(other for group in groups for other in group.scores if other != metric)
    # Charts show the grid's own settings only; axis points are in tables.
    own = [group for group in groups if not group.cell.point]
    records = [item.record for group in own for item in group.items]
    rebuilt = [r for r in records if r.recipe is not None and r.recipe.get("reconstruct")]
    axes, drawn = [], {}
    for axis, points in gathered.grid.axes.items():
        if found := list(figures.axis_figures(groups, axis, points, metric, looks)):
            drawn[axis] = found
        for method in methods_on(axis, cells):
            same = [cell for cell in cells if cell.method == method]
            table = axis_table(axis, list(points), metric, mine, same)
            axes.append((f"{axis}: {method}", table))
    return {
        "name": name,
        "metric": metric_title(metric),
        "data": data_lines(mine),
        "table": score_table(groups, cells, metric, main=True),
        "damaged": [one.line for one in gathered.damaged if one.cell.section == name],
        "others": [score_table(groups, cells, other) for other in others],
        "notes": note_lines(own, metric, mine),
        "by_bits": list(figures.bits_figures(own, metric, looks)),
        "costs": list(figures.cost_figures(own, metric, looks)),
        "errors": list(figures.block_figures(own, looks, "error")),
        "fisher": list(figures.block_figures(own, looks, "fisher")),
        "without_blocks": sum(not record.blocks for record in rebuilt),
        "times": list(figures.stage_figures(own, stages)),
        "memory": list(figures.stage_figures(own, stages, memory=True)),
        "modules": module_maps(groups),
        "origins": [provenance(group, metric, gathered) for group in groups],
        "fidelity": fidelity_tables(groups),
        "axes": axes,
        "axis_figures": drawn,
        "exports": export_table(metric, mine),
    }


def data_lines(measured: Sequence[Measured]) -> list[str]:
    """Return the distinct data sets with split and number of samples."""
    sets = ((item.record.dataset, item.record.n) for item in measured)
    return unique(f"{d.name}, split {d.split}, {sample_counts(n, d.captions)}" for d, n in sets)


def note_lines(groups: Sequence[Group], metric: str, measured: Sequence[Measured]) -> list[str]:
    """Return lines on settings of ``groups``, sampling errors and the expected order of methods."""
    mine = [item for group in groups for item in group.items]
    lines = settings_lines(mine)
    table = scores(measured)
    lines.append(sampling_line(table.loc[table["metric"] == metric, "stderr"]))
    for mark in unique(item.cell.mark for item in mine if item.cell.method != "fp"):
        items = [item for item in mine if item.cell.mark == mark]
        table = scores(items)
        lines += order_lines(table[table["metric"] == metric], items, mark)
    return lines


def facts(measured: Sequence[Measured]) -> dict[str, list[str]]:
    """Return the distinct data sets, machines, versions and revisions of all records."""
    machines = [item.record.environment for item in measured]
    versions = []
    for name in unique(name for machine in machines for name in machine.versions):
        found = unique(one.versions[name] for one in machines if name in one.versions)
        versions.append(f"{name} {' / '.join(found)}")
    return {
        "Data": data_lines(measured),
        "Machines": unique(machine.device for machine in machines),
        "Versions": versions,
        "Git revisions": unique(machine.git_revision[:19] for machine in machines),
    }


def render(page: Dict) -> str:
    """Return the page as HTML; its security policy forbids all content from elsewhere."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=PackageLoader("benchmarks.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["px"] = charts.px
    folder = Path(__file__).parent / "templates"
    # Only these two files are not escaped. The policy allows them by their hashes.
    texts, rules = {}, ["default-src 'none'"]
    for kind, file in (("style", "page.css"), ("script", "page.js")):
        text = (folder / file).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        texts[kind] = Markup(text)
        rules.append(f"{kind}-src 'sha256-{digest}'")
    rules += ["img-src data:", "base-uri 'none'", "form-action 'none'"]
    template = templates.get_template("page.html.j2")
    return template.render(page=page, policy="; ".join(rules), **texts)
