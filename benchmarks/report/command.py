"""``python -m benchmarks report``."""

from pathlib import Path

import click

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.options import adapter, datasets_option, folder_options, profile_option


@click.command()
@profile_option
@datasets_option
@folder_options
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write (default: report.html in the results folder).",
)
def report(profile: str, datasets: str, options: RunOptions, output: Path | None) -> None:
    """Write tables, charts and the origin of every number of a grid to one HTML file.

    Exit codes: 0 written; 2 not written, or records in the results folder cannot be read.
    """
    from benchmarks.console import size_text
    from benchmarks.grid.datasets import with_datasets
    from benchmarks.grid.schema import load_grid
    from benchmarks.report.page import write_report

    path = output or options.results / "report.html"
    found = write_report(with_datasets(load_grid(profile), datasets), options, adapter(), path)
    click.echo(
        f"{len(found.measured)} of {len(found.cells)} cells, {len(found.failed)} failed. "
        f"Report: {path} ({size_text(path.stat().st_size)})"
    )
    for name, message in found.problems:
        click.echo(f"warning: could not be read: {name}: {message}", err=True)
    click.get_current_context().exit(2 if found.unreadable else 0)
