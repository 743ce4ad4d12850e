"""``python -m benchmarks report``."""

from pathlib import Path

import click

from benchmarks.grid.cell import RunOptions
from benchmarks.grid.options import (
    adapter,
    folder,
    places,
    places_options,
    profile_option,
    results_option,
)


@click.command()
@profile_option
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write; report.html in the results folder.",
)
def report(profile: str, weights: str, results: Path, output: Path | None, **data: str) -> None:
    """Write one HTML file with a grid's tables, charts, and the origin of every number."""
    from benchmarks.console import size_text
    from benchmarks.grid.expand import load_grid
    from benchmarks.report.page import write_report

    options = RunOptions(results, places(data), folder(weights))
    path = output or results / "report.html"
    found = write_report(load_grid(profile), options, adapter(), path)
    click.echo(
        f"{len(found.measured)} of {len(found.cells)} cells, {len(found.failed)} failed. "
        f"Report: {path} ({size_text(path.stat().st_size)})"
    )
    for name, message in found.problems:
        click.echo(f"warning: could not be read: {name}: {message}", err=True)
