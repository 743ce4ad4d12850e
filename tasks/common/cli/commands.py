"""The command line of every task: run, or its stages one by one."""

import json
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from fimaq_core.errors import FimaqError, RecipeError
from fimaq_core.progress import OnProgress, progress_bars
from fimaq_core.recipe import Recipe
from tasks.common.cli.options import (
    GroupedCommand,
    TaskOptions,
    given_recipe,
    mlp_option,
    model_options,
    out_option,
    recipe_options,
    run_options,
    take,
    take_recipe,
    weights_options,
    with_options,
    with_preprocessing,
)
from tasks.common.registry import defaults
from tasks.common.request import CellRequest, DataRequest, ModelRequest


def build_group(task_name: str, summary: str, own: TaskOptions = TaskOptions()) -> click.Group:
    """Make the commands of a task: run, its stages one by one, and facts about models."""

    @click.group(
        help=summary,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    @click.option("--verbose", is_flag=True, help="Show the log.")
    def group(verbose: bool) -> None:
        logging.basicConfig(
            level=logging.INFO if verbose else logging.ERROR,
            format="%(levelname)s %(name)s: %(message)s",
        )

    @group.command(
        cls=GroupedCommand,
        help="Calibrate, reconstruct and evaluate one model; writes a result record.",
    )
    @with_options(*model_options(own), mlp_option, *recipe_options(own))
    @click.option("--variant", help="Name of this variant of the method in tables.")
    @click.option(
        "--results",
        default="results/runs",
        show_default=True,
        type=click.Path(path_type=Path),
        help="Where records go.",
    )
    @click.option(
        "--force", is_flag=True, help="Remove what is there of the cell, and measure it again."
    )
    def run(**options: Any) -> None:
        from tasks.common.cell.environment import resolve_device
        from tasks.common.cell.identity import forget
        from tasks.common.cell.prepare import check_request
        from tasks.common.cell.run import run_cell
        from tasks.common.record import read_record

        force = options.pop("force")
        request = check_request(
            _request(task_name, take_recipe(options, defaults(task_name)), options)
        )
        if force:
            resolve_device(request.device)  # nothing is removed for a run that cannot start
            forget([request])
        with progress_bars() as on_progress:
            path = run_cell(request, on_progress)
        record = read_record(path)
        for name, metric in record.metrics.items():
            full = (
                f", full precision {record.fp_metrics[name].value:.2f}"
                if name in record.fp_metrics
                else ""
            )
            click.echo(
                f"{record.model} {record.method} {name} {metric.value:.2f} ± {metric.stderr:.2f} (n = {record.n}{full})"
            )
        _echo(record.weights.notes())
        if record.preprocessing is not None:
            click.echo(f"preprocessing: {record.preprocessing.text()}")
        _echo(f"note: {note}" for note in record.notes)
        click.echo(f"record: {path}")

    @group.command(
        name="reconstruct-mlp",
        cls=GroupedCommand,
        help="Reconstruct the MLPs only (GELU becomes ReLU), the first stage of APHQ-ViT; writes a checkpoint.",
    )
    @with_options(*model_options(own), *recipe_options(own))
    @out_option
    def reconstruct_mlp(**options: Any) -> None:
        from tasks.common.cell import stages

        click.echo(
            f"checkpoint of reconstructed MLPs: {_first_stage(task_name, stages.mlp_stage, options)}"
        )

    @group.command(cls=GroupedCommand, help="Find the ranges only; writes a checkpoint.")
    @with_options(*model_options(own), mlp_option, *recipe_options(own))
    @out_option
    def calibrate(**options: Any) -> None:
        from tasks.common.cell import stages

        click.echo(
            f"calibrated checkpoint: {_first_stage(task_name, stages.calibrate_stage, options)}"
        )

    @group.command(
        cls=GroupedCommand,
        help="Reconstruct the calibrated CHECKPOINT, going on where an earlier call stopped. Recipe options given here apply to "
        "reconstruction; those that determine ranges must be the checkpoint's.",
    )
    @click.argument("checkpoint", type=click.Path(path_type=Path))
    @with_options(*run_options(own), *weights_options(), *recipe_options(own))
    @out_option
    def reconstruct(checkpoint: Path, **options: Any) -> None:
        from tasks.common.cell import stages

        out, given, data = (
            options.pop("out"),
            given_recipe(options),
            take(DataRequest, with_preprocessing(options)),
        )
        with progress_bars() as on_progress:
            log = stages.reconstruct_stage(
                task_name, checkpoint, out, given, data, options, on_progress
            )
        _echo(f"note: {note}" for note in log.sentences())
        click.echo(f"reconstructed checkpoint: {out}")

    @group.command(
        help="Evaluate CHECKPOINT, of any stage (with MLPs alone reconstructed: in full precision)."
    )
    @click.argument("checkpoint", type=click.Path(path_type=Path))
    @with_options(*run_options(own), *weights_options())
    def evaluate(checkpoint: Path, **options: Any) -> None:
        from tasks.common.cell import stages

        data = take(DataRequest, with_preprocessing(options))
        with progress_bars() as on_progress:
            evaluation = stages.evaluate_stage(task_name, checkpoint, data, options, on_progress)
        for name, metric in evaluation.metrics.items():
            click.echo(f"{name} {metric.value:.2f} ± {metric.stderr:.2f} (n = {evaluation.n})")
        _echo(f"note: {note}" for note in evaluation.notes)
        for sample in evaluation.skipped:
            click.echo(f"skipped: {sample}")

    @group.command(
        help="Show what CHECKPOINT (of any stage) holds, without data: layers with quantizers, bits, sizes and bit operations, "
        "what stays in full precision, sums, and where it comes from."
    )
    @click.argument("checkpoint", type=click.Path(path_type=Path))
    @click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object instead of tables."
    )
    @with_options(*weights_options())
    def inspect(checkpoint: Path, as_json: bool, **options: Any) -> None:
        from tasks.common.cell import stages

        inspection = stages.inspect_stage(task_name, checkpoint, options)
        click.echo(json.dumps(inspection.content(), indent=1) if as_json else inspection.text())

    @group.command(help="List short names and demo models.")
    def models() -> None:
        from tasks.common.registry import get_task

        names = get_task(task_name).model_names()
        width = max(14, *map(len, names))
        for name, meaning in names.items():
            click.echo(f"{name:{width}s} {meaning}")

    return group


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _request(task_name: str, recipe: Recipe | None, options: dict[str, Any]) -> CellRequest:
    model, data = take(ModelRequest, with_preprocessing(options)), take(DataRequest, options)
    return CellRequest(task_name, model, data, recipe, **options)


def _first_stage(
    task_name: str,
    stage: Callable[[CellRequest, Path, OnProgress], list[str]],
    options: dict[str, Any],
) -> Path:
    """Run a stage that starts from the float model; return the checkpoint it wrote."""
    recipe, out = take_recipe(options, defaults(task_name)), Path(options.pop("out"))
    if recipe is None:
        raise RecipeError("Method 'fp' has no stages: use run.")
    with progress_bars() as on_progress:
        notes = stage(_request(task_name, recipe, options), out, on_progress)
    _echo(f"note: {note}" for note in notes)
    return out


def main(group: click.Group, arguments: list[str] | None = None) -> None:
    """Run a command group: errors meant for the user become one message and exit code 2.

    Args:
        arguments: instead of the process's own.
    """
    try:
        group.main(arguments, standalone_mode=False)
    except FimaqError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; finished blocks and cells are kept", err=True)
        sys.exit(130)
