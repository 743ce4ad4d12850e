"""The command ``python -m benchmarks status``."""

import time
from pathlib import Path

import click

from benchmarks.options import results_option


@click.command()
@results_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.option("--watch", is_flag=True, help="Go on showing it, anew every second, until Ctrl-C.")
def status(results: Path, as_json: bool, watch: bool) -> None:
    """Show what runs on a results folder: every runner at work, here or on other machines, and the last one that ended."""
    from rich.console import Console

    from benchmarks.status import reader, show
    from fimaq_core.errors import FimaqError

    folder = results / "runs" / ".state"
    console = Console(highlight=False)
    if watch and as_json:
        raise FimaqError("--json prints one object: leave --watch out.")
    if watch and not console.is_terminal:
        raise FimaqError("--watch needs a terminal: leave it out.")
    seen, problems = reader.read_states(folder)
    if as_json:
        click.echo(show.as_json(seen, problems, results))
        return
    if not watch:
        console.print(show.page(seen, problems, results, console.width), soft_wrap=not console.is_terminal)
        return
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                lines = max(console.size.height - 10, 1)
                live.update(show.page(*reader.read_states(folder), results, console.width, lines), refresh=True)
                time.sleep(1.0)
        except KeyboardInterrupt:
            return  # the way to end it
