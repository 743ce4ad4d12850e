"""Files with tables of a profile: after a run, made again from records, or as a reference."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from benchmarks.compare import reference
from benchmarks.console import terminal_width
from benchmarks.grid.cell import Adapter, RunOptions
from benchmarks.grid.expand import Filters, chosen_axes, expand
from benchmarks.grid.schema import Axes, Grid
from benchmarks.published.table import PublishedTable
from benchmarks.results.scores import (
    Cells,
    Collected,
    Damaged,
    collect,
    csv_columns,
    csv_text,
    scores,
    unique,
    write_text,
)
from benchmarks.tables.corruption import NOTE, TITLE, corruption_tables
from benchmarks.tables.formats import markdown
from benchmarks.tables.frontier import frontier_markdown
from benchmarks.tables.reproduction import Reproduction
from benchmarks.tables.summary import grid_latex, grid_markdown
from fimaq_core.errors import FimaqError, suggest
from fimaq_core.files import remove


def title(grid: Grid) -> str:
    """Return the heading of a grid's table."""
    return f"Profile {grid.name}" + (f": {grid.description}" if grid.description else "")


def _markdown(
    grid: Grid,
    found: Collected,
    cells: Cells,
    width: int | None = None,
    axes: Axes | None = None,
    *,
    metric: str | None = None,
) -> str:
    """Return the tables of a grid as Markdown, see :func:`grid_markdown`."""
    measured, damaged = found
    if grid.table == "frontier":
        return frontier_markdown(title(grid), measured, cells, width, damaged)
    own = grid.axes if axes is None else axes
    text = grid_markdown(title(grid), measured, cells, width, own, damaged, metric=metric)
    if metric not in (None, "top1"):
        return text
    parts = [
        f"\n## {name}, {content}: {TITLE}\n\n{chr(10).join(markdown(table, width))}\n\n{NOTE}\n"
        for name, (content, table) in corruption_tables(measured, cells).items()
    ]
    return "".join([text, *parts])


def texts(grid: Grid, found: Collected, cells: Cells) -> dict[str, str]:
    """Return the texts of the tables of ``cells`` by file ending."""
    measured, damaged = found
    table = scores(measured, fidelity=True)
    return {
        "md": _markdown(grid, found, cells),
        "csv": csv_text(table[csv_columns(table)]),
        "tex": grid_latex(grid.name, measured, cells, grid.axes, damaged),
    }


def _write(
    folder: Path, name: str, words: Mapping[str, str], damaged: Sequence[Damaged]
) -> list[Path]:
    """Write the files of a table. A CSV file has no lines below, so a text file names ``damaged``.

    Returns the paths, without that text file.
    """
    paths = [folder / f"{name}.{ending}" for ending in words]
    for path, text in zip(paths, words.values(), strict=True):
        write_text(path, text)
    beside = folder / f"{name}.unreadable.txt"
    if damaged:
        write_text(beside, "".join(f"{one.line}\n" for one in damaged))
    else:
        remove(beside)
    return paths


def warn(damaged: Sequence[Damaged]) -> int:
    """Name cells with unreadable records on stderr; return 2 if there are some, else 0."""
    for one in damaged:
        click.echo(f"warning: {one.line}", err=True)
    return 2 if damaged else 0


