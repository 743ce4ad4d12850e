"""``python -m benchmarks report``."""

from pathlib import Path

import click

from benchmarks.grid import options as shared
from benchmarks.grid.cell import RunOptions

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@shared.profile_option
@shared.places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@shared.results_option
@click.option("--output", type=_FILE, help="File to write (default: report.html in the results).")
def report(profile: str, weights: str, results: Path, output: Path | None, **data: str) -> None:
    """Write one HTML file with a grid's tables, charts, and the origin of every number."""
    from benchmarks.console import size_text
    from benchmarks.grid.expand import load_grid
    from benchmarks.report.page import write_report

    options = RunOptions(results, shared.places(data), shared.folder(weights))
    path = output or results / "report.html"
    found = write_report(load_grid(profile), options, shared.adapter(), path)
    click.echo(
        f"{len(found.measured)} of {len(found.cells)} cells, {len(found.failed)} failed. "
        f"Report: {path} ({size_text(path.stat().st_size)})"
    )
    for name, message in found.problems:
        click.echo(f"warning: could not be read: {name}: {message}", err=True)
