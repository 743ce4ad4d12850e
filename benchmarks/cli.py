"""The command line: ``python -m benchmarks run | diff | reference | compare | tables | published | doctor``.

Exit codes: 0 done; 1 some cells failed, or measured numbers differ from published ones; 2 cannot run, or nothing is
comparable (of ``diff`` and of tables); 130 broken off.
"""

from pathlib import Path
from typing import Any, Literal

import click

from benchmarks.cells import Places, RunOptions
from benchmarks.commands import run_diff, run_grid, run_reference
from benchmarks.compare.cli import compare
from benchmarks.console import user_errors
from benchmarks.doctor import doctor
from benchmarks.grid import Filters, load_grid, parse_filters
from benchmarks.options import adapter, folder, places_options, profile_option, results_option
from benchmarks.published.cli import published
from benchmarks.remake import tables
from benchmarks.report.cli import report
from benchmarks.run.options import RETRIES, ExecutorOptions
from benchmarks.schema import Grid
from benchmarks.watch.status import status


class _Group(click.Group):
    """A command group whose user errors are one line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        with user_errors(ctx, "Finished cells are kept: the same command, without --force, goes on where it stopped."):
            return super().invoke(ctx)


def _gpus(_: click.Context, __: click.Parameter, value: float) -> float:
    if value > 1 and value != int(value):
        raise click.BadParameter("above 1 it must be a whole number: Ray shares out one GPU, not several.")
    return value


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Run grids of models and methods, make tables, compare with published numbers."""


@cli.command()
@profile_option
@click.option(
    "--table", default="", metavar="NAME", help="A published table, such as fimaq, instead of a profile; or a .yaml file."
)
@click.option("--tasks", default="", help="Only these tasks, or sections of the profile (comma list).")
@click.option("--models", default="", help="Only these models; also ones the profile has but does not run by default.")
@click.option("--methods", default="", help="Only these methods; fp is full precision.")
@click.option("--bits", default="", help="Only these bits, such as w3a3,w4a4; also ones outside the profile.")
@click.option("--seeds", default="", help="Only these seeds; also ones outside the profile.")
@click.option("--axes", default="", help="Only these axes of an ablation, such as k,loss.")
@click.option("--device", default="", help="cpu, cuda, cuda:N or auto instead of the profile's device.")
@places_options
@click.option("--weights", default="", metavar="DIR", help="Folder with checkpoints named <model.tag>.safetensors, .pth or .bin.")
@results_option
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Where cells run.")
@click.option("--ray-address", default="", metavar="HOST:PORT", help="A Ray cluster that runs already; else one of this machine.")
@click.option(
    "--gpus-per-cell",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    callback=_gpus,
    show_default=True,
    help="GPUs that Ray gives a cell; 0.5 lets two share one.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Cells at a time. CPU: by cores and threads; GPU: 1; Ray: what fits.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads a cell, instead of the profile's.")
@click.option(
    "--placement", type=click.Choice(["device", "host", "disk"]), help="Where what blocks take in and give is kept meanwhile."
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=RETRIES,
    show_default=True,
    help="Attempts in a row at a cell whose process dies and that get no further; 0: nothing is tried again.",
)
@click.option("--plan", is_flag=True, help="List the cells and their settings; run nothing.")
@click.option(
    "--rehearse",
    is_flag=True,
    help="Run the cells in small with random weights and images; estimate time and memory.",
)
@click.option("--report", is_flag=True, help="Write the report too, as the command report does.")
@click.option(
    "--force",
    is_flag=True,
    help="Remove what is there of these cells, then measure them. Without it the same command goes on where it stopped.",
)
def run(
    profile: str, table: str, tasks: str, models: str, methods: str, bits: str, seeds: str, axes: str, device: str, imagenet: str,
    coco: str, flickr: str, weights: str, results: Path, engine: Literal["local", "ray"], ray_address: str, gpus_per_cell: float,
    jobs: int | None, threads: int | None, placement: Literal["device", "host", "disk"] | None, retries: int, plan: bool,
    rehearse: bool, report: bool, force: bool,
) -> None:  # fmt: skip
    """Measure a grid's cells, then print and write its table. Finished cells are not measured again."""
    context = click.get_current_context()
    if table and context.get_parameter_source("profile") is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--table has a grid of its own: leave --profile out.")
    published = None
    if table:
        from benchmarks.published.table import load_table

        published = load_table(table)
    grid: Grid = load_grid(profile) if published is None else published.grid()
    filters: Filters = parse_filters(grid, tasks, models, methods, bits, seeds, axes)
    places = Places(folder(imagenet), folder(coco), folder(flickr))
    options = RunOptions(results, places, folder(weights), device or None, threads, force, placement)
    how = ExecutorOptions(engine, jobs, ray_address, gpus_per_cell, retries)
    if rehearse and not plan:
        from benchmarks.rehearsal.run import rehearse as rehearse_grid

        name, tasks_adapter = table or profile, adapter()
        context.exit(
            rehearse_grid(grid, name, filters, options, tasks_adapter, how, report, published),
        )
    context.exit(run_grid(grid, table or profile, filters, options, adapter(), how, plan, report, published))


@cli.command()
@results_option
@click.option("--all", "show_all", is_flag=True, help="Also list what has no published number.")
@click.option("--allow-nothing", is_flag=True, help="Exit with 0, not 2, where nothing is comparable yet.")
def diff(results: Path, show_all: bool, allow_nothing: bool) -> None:
    """Compare everything measured with published numbers, like with like only."""
    click.get_current_context().exit(run_diff(results, show_all, nothing=0 if allow_nothing else 2))


@cli.command()
@profile_option
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
@click.option("--add", is_flag=True, help="Add these cells to the reference as those of another processor.")
def reference(profile: str, imagenet: str, coco: str, flickr: str, weights: str, results: Path, add: bool) -> None:
    """Make the finished grid the committed reference (results/reference/) of its profile.

    A reference says how far results differ between processors: add the same cells from several.
    """
    options = RunOptions(results, Places(folder(imagenet), folder(coco), folder(flickr)), folder(weights))
    click.get_current_context().exit(run_reference(load_grid(profile), options, adapter(), add))


cli.add_command(compare)
cli.add_command(tables)
cli.add_command(published)
cli.add_command(status)
cli.add_command(doctor)
cli.add_command(report)
