"""The command line of every task: run, or its stages one by one. Recipe options are made from the recipe's fields."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from fimaq_core.errors import FimaqError, RecipeError, suggest
from fimaq_core.progress import Progress, Report
from fimaq_core.recipe import METHODS, Recipe, make_recipe, read_recipe_file
from tasks.common.request import CellRequest, DataRequest, ModelRequest

_GROUPS = {
    "method": "Method",
    "bits": "Bits",
    "calibration": "Calibration",
    "mlp": "MLP reconstruction",
    "reconstruction": "Reconstruction",
    "loss": "Block loss",
    "numerics": "Numerics",
}


class _GroupedCommand(click.Command):
    """A command whose help lists recipe options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            entry = parameter.get_help_record(ctx)
            if entry is not None:
                sections.setdefault(getattr(parameter, "group", "Options"), []).append(entry)
        for heading, entries in sections.items():
            with formatter.section(heading):
                formatter.write_dl(entries)


class _RecipeOption(click.Option):
    """An option for one recipe field."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = f"{group} (recipe)"


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--method``, ``--recipe`` and an option for every other recipe field to ``command``."""
    for name, field in reversed(Recipe.model_fields.items()):
        if name == "method":
            continue
        extra = field.json_schema_extra
        group = _GROUPS[str(extra["group"])] if isinstance(extra, dict) else "Options"
        flag = f"--{name.replace('_', '-')}"
        declaration = f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag
        default = "as a_bits" if field.default is None else field.default
        command = click.option(
            declaration,
            name,
            cls=_RecipeOption,
            group=group,
            type=_click_type(field.annotation),
            default=None,
            help=f"{field.description}  [fimaq: {default}]",
        )(command)
    command = click.option(
        "--recipe",
        "recipe_file",
        type=click.Path(path_type=Path),
        help="YAML file with recipe fields ('field: value' lines); options win over it.",
    )(command)
    return click.option("--method", default="fimaq", show_default=True, help=f"Method: {', '.join(['fp', *METHODS])}.")(command)


def _click_type(annotation: Any) -> Any:
    if get_origin(annotation) is Literal:
        return click.Choice([str(choice) for choice in get_args(annotation)])
    if annotation in (int, float, bool, str):
        return annotation
    return next(part for part in get_args(annotation) if part is not type(None))


def _take_recipe(options: dict[str, Any]) -> Recipe | None:
    """Merge defaults, method, file and options; None for method ``fp``."""
    method, file = options.pop("method"), options.pop("recipe_file")
    given = {name: options.pop(name) for name in list(Recipe.model_fields) if name in options}
    given = {name: value for name, value in given.items() if value is not None}
    if method == "fp":
        return None
    content = read_recipe_file(file) if file is not None else {}
    own = content.pop("method", None)
    if own is not None and not _was_given("method"):
        method = own
    if method not in METHODS:
        raise RecipeError(f"Unknown method '{method}'.{suggest(method, ['fp', *METHODS])}")
    return make_recipe(method, content, given)


def _was_given(option: str) -> bool:
    source = click.get_current_context().get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def _common_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.option("--model", required=True, help="Short name, demo name or the library's own 'model.tag'; see 'models'."),
        click.option("--model-args", default="{}", help="JSON object of arguments for the model's constructor."),
        click.option(
            "--weights", type=click.Path(path_type=Path), help="Local checkpoint: safetensors, or .pth/.bin read weights-only."
        ),
        click.option("--weights-folder", type=click.Path(path_type=Path), help="Folder with <model.tag>.safetensors files."),
        *_run_options(),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _run_options() -> list[Callable[..., Any]]:
    return [
        click.option(
            "--data", type=click.Path(path_type=Path), help="Data folder with train/ and val/ (demo models bring their own data)."
        ),
        click.option(
            "--calibration-list",
            type=click.Path(path_type=Path),
            help="Image paths, one a line, or a result record to take the images of.",
        ),
        click.option(
            "--limit", type=click.IntRange(min=1), help="Evaluate on the first so many samples only (recorded as such)."
        ),
        click.option("--skip-corrupt", is_flag=True, help="Leave damaged images out and name them in the record."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads."),
        click.option("--eval-batch", default=32, show_default=True, type=click.IntRange(min=1), help="Images a forward pass."),
        click.option("--workers", default=0, show_default=True, type=click.IntRange(min=0), help="Data-loading processes."),
        click.option(
            "--placement",
            default="device",
            show_default=True,
            type=click.Choice(["device", "host", "disk"]),
            help="Where block inputs are cached.",
        ),
        click.option(
            "--step-engine",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "eager", "fused", "compiled", "graph"]),
            help="How optimisation steps run; auto: one CUDA graph, compiled for long runs on CPUs, else fused.",
        ),
    ]


