"""``python -m benchmarks.faults``: kills, busy workers and many cells, measured; figures printed and written."""

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from benchmarks.console import user_errors
from benchmarks.engines.ray_cluster import check_folder
from benchmarks.reference import REFERENCE
from benchmarks.tables import write_text


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--kills", type=click.IntRange(min=0), default=30, show_default=True, help="Processes to kill; 0 leaves that out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is killed when.")
@click.option("--pause", type=(float, float), default=(3.0, 9.0), show_default=True, help="Seconds between two kills.")
@click.option("--workers", type=click.IntRange(min=0), default=8, show_default=True, help="To be kept busy; 0 leaves that out.")
@click.option("--cells", type=click.IntRange(min=0), default=10_000, show_default=True, help="To plan; 0 leaves that out.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep everything in this folder; else it is a temporary one.")
@click.option("--reference", is_flag=True, help="Write the figures to results/reference/faults.json; what was left out stays.")
def main(
    kills: int, seed: int, pause: tuple[float, float], workers: int, cells: int, folder: Path | None, reference: bool
) -> None:
    """Disturb a small grid on two Ray nodes, keep workers busy with cells of one second, plan a grid of thousands."""
    from benchmarks.faults import busy, scale
    from benchmarks.faults import kills as kill_bench
    from benchmarks.reference import machine

    if kills or workers:  # both start Ray, after minutes
        with user_errors(click.get_current_context(), ""):
            check_folder()
    began = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - began:7.1f} s  {text}", err=True)

    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fimaq-faults-")))
        place = place.absolute()
        place.mkdir(parents=True, exist_ok=True)
        if kills:
            figures |= kill_bench.as_json(kill_bench.measure(place / "kills", kills, seed, pause, say))
        if workers:
            figures |= busy.measure(place / "busy", workers, say)
        if cells:
            say(f"{cells} cells planned and put into tables")
            figures |= {"scale": scale.plan_and_aggregate(cells, place / "scale")}
    figures["machine"] = machine()
    if reference:
        path = REFERENCE / "faults.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_text(path, json.dumps({**before, **figures}, indent=1) + "\n")
        say(f"wrote {path.name}")
    click.echo(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
