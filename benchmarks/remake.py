"""``python -m benchmarks tables``: a profile's tables from its records, without running anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.cells import Cell, Places, RunOptions
from benchmarks.grid import Filters, expand, load_grid
from benchmarks.options import adapter, folder, places_options, profile_option, results_option
from benchmarks.schema import Grid
from fimaq_core.errors import FimaqError

if TYPE_CHECKING:
    from benchmarks.tables import Measured

#: Endings of files by format.
FORMATS = {"md": "md", "csv": "csv", "latex": "tex"}


@click.command()
@profile_option
@click.option(
    "--format", "chosen", type=click.Choice([*FORMATS, "all"]), default="md", show_default=True,
    help="One is printed unless --output is given; all are written to files.",
)  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Folder of the files.")
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
def tables(
    profile: str, chosen: str, output: Path | None, imagenet: str, coco: str, flickr: str, weights: str, results: Path
) -> None:
    """Make a profile's tables anew from its records; nothing is run.

    They cover the profile's own cells: what a run with filters measured beyond them is not in them. Files go to tables/ beside
    the runs unless --output says otherwise.
    """
    from benchmarks import tables as making  # pandas takes its time

    grid = load_grid(profile)
    options = RunOptions(results, Places(folder(imagenet), folder(coco), folder(flickr)), folder(weights))
    cells = expand(grid, Filters(), options)
    measured = making.collect(cells, adapter())
    if not measured:
        raise FimaqError(
            f"Nothing of the profile '{grid.name}' is measured under {results / 'runs'} with these data and weights: run "
            f"`make reproduce-table PROFILE={grid.name}` first, or give --results and the folders of the run."
        )
    formats = list(FORMATS) if chosen == "all" else [chosen]
    texts = {name: _text(name, grid, measured, cells) for name in formats}
    if chosen != "all" and output is None:
        click.echo(texts[chosen], nl=False)
        return
    for name, text in texts.items():
        path = (output or results / "tables") / f"{grid.name}.{FORMATS[name]}"
        making.write_text(path, text)
        click.echo(f"wrote {path}")


def _text(name: str, grid: Grid, measured: Sequence[Measured], cells: Sequence[Cell]) -> str:
    from benchmarks import latex, summary, tables
    from benchmarks.commands import title

    if name == "csv":
        return tables.csv_text(tables.frame(measured)[tables.COLUMNS])
    if name == "md":
        return summary.report(title(grid), measured, cells, axes=grid.axes)
    return latex.report(grid.name, measured, cells, grid.axes)