def _mlp_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--mlp-checkpoint", type=click.Path(path_type=Path), help="Reconstructed MLPs to use instead of reconstructing them."
    )(command)


def _requests(options: dict[str, Any]) -> tuple[ModelRequest, DataRequest]:
    return (
        ModelRequest(
            options.pop("model"), _json_object(options.pop("model_args")), options.pop("weights"), options.pop("weights_folder")
        ),
        _data_request(options),
    )


def _data_request(options: dict[str, Any]) -> DataRequest:
    return DataRequest(options.pop("data"), options.pop("calibration_list"), options.pop("limit"), options.pop("skip_corrupt"))


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"--model-args is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise RecipeError("--model-args must be a JSON object, such as '{\"img_size\": 256}'.")
    return content


def build_group(task_name: str, summary: str) -> click.Group:
    """Make the commands of a task: run, its stages one by one, and facts about models."""

    @click.group(help=summary, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
    @click.option("--verbose", is_flag=True, help="Show the log.")
    def group(verbose: bool) -> None:
        logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")

    @group.command(cls=_GroupedCommand, help="Calibrate, reconstruct and evaluate one model; writes a result record.")
    @_common_options
    @_mlp_option
    @recipe_options
    @click.option("--variant", help="Name of this variant of the method in tables.")
    @click.option(
        "--results", default="results/runs", show_default=True, type=click.Path(path_type=Path), help="Where records go."
    )
    @click.option("--force", is_flag=True, help="Measure again although a record exists.")
    def run(**options: Any) -> None:
        from tasks.common.record import read_record
        from tasks.common.run import run_cell

        recipe = _take_recipe(options)
        model, data = _requests(options)
        request = CellRequest(task_name, model, data, recipe, **options)
        with _bars() as report:
            path = run_cell(request, report)
        record = read_record(path)
        for name, metric in record.metrics.items():
            full = f", full precision {record.fp_metrics[name].value:.2f}" if name in record.fp_metrics else ""
            click.echo(f"{record.model} {record.method} {name} {metric.value:.2f} ± {metric.stderr:.2f} (n = {record.n}{full})")
        for note in record.notes:
            click.echo(f"note: {note}")
        click.echo(f"record: {path}")

    @group.command(
        name="reconstruct-mlp",
        cls=_GroupedCommand,
        help="Reconstruct the MLPs only (GELU becomes ReLU), the first stage of APHQ-ViT; writes a checkpoint.",
    )
    @_common_options
    @recipe_options
    @click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoint to write (.safetensors).")
    def reconstruct_mlp(**options: Any) -> None:
        from tasks.common import stages

        click.echo(f"checkpoint of reconstructed MLPs: {_first_stage(task_name, stages.mlp_stage, options)}")

    @group.command(cls=_GroupedCommand, help="Find the ranges only; writes a checkpoint.")
    @_common_options
    @_mlp_option
    @recipe_options
    @click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoint to write (.safetensors).")
    def calibrate(**options: Any) -> None:
        from tasks.common import stages

        click.echo(f"calibrated checkpoint: {_first_stage(task_name, stages.calibrate_stage, options)}")

    @group.command(
        cls=_GroupedCommand,
        help="Reconstruct the calibrated CHECKPOINT, going on where an earlier call stopped. Recipe options given here apply to "
        "reconstruction; those that determine ranges must be the checkpoint's.",
    )
    @click.argument("checkpoint", type=click.Path(path_type=Path))
    @_stage_options
    @recipe_options
    @click.option("--out", required=True, type=click.Path(path_type=Path), help="Checkpoint to write (.safetensors).")
    def reconstruct(checkpoint: Path, **options: Any) -> None:
        from tasks.common import stages

        out, given = options.pop("out"), _given_recipe(options)
        with _bars() as report:
            log = stages.reconstruct_stage(task_name, checkpoint, out, given, _data_request(options), options, report)
        for note in log.notes:
            click.echo(f"note: {note}")
        click.echo(f"reconstructed checkpoint: {out}")

    @group.command(help="Evaluate CHECKPOINT, of any stage (with MLPs alone reconstructed: in full precision).")
    @click.argument("checkpoint", type=click.Path(path_type=Path))
    @_stage_options
    def evaluate(checkpoint: Path, **options: Any) -> None:
        from tasks.common import stages

        with _bars() as report:
            evaluation = stages.evaluate_stage(task_name, checkpoint, _data_request(options), options, report)
        for name, metric in evaluation.metrics.items():
            click.echo(f"{name} {metric.value:.2f} ± {metric.stderr:.2f} (n = {evaluation.n})")
        for sample in evaluation.skipped:
            click.echo(f"skipped: {sample}")

    @group.command(
        help="Show what CHECKPOINT (of any stage) holds, without data: layers with quantizers, bits, sizes and bit operations, "
        "what stays in full precision, sums, and where it comes from."
    )
    @click.argument("checkpoint", type=click.Path(path_type=Path))
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
    @_weights_options
    def inspect(checkpoint: Path, as_json: bool, **options: Any) -> None:
        from tasks.common import stages

        inspection = stages.inspect_stage(task_name, checkpoint, options)
        click.echo(json.dumps(inspection.content(), indent=1) if as_json else inspection.text())

    @group.command(help="List short names and demo models.")
    def models() -> None:
        from tasks.common.registry import get_task

        for name, meaning in get_task(task_name).model_names().items():
            click.echo(f"{name:14s} {meaning}")

    return group


def _first_stage(task_name: str, stage: Callable[[CellRequest, Path, Report], None], options: dict[str, Any]) -> Path:
    """Run a stage that starts from the float model; return the checkpoint it wrote."""
    recipe, out = _take_recipe(options), Path(options.pop("out"))
    if recipe is None:
        raise RecipeError("Method 'fp' has no stages: use run.")
    model, data = _requests(options)
    with _bars() as report:
        stage(CellRequest(task_name, model, data, recipe, **options), out, report)
    return out


def _stage_options(command: Callable[..., None]) -> Callable[..., None]:
    command = _weights_options(command)
    for option in reversed(_run_options()):
        command = option(command)
    return command


def _weights_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option("--weights", type=click.Path(path_type=Path), help="The float weights, if they came from a local file."),
            click.option("--weights-folder", type=click.Path(path_type=Path), help="Folder with <model.tag>.safetensors files."),
        ]
    ):
        command = option(command)
    return command


def _given_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """Recipe fields that the user gave, from the file and the options, the method first."""
    method, file = options.pop("method"), options.pop("recipe_file")
    given = {name: options.pop(name) for name in list(Recipe.model_fields) if name in options}
    content = read_recipe_file(file) if file is not None else {}
    if _was_given("method"):
        content["method"] = method
    return content | {name: value for name, value in given.items() if value is not None}


class _bars:
    """Progress bars on a terminal; nothing where output is no terminal."""

    def __enter__(self) -> Report:
        console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description:28s}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._bars.start()
        self._tasks: dict[str, Any] = {}

        def report(event: Progress) -> None:
            if event.stage not in self._tasks:
                self._tasks[event.stage] = self._bars.add_task(event.stage, total=event.total, detail="")
            self._bars.update(
                self._tasks[event.stage],
                total=event.total,
                completed=event.done,
                description=f"{event.stage} {event.block}",
                detail=event.detail,
            )

        return report

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


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
