"""The command line: ``python -m benchmarks COMMAND``.

Exit codes: 0 done; 1 some cells failed, or measured numbers differ from published ones; 2 cannot
run, or nothing is comparable (of ``diff`` and of tables); 130 broken off.
"""

from pathlib import Path
from typing import Any, Literal

import click

from benchmarks.console import user_errors
from benchmarks.doctor import doctor
from benchmarks.grid.cell import RunOptions
from benchmarks.grid.expand import load_grid, parse_filters
from benchmarks.grid.options import (
    adapter,
    folder,
    places,
    places_options,
    profile_option,
    results_option,
    text_options,
)
from benchmarks.published.command import published
from benchmarks.published.table import load_table
from benchmarks.report.command import report
from benchmarks.run.command import run_grid
from benchmarks.run.options import RETRIES, ExecutorOptions
from benchmarks.watch.command import status


class _Group(click.Group):
    """A command group whose user errors are one line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        words = "the same command, without --force, goes on where it stopped"
        with user_errors(ctx, f"Finished cells are kept: {words}."):
            return super().invoke(ctx)


def _gpus(_: click.Context, __: click.Parameter, value: float) -> float:
    if value > 1 and value != int(value):
        words = "above 1 it must be a whole number: Ray shares out one GPU, not several."
        raise click.BadParameter(words)
    return value


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=_Group, context_settings=_SETTINGS)
def cli() -> None:
    """Run grids of models and methods, make tables, compare with published numbers."""


_FILTERS = {
    "tasks": "Only these tasks, or sections of the profile (comma list).",
    "models": "Only these models; also ones the profile has but does not run by default.",
    "methods": "Only these methods; fp is full precision.",
    "bits": "Only these bits, such as w3a3,w4a4; also ones outside the profile.",
    "seeds": "Only these seeds; also ones outside the profile.",
    "axes": "Only these axes of an ablation, such as k,loss.",
}
_TABLE = "A published table, such as fimaq, instead of a profile; or a .yaml file."
_DEVICE = "cpu, cuda, cuda:N or auto instead of the profile's device."
_WEIGHTS = "Folder with checkpoints named <model.tag>.safetensors, .pth or .bin."
_ENGINE = "Where cells run.  [default: local]"
_RAY = "A Ray cluster that runs already; else one of this machine."
_JOBS = "Cells at a time. CPU: by cores and threads; GPU: 1; Ray: what fits."
_THREADS = "CPU threads per cell, instead of the profile's."
_PLACEMENT = "Where what blocks take in and give is kept meanwhile."
_RETRIES = "Attempts in a row at a cell whose process dies and that get no further; 0: no more."
_REHEARSE = "Run the cells in small with random weights and images; estimate time and memory."
_FORCE = "Remove what is there of these cells, then measure them. Without it a run goes on."
_COUNT = click.IntRange(min=0)
_SHARE = click.FloatRange(min=0, min_open=True)


@cli.command()
@profile_option
@click.option("--table", default="", metavar="NAME", help=_TABLE)
@text_options(_FILTERS)
@click.option("--device", default="", help=_DEVICE)
@places_options
@click.option("--weights", default="", metavar="DIR", help=_WEIGHTS)
@results_option
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help=_ENGINE)
@click.option("--ray-address", default="", metavar="HOST:PORT", help=_RAY)
@click.option(
    "--gpus-per-cell",
    type=_SHARE,
    default=1.0,
    callback=_gpus,
    show_default=True,
    help="GPUs that Ray gives a cell; 0.5 lets two share one.",
)
@click.option("--jobs", type=click.IntRange(min=1), help=_JOBS)
@click.option("--threads", type=click.IntRange(min=1), help=_THREADS)
@click.option("--placement", type=click.Choice(["device", "host", "disk"]), help=_PLACEMENT)
@click.option("--retries", type=_COUNT, default=RETRIES, show_default=True, help=_RETRIES)
@click.option("--plan", is_flag=True, help="List the cells and their settings; run nothing.")
@click.option("--rehearse", is_flag=True, help=_REHEARSE)
@click.option("--report", is_flag=True, help="Write the report too, as the command report does.")
@click.option("--force", is_flag=True, help=_FORCE)
def run(
    profile: str, table: str, device: str, weights: str, results: Path,
    engine: Literal["local", "ray"], ray_address: str, gpus_per_cell: float, jobs: int | None,
    threads: int | None, placement: Literal["device", "host", "disk"] | None, retries: int,
    plan: bool, rehearse: bool, report: bool, force: bool, **texts: str,
) -> None:  # fmt: skip
    """Measure a grid's cells, then print and write its table. Finished cells stay."""
    context = click.get_current_context()
    if table and context.get_parameter_source("profile") is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--table has a grid of its own: leave --profile out.")
    published = load_table(table) if table else None
    grid = load_grid(profile) if published is None else published.grid()
    filters = parse_filters(grid, **{name: texts.pop(name) for name in _FILTERS})
    data, where = places(texts), folder(weights)
    options = RunOptions(results, data, where, device or None, threads, force, placement)
    how = ExecutorOptions(engine, jobs, ray_address, gpus_per_cell, retries)
    given = (grid, table or profile, filters, options, adapter(), how)
    if rehearse and not plan:
        from benchmarks.rehearsal.rehearse import rehearse as rehearse_grid

        context.exit(rehearse_grid(*given, report, published))
    context.exit(run_grid(*given, plan, report, published))


