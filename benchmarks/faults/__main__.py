"""``python -m benchmarks.faults``: kills processes of a small grid and prints the figures."""

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import click

from benchmarks.console import user_errors
from benchmarks.costs import REFERENCE
from benchmarks.engines.ray_cluster import check_folder
from benchmarks.faults.kills import measure
from benchmarks.results.reference import machine
from benchmarks.results.scores import write_text


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--kills", type=click.IntRange(min=1), default=30, help="Processes to kill.")
@click.option("--seed", type=int, default=0, help="Of the kinds and times of the kills.")
@click.option("--pause", type=(float, float), default=(3.0, 9.0), help="Seconds between two kills.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep all files in this folder.")
@click.option("--reference", is_flag=True, help="Write to results/reference/faults.json.")
@click.pass_context
def main(
    context: click.Context,
    kills: int,
    seed: int,
    pause: tuple[float, float],
    folder: Path | None,
    reference: bool,
) -> None:
    """Kill processes of a small grid on two Ray nodes, and compare with the undisturbed grid."""
    with user_errors(context, ""):
        check_folder()  # Ray starts after minutes; complain before
    began = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - began:7.1f} s  {text}", err=True)

    with ExitStack() as stack:
        if folder is None:
            temporary = tempfile.TemporaryDirectory(prefix="fimaq-faults-")
            folder = Path(stack.enter_context(temporary))
        figures = measure(folder.absolute(), kills, seed, pause, say) | {"machine": machine()}
    text = json.dumps(figures, indent=1)
    if reference:
        write_text(REFERENCE / "faults.json", text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
