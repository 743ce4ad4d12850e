"""The options of a task's commands. Those of recipes are made from the recipe's fields."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click

from fimaq_core.errors import RecipeError, suggest
from fimaq_core.recipe import METHODS, Recipe, make_recipe, read_recipe_file
from tasks.common.data import class_order
from tasks.common.preprocessing import HELP, parse_preprocessing
from tasks.common.request import DataRequest, ModelRequest

Option = Callable[..., Any]
_Request = TypeVar("_Request", ModelRequest, DataRequest)

_PATH = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)


@dataclass(frozen=True)
class TaskOptions:
    """What a task's commands offer beside the options that all have.

    Attributes:
        scope: name of the option that says what of a model is quantized; empty for none.
        scopes: its choices, the usual one first.
        evaluations: choices of ``--eval``, the usual one first; empty for none.
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


def with_options(*options: Option) -> Option:
    """Return a decorator that adds the options to a command in this order."""

    def add(command: Option) -> Option:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def recipe_options(own: TaskOptions) -> list[Option]:
    """``--method``, ``--recipe`` and an option for every other recipe field."""
    found = [
        click.option(
            "--method",
            default="fimaq",
            show_default=True,
            help=f"Method: {', '.join(['fp', *METHODS])}.",
        ),
        click.option(
            "--recipe",
            "recipe_file",
            type=_PATH,
            help="YAML file with recipe fields ('field: value' lines); options win over it.",
        ),
    ]
    if own.scope:
        shown = f"What is quantized; the rest stays in full precision.  [{own.scopes[0]}]"
        found.append(
            click.option(f"--{own.scope}", "scope", type=click.Choice(own.scopes), help=shown)
        )
    for name, field in Recipe.model_fields.items():
        if name in ("method", "scope"):
            continue
        extra, flag = field.json_schema_extra, name.replace("_", "-")
        default = "as a_bits" if field.default is None else field.default
        found.append(
            click.option(
                f"--{flag}/--no-{flag}" if field.annotation is bool else f"--{flag}",
                name,
                cls=_RecipeOption,
                group=_GROUPS[str(extra["group"])] if isinstance(extra, dict) else "Options",
                type=_click_type(field.annotation),
                default=None,
                help=f"{field.description}  [fimaq: {default}]",
            )
        )
    return found


def _click_type(annotation: Any) -> Any:
    if get_origin(annotation) is Literal:
        return click.Choice([str(choice) for choice in get_args(annotation)])
    if annotation in (int, float, bool, str):
        return annotation
    return next(part for part in get_args(annotation) if part is not type(None))


def model_options(own: TaskOptions) -> list[Option]:
    """What says which model, which data, and how to run."""
    file = "Local checkpoint: safetensors, or a file of torch.save (.pth, .pt, .bin, .ckpt, .tar), read weights-only."
    named = "Short name, demo name or the library's own 'model.tag'; see 'models'."
    arguments = "JSON object of arguments for the model's constructor."
    return [
        click.option("--model", "name", required=True, help=named),
        click.option("--model-args", default="{}", callback=_json_object, help=arguments),
        *weights_options(file),
        *run_options(own),
    ]


def weights_options(
    file: str = "The float weights, if they came from a local file.",
) -> list[Option]:
    """Where the float weights are; ``file`` is the help of ``--weights``."""
    entry = "Entry of the weights file to take, such as state_dict or state_dict_ema.  [timm's choice: averaged weights first]"
    return [
        click.option("--weights", type=_PATH, help=file),
        click.option(
            "--weights-folder", type=_PATH, help="Folder with <model.tag>.safetensors files."
        ),
        click.option("--weights-entry", metavar="NAME", help=entry),
    ]