@cli.command()
@results_option
@click.option("--all", "show_all", is_flag=True, help="Also list what has no published number.")
@click.option("--allow-nothing", is_flag=True, help="Exit with 0 if nothing is comparable.")
def diff(results: Path, show_all: bool, allow_nothing: bool) -> None:
    """Compare everything measured with published numbers, like with like only."""
    from benchmarks.compare.diff import run_diff

    click.get_current_context().exit(run_diff(results, show_all, nothing=0 if allow_nothing else 2))


@cli.command()
@profile_option
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
@click.option("--add", is_flag=True, help="Add these cells as those of another processor.")
def reference(profile: str, weights: str, results: Path, add: bool, **texts: str) -> None:
    """Make the finished grid the committed reference (results/reference/) of its profile.

    A reference says how far results differ between processors: add the same cells from several.
    """
    from benchmarks.tables.write import make_reference

    options = RunOptions(results, places(texts), folder(weights))
    make_reference(load_grid(profile), options, adapter(), add)


@cli.command()
@profile_option
@click.option(
    "--format", "chosen", type=click.Choice(["md", "csv", "latex", "all"]), default="md", show_default=True,
    help="One is printed unless --output is given; all are written to files.",
)  # fmt: skip
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder of the files.",
)
@places_options
@click.option("--weights", default="", metavar="DIR", help="As for run.")
@results_option
def tables(
    profile: str, chosen: str, output: Path | None, weights: str, results: Path, **texts: str
) -> None:
    """Make a profile's tables anew from its records; nothing is run.

    They cover the profile's own cells: what a run with filters measured beyond them is not in them. Files go to tables/ beside
    the runs unless --output says otherwise.
    """
    from benchmarks.tables.write import remake

    options = RunOptions(results, places(texts), folder(weights))
    remake(load_grid(profile), options, adapter(), "tex" if chosen == "latex" else chosen, output)


@cli.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option(
    "--metric",
    default="",
    help="These metrics, such as top1 or R@1,i2t_R@5; by default all of one pair, the main ones of many.",
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
    from benchmarks.compare.pairs import pair_up, read_side
    from benchmarks.compare.text import comparison_text, json_text

    a, b = read_side(run_a), read_side(run_b)
    wanted = tuple(dict.fromkeys(name.strip() for name in metric.split(",") if name.strip()))
    judged = judge(pair_up(a, b), level, wanted)
    text = json_text if as_json else comparison_text
    click.echo(text(a, b, judged, level))


for command in (published, status, doctor, report):
    cli.add_command(command)
