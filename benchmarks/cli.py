"""The command line: ``python -m benchmarks COMMAND``.

Exit codes: 0 done; 1 cells failed, or measured numbers differ from published numbers; 2 cannot
run, records cannot be read, or nothing can be compared (``diff`` and published tables); 130
interrupted, see :mod:`tasks.common.cli.process`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.console import terminal_width
from benchmarks.doctor import doctor
from benchmarks.grid import options as given
from benchmarks.grid.cell import RunOptions
from benchmarks.grid.datasets import with_datasets
from benchmarks.grid.expand import parse_filters
from benchmarks.grid.schema import load_grid
from benchmarks.published.table import load_table
from benchmarks.report.command import report
from benchmarks.run.command import run_grid
from benchmarks.run.options import RunRequest
from benchmarks.run.plan import make_plan
from benchmarks.run.published import published
from benchmarks.watch.command import status
from tasks.common.cli import numbers, process

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=process.Commands, context_settings=_SETTINGS)
@process.verbose
def cli() -> None:
    """Run grids of models and methods, make tables, compare with published numbers."""


def _gpus(_: click.Context, __: click.Parameter, value: float) -> float:
    if value > 1 and not value.is_integer():
        words = "a number above 1 must be whole: cells can share one GPU, but not several."
        raise click.BadParameter(words)
    return value


def _default(value: object) -> dict[str, object]:
    return {"default": value, "show_default": True}


def _request(profile: str, table: str, datasets: str, **filters: str) -> RunRequest:
    """Return the request to run a profile or published table, with filters."""
    source = click.get_current_context().get_parameter_source("profile")
    if table and source is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("--table has a grid of its own: leave --profile out.")
    if table and datasets:
        raise click.UsageError("--table has its own data sets: leave --datasets out.")
    found = load_table(table) if table else None
    grid = with_datasets(load_grid(profile), datasets) if found is None else found.grid()
    chosen = parse_filters(grid, **filters)
    return RunRequest(grid, chosen, adapter=given.adapter(), table=found)


_FILTERS = {
    "tasks": "Only these tasks, or sections of the profile (comma list).",
    "models": "Only these models; they may be models that the profile does not run by default.",
    "methods": "Only these methods; fp is full precision.",
    "bits": "Only these bits, such as w3a3,w4a4; they may be outside the profile.",
    "seeds": "Only these seeds; they may be outside the profile.",
    "axes": "Only these axes, or points, of an ablation, such as loss,k=15; none: without axes.",
}
_TABLE = "A published table, such as fimaq, or a .yaml file, instead of a profile."
_FORCE = "Remove earlier results of these cells, then measure them. Without it, a run continues."
_JOBS = "Cells at a time. Default on a CPU: by cores and threads; GPU: 1; Ray: all that fit."
_RAY = "A running Ray cluster; by default Ray starts on this machine."
_GPUS = "GPUs that Ray gives to a cell; 0.5: two cells share one."
_RETRIES = "Attempts in a row at a cell whose process dies without progress; 0: no second attempt."
_REHEARSE = "Run shortened cells on random weights and images; estimate time and memory."
_PLACES, _ENGINES = click.Choice(["device", "host", "disk"]), click.Choice(["local", "ray"])
_SHARE = numbers.FiniteRange(0, 1024, min_open=True)
_RETRY_COUNT = {"type": numbers.COUNT_OR_NONE, **_default(RunOptions.retries)}
_CHANGES: dict[str, dict[str, Any]] = {
    "device": {"help": "cpu, cuda, cuda:N or auto instead of the profile's device."},
    "threads": {"type": numbers.THREADS, "help": "CPU threads per cell, instead of the profile's."},
    "placement": {"type": _PLACES, "help": "Place of the inputs and targets of blocks."},
    "force": {"is_flag": True, "help": _FORCE},
    "engine": {"type": _ENGINES, "help": "Executor of the cells.", **_default("local")},
    "jobs": {"type": numbers.COUNT, "help": _JOBS},
    "ray_address": {"default": "", "metavar": "HOST:PORT", "help": _RAY},
    "gpus_per_cell": {"type": _SHARE, "callback": _gpus, "help": _GPUS, **_default(1.0)},
    "retries": {"help": _RETRIES, **_RETRY_COUNT},
}


@cli.command()
@given.collected(
    "request",
    _request,
    profile=given.PROFILE,
    table={"default": "", "metavar": "NAME", "help": _TABLE},
    datasets=given.DATASETS,
    **{name: {"default": "", "help": words} for name, words in _FILTERS.items()},
)
@given.folder_options
@given.collected("changes", dict, **_CHANGES)
@click.option("--plan", is_flag=True, help="List the cells, settings and costs; run nothing.")
@click.option("--rehearse", is_flag=True, help=_REHEARSE)
@click.option("--report", is_flag=True, help="Also write the report, like the command report.")
def run(
    request: RunRequest, options: RunOptions, changes: dict[str, Any], plan: bool, rehearse: bool,
    report: bool,
) -> None:  # fmt: skip
    """Measure the cells of a grid, then print and write its table. Finished cells are kept."""
    context = click.get_current_context()
    request = replace(request, options=replace(options, **changes), report=report)
    if plan:
        found = make_plan(request, terminal_width())
        click.echo(found.text)
        for message in found.unreadable:
            click.echo(f"warning: {message}", err=True)
        context.exit(2 if found.unreadable else 0)
    elif rehearse:
        from benchmarks.rehearsal.rehearse import rehearse as rehearse_grid

        context.exit(rehearse_grid(request))
    else:
        context.exit(run_grid(request))


@cli.command()
@given.results_option
@click.option(
    "--all", "show_all", is_flag=True, help="Also list records without a published number."
)
@click.option("--allow-nothing", is_flag=True, help="Exit with 0 if nothing can be compared.")
def diff(results: Path, show_all: bool, allow_nothing: bool) -> None:
    """Compare all records with published numbers of the same model, data and settings."""
    from benchmarks.compare.diff import run_diff

    click.get_current_context().exit(run_diff(results, show_all, nothing=0 if allow_nothing else 2))


@cli.command()
@given.profile_option
@given.folder_options
@click.option("--add", is_flag=True, help="Add these cells as results of another processor.")
def reference(profile: str, options: RunOptions, add: bool) -> None:
    """Write the results of a finished grid as the reference of its profile.

    References are committed in results/reference/. With cells from several processors (--add),
    the reference shows how much results differ between processors.
    """
    from benchmarks.tables.write import make_reference

    make_reference(load_grid(profile), options, given.adapter(), add)


_FORMATS = click.Choice(["md", "csv", "latex", "all"])
_FORMAT = "One format is printed unless --output is given; all are written to files."
_OUTPUT = click.Path(path_type=Path, file_okay=False)


@cli.command()
@given.profile_option
@click.option("--format", "chosen", type=_FORMATS, default="md", show_default=True, help=_FORMAT)
@click.option("--output", type=_OUTPUT, metavar="DIR", help="Folder of the files.")
@click.option("--metric", help="Print the table of this metric, such as top5, kl or agreement.")
@given.datasets_option
@given.folder_options
def tables(
    profile: str, chosen: str, output: Path | None, metric: str | None, datasets: str,
    options: RunOptions,
) -> None:  # fmt: skip
    """Make the tables of a profile again from its records; nothing is run.

    The tables have the cells of the profile only. Cells that a run with filters measured outside
    the profile are left out. Files are written to tables/ in the results folder, or to --output.
    """
    from benchmarks.tables.write import remake

    ending = "tex" if chosen == "latex" else chosen
    if metric and (ending != "md" or output is not None):
        raise click.UsageError("--metric prints a table: leave --format and --output out.")
    grid = with_datasets(load_grid(profile), datasets)
    code = remake(grid, options, given.adapter(), ending, output, metric)
    click.get_current_context().exit(code)


_METRICS = (
    "Only these metrics, such as top1 or R@1,i2t_R@5. Default: all metrics of a single pair, the "
    "main metric of several pairs."
)
_LEVEL = "Level of the confidence intervals; a difference is significant if p < 1 - level."
_LEVELS = numbers.FiniteRange(0.5, 0.9999)


@cli.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option("--metric", default="", help=_METRICS)
@click.option("--level", type=_LEVELS, default=0.95, show_default=True, help=_LEVEL)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def compare(run_a: Path, run_b: Path, metric: str, level: float, as_json: bool) -> None:
    """Test two runs for a difference, sample by sample.

    A RUN is a cell's folder, its result.json, or a folder with several records, such as the folder
    of a method. Two records are a pair if they share task, data, model, bits, seed and scope. If a
    side has several methods or variants, the pair shares these too. Full precision has no bits: it
    is paired with each record of the other side.

    Exit codes: 0 compared, whatever the result; 2 cannot compare, or records cannot be read.
    """
    from benchmarks.compare.pair_tests import compare_pairs
    from benchmarks.compare.pairs import pair_up, read_side
    from benchmarks.compare.text import comparison_text, json_text

    a, b = read_side(run_a), read_side(run_b)
    wanted = tuple(dict.fromkeys(name.strip() for name in metric.split(",") if name.strip()))
    compared = compare_pairs(pair_up(a, b), level, wanted)
    text = json_text if as_json else comparison_text
    click.echo(text(a, b, compared, level))
    for problem in (*a.problems, *b.problems):
        click.echo(f"warning: {problem}", err=True)
    click.get_current_context().exit(2 if a.problems or b.problems else 0)


for command in (published, status, doctor, report):
    cli.add_command(command)
