"""``python -m benchmarks doctor``."""

from pathlib import Path

import click

from benchmarks.options import adapter, folder, places_options, profile_option, results_option

_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@click.command()
@profile_option
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def doctor(profile: str, imagenet: str, coco: str, flickr: str, weights: str, results: Path, as_json: bool) -> None:
    """Examine what this machine can run, and what is missing: packages, devices, disks, data, weights, results.

    Nothing is run, downloaded or changed. Exit codes: 0 the profile can run, 1 it cannot.
    """
    from benchmarks.cells import Places, RunOptions
    from benchmarks.doctor.report import examine, json_text, lines

    options = RunOptions(results, Places(folder(imagenet), folder(coco), folder(flickr)), folder(weights))
    report = examine(profile, options, adapter())
    if as_json:
        click.echo(json_text(report))
    else:
        for state, text in lines(report):
            click.echo(click.style(text, fg=_COLOURS.get(state), bold=not state))
    click.get_current_context().exit(0 if report.can_run else 1)
