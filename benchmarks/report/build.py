"""From records to the page: gathers, computes every part, renders with all texts escaped."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.compare import reference
from benchmarks.grid.cell import Adapter, RunOptions
from benchmarks.grid.schema import Grid
from benchmarks.published.table import PublishedTable
from benchmarks.report import charts, examples, figures
from benchmarks.report.differences import published, published_table
from benchmarks.report.gather import Gathered, gather
from benchmarks.report.groups import Group, make_groups, rows_of
from benchmarks.report.notes import axis_tables, data_lines, facts, note_lines
from benchmarks.report.provenance import module_maps, origin
from benchmarks.report.tables import recovery_table, wide_table
from benchmarks.results.scores import FULL, main_metric, metric_title, scores, unique, write_text
from benchmarks.tables.reproduction import Reproduction
from fimaq_core.errors import FimaqError


def write_report(
    grid: Grid,
    options: RunOptions,
    adapter: Adapter,
    path: Path,
    get: examples.Fetch = examples.fetch,
    table: PublishedTable | None = None,
) -> Gathered:
    """Write the report of what ``grid`` measured to ``path`` and return what was read.

    ``get`` fetches the pictures of samples; ``table`` is the published table of the grid.

    Raises:
        FimaqError: nothing is measured, or the file cannot be written.
    """
    gathered = gather(grid, options, adapter)
    if not gathered.measured:
        kind, problems = "profile" if table is None else "table", gathered.problems
        unread = f" {len(problems)} files could not be read: {problems[0][1]}" if problems else ""
        raise FimaqError(
            f"Nothing of {kind} '{grid.name}' is measured under {options.results / 'runs'}: "
            f"run `make reproduce-table {kind.upper()}={grid.name}` first.{unread}"
        )
    page = render(make_page(gathered, get, table))
    # A record may hold half of a surrogate pair, which no file can.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return gathered


def make_page(
    gathered: Gathered, get: examples.Fetch, table: PublishedTable | None
) -> dict[str, Any]:
    """Compute everything the page shows."""
    grid, measured = gathered.grid, gathered.measured
    groups = make_groups(measured)
    names = unique(item.cell.section for item in measured)
    methods = [name for name in rows_of(gathered.cells) if name != "fp"]
    looks = charts.looks(methods) | {"fp": "fp"}
    told = examples.read_all(groups, gathered)
    pictures = examples.make_pictures(told, get, gathered)
    stages = figures.stage_colours(groups)
    sections = []
    for name in names:
        mine = [group for group in groups if group.cell.section == name]
        section = make_section(name, mine, gathered, looks, stages)
        # Axis points have their rows in tables, and tables of their own.
        own = [group for group in mine if not group.cell.point]
        section["boards"] = examples.make_boards(own, told, pictures)
        section["without_examples"] = sum(group.id not in told for group in own)
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
        "published": published(measured),
        "table": None if table is None else published_table(Reproduction(table, measured)),
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
    name: str,
    groups: Sequence[Group],
    gathered: Gathered,
    looks: Mapping[str, str],
    stages: Mapping[str, str],
) -> dict[str, Any]:
    """Compute the numbers of section ``name`` of the grid, one task on one data set."""
    cells = [cell for cell in gathered.cells if cell.section == name]
    mine = [item for group in groups for item in group.items]
    metric = main_metric(cells[0].task, scores(mine))
    others = unique(other for group in groups for other in group.scores if other != metric)
    # Charts are about the grid's own settings.
    own = [group for group in groups if not group.cell.point]
    records = [item.record for group in own for item in group.items]
    rebuilt = [r for r in records if r.recipe is not None and r.recipe.get("reconstruct")]
    return {
        "name": name,
        "metric": metric_title(metric),
        "data": data_lines(mine),
        "table": wide_table(groups, cells, metric, main=True),
        "others": [wide_table(groups, cells, other) for other in others],
        "notes": note_lines(own, metric, mine),
        "by_bits": list(figures.bits_figures(own, metric, looks)),
        "compared": list(figures.dot_figures(own, metric, looks)),
        "recovery": recovery_table(groups, cells, metric),
        "errors": list(figures.block_figures(own, looks, "error")),
        "fisher": list(figures.block_figures(own, looks, "fisher")),
        "without_blocks": sum(not record.blocks for record in rebuilt),
        "times": list(figures.stage_figures(own, stages)),
        "memory": list(figures.stage_figures(own, stages, memory=True)),
        "costs": list(figures.cost_figures(own, metric, looks)),
        "modules": module_maps(groups),
        "origins": [origin(group, metric, gathered) for group in groups],
        "axes": axis_tables(gathered.grid, cells, mine, metric),
    }


def render(page: dict[str, Any]) -> str:
    """Return the page as HTML, with a policy that lets it load and run nothing from elsewhere."""
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
    # The only texts that are not escaped are our own files, which the policy names by their hash.
    folder = Path(__file__).parent / "templates"
    texts, rules = {}, {}
    for kind, file in (("style", "page.css"), ("script", "page.js")):
        text = (folder / file).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        texts[kind], rules[kind] = Markup(text), f"{kind}-src 'sha256-{digest}'"
    policy = f"default-src 'none'; {rules['style']}; {rules['script']}; img-src data:; base-uri 'none'; form-action 'none'"
    return templates.get_template("page.html.j2").render(page=page, policy=policy, **texts)
