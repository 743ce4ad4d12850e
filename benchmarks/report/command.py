"""``python -m benchmarks report``."""

from pathlib import Path

import click

from benchmarks.grid.cell import Places, RunOptions
from benchmarks.grid.options import adapter, folder, places_options, profile_option, results_option


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
    """Write what a grid measured as one HTML file, with charts and where every number is from."""
    from benchmarks.console import size_text
    from benchmarks.grid.expand import load_grid
    from benchmarks.report.build import write_report

    places = Places(**{name: folder(path) for name, path in data.items()})
    options = RunOptions(results, places, folder(weights))
    path = output or results / "report.html"
    found = write_report(load_grid(profile), options, adapter(), path)
    click.echo(
        f"{len(found.measured)} of {len(found.cells)} cells, {len(found.failed)} failed. "
        f"Report: {path} ({size_text(path.stat().st_size)})"
    )
    for name, message in found.problems:
        click.echo(f"warning: could not be read: {name}: {message}", err=True)