def remake(
    grid: Grid,
    options: RunOptions,
    adapter: Adapter,
    chosen: str,
    output: Path | None,
    metric: str | None = None,
) -> int:
    """Make the tables of a profile again from its records.

    Args:
        chosen: ending of one file, or ``all`` for all files.
        output: folder of the files. Without it, one table is printed; ``all`` are written to the
            folder ``tables`` of the results.
        metric: metric of a Markdown table that is printed; None: the main one. Only this table
            is made then.

    Returns 2 if records cannot be read, else 0. Raises FimaqError if nothing is measured.
    """
    cells = expand(grid, Filters(), options)
    found = collect(cells, adapter)
    code = warn(found.damaged)
    if not found.measured and found.damaged:
        raise FimaqError("No table is made: no record of a cell can be used (see above).")
    if not found.measured:
        raise FimaqError(
            f"Nothing of the profile '{grid.name}' is measured under {options.results / 'runs'} "
            f"with these data and weights: run `make reproduce-table PROFILE={grid.name}` first, "
            "or give --results and the folders of the run."
        )
    if metric is not None:
        known = unique(scores(found.measured, fidelity=True)["metric"])
        if metric not in known:
            words = f"No cell of '{grid.name}' has a metric '{metric}'."
            raise FimaqError(words + suggest(metric, known))
        if grid.table == "frontier":
            raise FimaqError(
                f"The table of '{grid.name}' has columns of its own: leave --metric out. "
                "--format csv prints all metrics."
            )
        click.echo(_markdown(grid, found, cells, metric=metric), nl=False)
        return code
    words = texts(grid, found, cells)
    if chosen != "all" and output is None:
        click.echo(words[chosen], nl=False)
        return code
    words = words if chosen == "all" else {chosen: words[chosen]}
    for path in _write(output or options.results / "tables", grid.name, words, found.damaged):
        click.echo(f"wrote {path}")
    return code


def write_tables(
    grid: Grid, filters: Filters, options: RunOptions, adapter: Adapter, cells: Cells
) -> int:
    """Write the files, print the table of ``cells``, and compare ``cells`` with the reference.

    The files cover the whole grid and this run: filters do not remove rows from them.
    Returns 2 if records cannot be read, else 0.
    """
    full = expand(grid, Filters(), options)
    known = {cell.key for cell in full}
    # The cells of the grid come first: those of filtered axes lie on fewer axes.
    everything = [*full, *(cell for cell in cells if cell.key not in known)]
    if filters != Filters():  # restore the order of the grid: sections, then models
        sections = list(grid.tasks)
        models = list(dict.fromkeys(cell.model for cell in everything))
        everything.sort(key=lambda cell: (sections.index(cell.section), models.index(cell.model)))
    found = collect(everything, adapter)
    words = texts(grid, found, everything)
    markdown, table, _ = _write(options.results / "tables", grid.name, words, found.damaged)
    mine, axes = found.only(cells), chosen_axes(grid, filters)
    print("", _markdown(grid, mine, cells, terminal_width(), axes), sep="\n")
    for line in reference.compare(grid, mine.measured):
        print(line)
    print(f"Table: {table} and {markdown}")
    return warn(found.damaged)


def write_published(
    table: PublishedTable, grid: Grid, options: RunOptions, adapter: Adapter, cells: Cells
) -> Reproduction:
    """Write the files of a published table; print and return the part that ``cells`` measure.

    The files cover the whole table and this run: filters do not remove rows from them.
    """
    found = collect([*expand(grid, Filters(), options), *cells], adapter)
    whole = Reproduction(table, found.measured, damaged=found.damaged)
    words = {"md": whole.markdown(), "csv": whole.csv(), "tex": whole.tex()}
    paths = _write(options.results / "tables", table.name, words, found.damaged)
    names, mine = {cell.name for cell in cells}, found.only(cells).measured
    part = Reproduction(table, mine, names, found.damaged)
    print("", part.markdown(terminal_width()), sep="\n")
    print(f"Table: {', '.join(map(str, paths))}")
    warn(found.damaged)
    return part


def make_reference(grid: Grid, options: RunOptions, adapter: Adapter, add: bool) -> None:
    """Write the reference of a finished grid, or ``add`` the cells of another processor to it.

    Raises FimaqError if cells are missing (in the layout ``frontier``: all cells), or if added
    cells have other settings or data.
    """
    cells = expand(grid, Filters(), options)
    found = collect(cells, adapter)
    measured = found.measured
    warn(found.damaged)
    partial = add or grid.table == "frontier"
    if not measured if partial else len(measured) < len(cells):
        raise FimaqError(
            f"Only {len(measured)} of {len(cells)} cells of '{grid.name}' are measured, and a "
            f"reference needs all: run `make reproduce-table PROFILE={grid.name}` first."
        )
    if add:
        paths = [reference.add_processor(grid, measured)]
    else:
        words = _markdown(grid, found, cells)
        paths = reference.write_reference(grid, measured, words)
    for path in paths:
        print(f"wrote {path}")