def run_options(own: TaskOptions) -> list[Option]:
    """Which data, and how to run."""
    images = "Image paths, one a line, or a result record to take the images of."
    limit = "Evaluate on the first so many samples only (recorded as such)."
    corrupt = "Leave damaged images out and name them in the record."
    engines = click.Choice(["auto", "eager", "fused", "compiled", "graph"])
    steps = "How optimisation steps run; auto: one CUDA graph, compiled for long runs on CPUs, else fused."
    return [
        click.option("--data", "path", type=_PATH, help=own.data),
        *_evaluation_options(own),
        *(
            click.option(f"--{name.replace('_', '-')}", name, help=HELP[name], metavar="VALUE")
            for name in own.preprocessing
        ),
        click.option("--calibration-list", type=_PATH, help=images),
        click.option("--limit", type=_POSITIVE, help=limit),
        click.option("--skip-corrupt", is_flag=True, help=corrupt),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
        click.option("--threads", type=_POSITIVE, help="CPU threads."),
        click.option(
            "--eval-batch",
            default=32,
            show_default=True,
            type=_POSITIVE,
            help="Images a forward pass.",
        ),
        click.option(
            "--workers",
            default=0,
            show_default=True,
            type=click.IntRange(min=0),
            help="Data-loading processes.",
        ),
        click.option(
            "--placement",
            default="device",
            show_default=True,
            type=click.Choice(["device", "host", "disk"]),
            help="Where block inputs are cached.",
        ),
        click.option("--step-engine", default="auto", show_default=True, type=engines, help=steps),
    ]


def _evaluation_options(own: TaskOptions) -> list[Option]:
    options = []
    if own.evaluations:
        shown = f"What is measured.  [{own.evaluations[0]}]"
        options.append(
            click.option("--eval", "evaluation", type=click.Choice(own.evaluations), help=shown)
        )
    if own.calibration_data:
        shown = "Data to calibrate on, where that is not the training part of --data."
        options.append(click.option("--calibration-data", type=_PATH, help=shown))
    if own.keep_outputs:
        options.append(click.option("--keep-outputs", is_flag=True, help=own.keep_outputs))
    if own.exif:
        options.append(
            click.option("--exif", type=click.Choice(["apply", "ignore"]), help=own.exif)
        )
    if own.class_order:
        options.append(click.option("--class-order", metavar="ORDER", help=class_order.HELP))
    return options


#: ``--mlp-checkpoint``.
mlp_option = click.option(
    "--mlp-checkpoint", type=_PATH, help="Reconstructed MLPs to use instead of reconstructing them."
)


def out_option(command: Option) -> Option:
    """Add ``--out``."""
    return click.option(
        "--out", required=True, type=_PATH, help="Checkpoint to write (.safetensors)."
    )(command)


def _json_object(_: click.Context, __: click.Parameter, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"--model-args is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise RecipeError("--model-args must be a JSON object, such as '{\"img_size\": 256}'.")
    return content


def take_recipe(options: dict[str, Any], usual: dict[str, Any]) -> Recipe | None:
    """Take the recipe out of ``options``; None for method ``fp``.

    Args:
        usual: fields that the task sets for every method alike.
    """
    method, content = options["method"], given_recipe(options)
    if method == "fp":
        return None
    method = content.pop("method", method)
    if method not in METHODS:
        raise RecipeError(f"Unknown method '{method}'.{suggest(method, ['fp', *METHODS])}")
    return make_recipe(method, usual, content)


def given_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """Take out of ``options`` the recipe fields that the user gave, options before the file's."""
    method, file = options.pop("method"), options.pop("recipe_file")
    given = {name: options.pop(name) for name in list(Recipe.model_fields) if name in options}
    source = click.get_current_context().get_parameter_source("method")
    if source is not None and source.name != "DEFAULT":
        given["method"] = method
    content = read_recipe_file(file) if file is not None and method != "fp" else {}
    return content | {name: value for name, value in given.items() if value is not None}


def take(kind: type[_Request], options: dict[str, Any]) -> _Request:
    """Take the options that are fields of ``kind`` out of ``options``."""
    return kind(
        **{field.name: options.pop(field.name) for field in fields(kind) if field.name in options}
    )


def with_preprocessing(options: dict[str, Any]) -> dict[str, Any]:
    """Gather the options about preprocessing into one, ``preprocessing``. Raises RecipeError."""
    options["preprocessing"] = parse_preprocessing(
        {name: options.pop(name) for name in HELP if name in options}
    )
    return options
