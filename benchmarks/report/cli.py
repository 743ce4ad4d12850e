"""``python -m benchmarks report``."""

from pathlib import Path

import click

from benchmarks.cells import Places, RunOptions
from benchmarks.options import adapter, folder, places_options, profile_option, results_option


@click.command()
@profile_option
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="The file to write; report.html in the results folder."
)
def report(profile: str, imagenet: str, coco: str, flickr: str, weights: str, results: Path, output: Path | None) -> None:
    """Write what a grid measured as one HTML file, with charts and where every number is from."""
    from benchmarks.grid import load_grid
    from benchmarks.report.build import write_report
    from benchmarks.units import size_text

    options = RunOptions(results, Places(folder(imagenet), folder(coco), folder(flickr)), folder(weights))
    path = output or results / "report.html"
    page = write_report(load_grid(profile), options, adapter(), path)
    found = page["gathered"]
    size = size_text(path.stat().st_size)
    click.echo(f"{page['done']} of {len(found.cells)} cells, {len(found.failed)} failed. Report: {path} ({size})")
    for name, message in found.problems:
        click.echo(f"warning: could not be read: {name}: {message}", err=True)
