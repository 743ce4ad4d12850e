"""The command line: ``python -m benchmarks run | diff | reference | compare | tables | published | doctor``.

Exit codes: 0 done; 1 some cells failed, or measured numbers differ from published ones; 2 cannot run, or nothing is
comparable (of ``diff`` and of tables); 130 broken off.
"""

from pathlib import Path
from typing import Any, Literal

import click

from benchmarks.cells import Places, RunOptions
from benchmarks.commands import run_grid
from benchmarks.console import user_errors
from benchmarks.doctor import doctor
from benchmarks.engines.options import RETRIES, EngineOptions
from benchmarks.grid import Filters, load_grid, parse_filters
from benchmarks.options import adapter, folder, places_options, profile_option, results_option
from benchmarks.published.cli import published
from benchmarks.report.cli import report
from benchmarks.schema import Grid
from benchmarks.status.cli import status
from tasks.common.anew import is_name, new_name


class _Group(click.Group):
    """A command group whose user errors are one line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        with user_errors(ctx, "Finished cells are kept: the same command goes on where it stopped."):
            return super().invoke(ctx)


#: What ``--force`` without a name stands for.
NEW = "new"


def _gpus(_: click.Context, __: click.Parameter, value: float) -> float:
    if value > 1 and value != int(value):
        raise click.BadParameter("above 1 it must be a whole number: Ray shares out one GPU, not several.")
    return value


def _force(_: click.Context, __: click.Parameter, value: str) -> str:
    if value and value != NEW and not is_name(value):
        raise click.BadParameter(f"'{value}' is no name of a run: give the one that it said, as --force=NAME.")
    return new_name() if value == NEW else value


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
    is_flag=False,
    flag_value=NEW,
    default="",
    metavar="[=NAME]",
    callback=_force,
    help="Measure again what is done. Such a run has a name, which it says; with it one that was broken off goes on.",
)
def run(
    profile: str, table: str, tasks: str, models: str, methods: str, bits: str, seeds: str, axes: str, device: str, imagenet: str,
    coco: str, flickr: str, weights: str, results: Path, engine: Literal["local", "ray"], ray_address: str, gpus_per_cell: float,
    jobs: int | None, threads: int | None, placement: Literal["device", "host", "disk"] | None, retries: int, plan: bool,
    rehearse: bool, report: bool, force: str,
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
    how = EngineOptions(engine, jobs, ray_address, gpus_per_cell, retries)
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
    from benchmarks.compare.published import run_diff

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
    from benchmarks.tables.files import make_reference

    options = RunOptions(results, Places(folder(imagenet), folder(coco), folder(flickr)), folder(weights))
    make_reference(load_grid(profile), options, adapter(), add)


@cli.command()
@profile_option
@click.option(
    "--format", "chosen", type=click.Choice(["md", "csv", "latex", "all"]), default="md", show_default=True,
    help="One is printed unless --output is given; all are written to files.",
)  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Folder of the files.")
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
def tables(
    profile: str, chosen: str, output: Path | None, imagenet: str, coco: str, flickr: str, weights: str, results: Path
) -> None:
    """Make a profile's tables anew from its records; nothing is run.

    They cover the profile's own cells: what a run with filters measured beyond them is not in them. Files go to tables/ beside
    the runs unless --output says otherwise.
    """
    from benchmarks.tables.files import remake

    options = RunOptions(results, Places(folder(imagenet), folder(coco), folder(flickr)), folder(weights))
    remake(load_grid(profile), options, adapter(), "tex" if chosen == "latex" else chosen, output)


@cli.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option(
    "--metric", default="", help="These metrics, such as top1 or R@1,i2t_R@5; by default all of one pair, the main ones of many."
)
@click.option(
    "--level", type=click.FloatRange(0.5, 0.9999), default=0.95, show_default=True,
    help="Of the confidence intervals; a difference is shown where p is below 1 - level.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def compare(run_a: Path, run_b: Path, metric: str, level: float, as_json: bool) -> None:
    """Test whether two runs differ, sample by sample.

    A RUN is a cell's folder, its result.json, or a folder that holds several records, such as a method's. Records are paired that
    share task, data, model, bits, seed and scope; also method and variant where a side has several of these. Full precision,
    which has no bits, is compared with whatever is on the other side.

    Exit codes: 0 compared, whatever came out; 2 cannot compare.
    """
    from benchmarks.compare.judge import judge
    from benchmarks.compare.sides import pair_up, read_side
    from benchmarks.compare.text import json_text, report

    pairing = pair_up(read_side(run_a), read_side(run_b))
    wanted = tuple(dict.fromkeys(name.strip() for name in metric.split(",") if name.strip()))
    judged = judge(pairing, level, wanted)
    click.echo(json_text(pairing, judged, level) if as_json else report(pairing, judged, level))


cli.add_command(published)
cli.add_command(status)
cli.add_command(doctor)
cli.add_command(report)
