"""The options of a task's commands. Those of recipes are made from the recipe's fields."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from fimaq_core.errors import RecipeError, suggest
from fimaq_core.recipe import METHODS, Recipe, make_recipe, read_recipe_file
from tasks.common import class_order
from tasks.common.preprocessing import HELP, parse_preprocessing
from tasks.common.request import DataRequest, ModelRequest

Command = Callable[..., None]


@dataclass(frozen=True)
class TaskOptions:
    """What a task's commands offer beside the options that all have.

    Attributes:
        scope: name of the option that says what of a model is quantized, and its choices, the usual first; empty for none.
        scopes: its choices.
        evaluations: choices of ``--eval``, the usual first; empty for none.
        calibration_data: whether there is ``--calibration-data``.
        keep_outputs: help of ``--keep-outputs``; empty for none.
        exif: help of ``--exif``; empty for none.
        data: help of ``--data``.
        class_order: whether classes are folders, so that there is ``--class-order``.
        preprocessing: fields of preprocessing that can be given.
    """

    scope: str = ""
    scopes: tuple[str, ...] = ()
    evaluations: tuple[str, ...] = ()
    calibration_data: bool = False
    keep_outputs: str = ""
    exif: str = ""
    data: str = "Data folder with train/ and val/ (demo models bring their own data)."
    class_order: bool = True
    preprocessing: tuple[str, ...] = tuple(HELP)


_GROUPS = {
    "method": "Method",
    "bits": "Bits",
    "calibration": "Calibration",
    "mlp": "MLP reconstruction",
    "reconstruction": "Reconstruction",
    "loss": "Block loss",
    "numerics": "Numerics",
}


class GroupedCommand(click.Command):
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


def recipe_options(own: TaskOptions, command: Command) -> Command:
    """Add ``--method``, ``--recipe`` and an option for every other recipe field to ``command``."""
    for name, field in reversed(Recipe.model_fields.items()):
        if name in ("method", "scope"):
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
    if own.scope:
        command = click.option(
            f"--{own.scope}",
            "scope",
            type=click.Choice(own.scopes),
            default=None,
            help=f"What is quantized; the rest stays in full precision.  [{own.scopes[0]}]",
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


def take_recipe(options: dict[str, Any], usual: dict[str, Any]) -> Recipe | None:
    """Take the recipe out of ``options``: merge method, the task's ``usual`` fields, file and options; None for method ``fp``."""
    method, file = options.pop("method"), options.pop("recipe_file")
    given = {name: options.pop(name) for name in list(Recipe.model_fields) if name in options}
    given = {name: value for name, value in given.items() if value is not None}
    if method == "fp":
        return None
    content = read_recipe_file(file) if file is not None else {}
    own = content.pop("method", None)
    if own is not None and not was_given("method"):
        method = own
    if method not in METHODS:
        raise RecipeError(f"Unknown method '{method}'.{suggest(method, ['fp', *METHODS])}")
    return make_recipe(method, usual, content, given)


def was_given(option: str) -> bool:
    """Whether the user gave the option of that name."""
    source = click.get_current_context().get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def model_options(own: TaskOptions, command: Command) -> Command:
    """Add what says which model, which data, and how to run."""
    options = [
        click.option("--model", required=True, help="Short name, demo name or the library's own 'model.tag'; see 'models'."),
        click.option("--model-args", default="{}", help="JSON object of arguments for the model's constructor."),
        *_weights_options(
            "Local checkpoint: safetensors, or a file of torch.save (.pth, .pt, .bin, .ckpt, .tar), read weights-only."
        ),
        *_run_options(own),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _run_options(own: TaskOptions) -> list[Callable[..., Any]]:
    return [
        click.option("--data", type=click.Path(path_type=Path), help=own.data),
        *_evaluation_options(own),
        *(click.option(f"--{name.replace('_', '-')}", name, help=HELP[name], metavar="VALUE") for name in own.preprocessing),
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


def mlp_option(command: Command) -> Command:
    """Add ``--mlp-checkpoint``."""
    return click.option(
        "--mlp-checkpoint", type=click.Path(path_type=Path), help="Reconstructed MLPs to use instead of reconstructing them."
    )(command)


def take_requests(options: dict[str, Any]) -> tuple[ModelRequest, DataRequest]:
    """Take the options about model and data out of ``options``."""
    return (
        ModelRequest(
            options.pop("model"),
            _json_object(options.pop("model_args")),
            options.pop("weights"),
            options.pop("weights_folder"),
            options.pop("weights_entry"),
            take_preprocessing(options),
        ),
        take_data(options),
    )


def take_preprocessing(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options about preprocessing out of ``options``. Raises RecipeError."""
    return parse_preprocessing({name: options.pop(name) for name in HELP if name in options})


def take_data(options: dict[str, Any]) -> DataRequest:
    """Take the options about data out of ``options``."""
    return DataRequest(
        options.pop("data"),
        options.pop("calibration_list"),
        options.pop("limit"),
        options.pop("skip_corrupt"),
        options.pop("evaluation", None),
        options.pop("calibration_data", None),
        options.pop("keep_outputs", False),
        options.pop("exif", None),
        options.pop("class_order", None),
    )


def _evaluation_options(own: TaskOptions) -> list[Callable[..., Any]]:
    options = []
    if own.evaluations:
        shown = f"What is measured.  [{own.evaluations[0]}]"
        options.append(click.option("--eval", "evaluation", type=click.Choice(own.evaluations), help=shown))
    if own.calibration_data:
        shown = "Data to calibrate on, where that is not the training part of --data."
        options.append(click.option("--calibration-data", type=click.Path(path_type=Path), help=shown))
    if own.keep_outputs:
        options.append(click.option("--keep-outputs", is_flag=True, help=own.keep_outputs))
    if own.exif:
        choices = click.Choice(["apply", "ignore"])
        options.append(click.option("--exif", type=choices, help=own.exif))
    if own.class_order:
        options.append(click.option("--class-order", metavar="ORDER", help=class_order.HELP))
    return options


def _json_object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"--model-args is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise RecipeError("--model-args must be a JSON object, such as '{\"img_size\": 256}'.")
    return content


def stage_options(own: TaskOptions, command: Command) -> Command:
    """Add what a stage needs that starts from a checkpoint."""
    command = weights_options(command)
    for option in reversed(_run_options(own)):
        command = option(command)
    return command


def weights_options(command: Command) -> Command:
    """Add where the float weights of a checkpoint's model are."""
    for option in reversed(_weights_options("The float weights, if they came from a local file.")):
        command = option(command)
    return command


def _weights_options(file: str) -> list[Callable[..., Any]]:
    """Where weights are. ``file`` is the help of ``--weights``."""
    return [
        click.option("--weights", type=click.Path(path_type=Path), help=file),
        click.option(
            "--weights-folder",
            type=click.Path(path_type=Path),
            help="Folder with <model.tag>.safetensors files.",
        ),
        click.option(
            "--weights-entry",
            metavar="NAME",
            help="Entry of the weights file to take, such as state_dict or state_dict_ema.  "
            "[timm's choice: averaged weights first]",
        ),
    ]


def given_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """Recipe fields that the user gave, from the file and the options, the method first."""
    method, file = options.pop("method"), options.pop("recipe_file")
    given = {name: options.pop(name) for name in list(Recipe.model_fields) if name in options}
    content = read_recipe_file(file) if file is not None else {}
    if was_given("method"):
        content["method"] = method
    return content | {name: value for name, value in given.items() if value is not None}
