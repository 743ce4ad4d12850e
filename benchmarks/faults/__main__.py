"""``python -m benchmarks.faults``: a small grid whose processes are killed, and its figures."""

import json
import tempfile
from pathlib import Path

import click

from benchmarks.console import user_errors
from benchmarks.costs import REFERENCE
from benchmarks.faults.kills import measure
from benchmarks.reference import machine
from benchmarks.run.ray import check_folder
from benchmarks.tables import write_text


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--kills", type=click.IntRange(min=1), default=30, help="Processes to kill.")
@click.option("--seed", type=int, default=0, help="Of the kinds and times of the kills.")
@click.option("--pause", type=(float, float), default=(3, 9), help="Seconds between two kills.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep all files in this folder.")
@click.option("--reference", is_flag=True, help="Write to results/reference/faults.json.")
@click.pass_context
def main(
    context: click.Context, kills: int, seed: int, pause: tuple[float, float],
    folder: Path | None, reference: bool,
) -> None:  # fmt: skip
    """Kill processes of a small grid on two Ray nodes, and compare with the undisturbed grid."""
    with user_errors(context, ""):
        check_folder()  # Ray starts after minutes; complain before
    with tempfile.TemporaryDirectory(prefix="fimaq-faults-") as temporary:
        place = Path(folder or temporary).absolute()
        figures = measure(place, kills, seed, pause) | {"machine": machine()}
    text = json.dumps(figures, indent=1)
    if reference:
        write_text(REFERENCE / "faults.json", text + "\n")
    click.echo(text)


if __name__ == "__main__":
    main()
