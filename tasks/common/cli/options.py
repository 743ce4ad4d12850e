"""Options of a task's commands. Recipe options are made from the fields of :class:`Recipe`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from fimaq_core.bits_map import read_bits_map
from fimaq_core.documents import parse_json, shown
from fimaq_core.errors import RecipeError, suggest
from fimaq_core.methods import BUDGETS
from fimaq_core.recipe import METHODS, Recipe, make_recipe, read_recipe_file
from fimaq_core.resources import EngineChoice, Placement
from tasks.common.cli import numbers
from tasks.common.data import class_order, elsewhere
from tasks.common.preprocessing import HELP, parse_preprocessing
from tasks.common.registry import defaults
from tasks.common.request import CellRequest, DataRequest, ModelRequest

Option = Callable[..., Any]

PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class TaskOptions:
    """Options that only some tasks have. An empty text or tuple adds no option."""

    scope: str = ""  # name of the option for the recipe's scope
    scopes: tuple[str, ...] = ()  # its choices, the default first
    evaluations: tuple[str, ...] = ()  # choices of --eval, the default first
    calibration_data: bool = False  # True adds --calibration-data
    elsewhere: bool = False  # True adds --dataset and --corrupt
    keep_outputs: str = ""  # help of --keep-outputs
    exif: str = ""  # help of --exif
    data: str = "Data folder with train/ and val/ (demo models bring their own data)."
    heads: tuple[str, ...] = ()  # choices of --head
    class_order: bool = True  # True adds --class-order, for tasks whose classes are folders
    towers: tuple[str, ...] = ()  # choices of --tower of exports
    preprocessing: tuple[str, ...] = tuple(HELP)  # fields of preprocessing that can be given


class GroupedCommand(click.Command):
    """A command whose help lists recipe options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            entry = parameter.get_help_record(ctx)
            if entry is not None:
                field = Recipe.model_fields.get(parameter.name or "")
                group = "Options"
                if field is not None and parameter.name not in ("method", "scope"):
                    group = f"Recipe ({field.json_schema_extra['group']})"
                sections.setdefault(group, []).append(entry)
        for heading, entries in sections.items():
            with formatter.section(heading):
                formatter.write_dl(entries)


def _joined(*options: Option) -> Option:
    """Return one decorator that adds all options to a command, in this order."""

    def add(command: Option) -> Option:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def recipe(own: TaskOptions) -> Option:
    """Add ``--method``, ``--recipe``, ``--budget`` and one option per other field of a recipe."""
    methods = f"Method: {', '.join(['fp', *METHODS])}."
    file = "YAML file with recipe fields ('field: value' lines). Options have priority."
    budget = "Steps and rates: 500 or 2,000 steps per block, or the method's own; options win."
    return _joined(
        click.option("--method", default="fimaq", help=methods),
        click.option("--recipe", "recipe_file", type=PATH, help=file),
        click.option("--budget", type=click.Choice(list(BUDGETS)), help=budget),
        *_choice(own.scope, "scope", own.scopes, "Quantized part; the rest keeps full precision."),
        *(_recipe_option(name) for name in Recipe.model_fields if name not in ("method", "scope")),
    )


def finishing() -> Option:
    """Add the options for the recipe's fields of joint finishing."""
    names = (name for name in Recipe.model_fields if name.startswith("finish_"))
    return _joined(*map(_recipe_option, names))


def _recipe_option(name: str) -> Option:
    field, flag = Recipe.model_fields[name], name.replace("_", "-")
    if name == "bits_map":
        text = "YAML file with bits of single layers, as the command sensitivity writes it."
        return click.option("--bits-map", metavar="FILE", callback=_bits_map, help=text)
    unset = "as a_bits" if name.endswith("_bits") else "not given"
    default = unset if field.default is None else field.default
    text = f"{field.description}  [fimaq: {default}]"
    names, kind = f"--{flag}", field.annotation
    if kind is bool:
        names = f"--{flag}/--no-{flag}"
    elif get_origin(kind) is Literal:
        kind = click.Choice([str(choice) for choice in get_args(kind)])
    elif get_args(kind):  # such as int | None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if kind in (int, float):
        kind = numbers.of_field(field, kind)
    return click.option(names, name, type=kind, default=None, help=text)


def _choice(flag: str, name: str, choices: tuple[str, ...], text: str) -> Iterator[Option]:
    if flag and choices:
        text = f"{text}  [{choices[0]}]"
        yield click.option(f"--{flag}", name, type=click.Choice(choices), help=text)


def model(own: TaskOptions) -> Option:
    """Add the options for the model, its weights, the data and the run."""
    named = "Short name, demo name or the library's 'model.tag'; see the command 'models'."
    head = (
        "Leave the model's classifier out and classify its features: by the 20 nearest images of "
    )
    head += "the training part, or by a linear classifier trained on them."
    heads = [click.option("--head", type=click.Choice(own.heads), help=head)] if own.heads else []
    name = click.option("--model", "name", required=True, help=named)
    return _joined(name, *heads, named_model(own))


def named_model(own: TaskOptions) -> Option:
    """Add the options of :func:`model` without its name."""
    file = "Local file: safetensors, or of torch.save (.pth, .pt, .bin, .ckpt, .tar), weights only."
    arguments = "JSON object of arguments for the model's constructor."
    return _joined(
        click.option("--model-args", default="{}", callback=_json_object, help=arguments),
        weights(file),
        run(own),
    )


def sensitivity() -> Option:
    """Add the options of a measurement of single layers, and of the bits that it suggests."""
    mean = "Suggest bits of single layers: mean of weights (by number) and of inputs (by values)."
    bops = "Suggest bits of single layers: bit operations as a share of those of the recipe's bits."
    return _joined(
        click.option("--images", default=64, type=numbers.COUNT, help="Calibration images."),
        click.option("--mean-bits", type=numbers.FiniteRange(2, 8), help=mean),
        click.option("--bops", type=numbers.FiniteRange(0, 1e3, min_open=True), help=bops),
        click.option(
            "--widths", default="3,4,5,6", callback=_widths, help="Bits to choose from, 2 to 8."
        ),
        click.option("--json", "as_json", type=PATH, help="JSON file to write."),
        click.option("--write-bits-map", type=PATH, help="File to write for --bits-map (YAML)."),
    )


def weights(file: str = "The float weights, if they came from a local file.") -> Option:
    """Add the options for the float weights; ``file`` is the help of ``--weights``."""
    folder = "Folder with <model.tag>.safetensors files."
    entry = "Entry of the weights file, such as state_dict.  [averaged weights first, as in timm]"
    return _joined(
        click.option("--weights", type=PATH, help=file),
        click.option("--weights-folder", type=PATH, help=folder),
        click.option("--weights-entry", metavar="NAME", help=entry),
    )


def data(own: TaskOptions) -> Option:
    """Add the options for the data, and for the threads that work on them."""
    images = "File of image paths, one per line, or a result record with calibration images."
    corrupt = "Leave damaged images out, and name them in the record."
    return _joined(
        click.option("--data", "path", type=PATH, help=own.data),
        *_data_options(own),
        click.option("--calibration-list", type=PATH, help=images),
        click.option("--skip-corrupt", is_flag=True, help=corrupt),
        click.option("--threads", type=numbers.THREADS, help="CPU threads."),
    )


def run(own: TaskOptions) -> Option:
    """Add the options for the data and the run."""
    limit = "Evaluate only the first samples, up to this number; the record says so."
    places, engines = click.Choice(get_args(Placement)), click.Choice(get_args(EngineChoice))
    batch, workers = "Images per forward pass.", "Data-loading processes."
    steps = "Step engine; auto: graph on CUDA, compiled for long runs on CPUs, else fused."
    return _joined(
        data(own),
        click.option("--limit", type=numbers.COUNT, help=limit),
        click.option("--device", default="cpu", help="cpu, cuda or cuda:N."),
        click.option("--eval-batch", default=32, type=numbers.COUNT, help=batch),
        click.option("--workers", default=0, type=numbers.PROCESSES, help=workers),
        click.option("--placement", default="device", type=places, help="Place of block inputs."),
        click.option("--step-engine", default="auto", type=engines, help=steps),
    )


def _data_options(own: TaskOptions) -> Iterator[Option]:
    """Yield the options for the data that only some tasks have."""
    yield from _choice("eval", "evaluation", own.evaluations, "Kind of measurement.")
    if own.calibration_data:
        text = "Data to calibrate on, if not the training part of --data."
        yield click.option("--calibration-data", type=PATH, help=text)
    if own.elsewhere:
        name = "NAME[=FOLDER]"
        yield click.option("--dataset", metavar=name, help=elsewhere.DATASET_HELP)
        yield click.option("--corrupt", metavar="NAME:SEVERITY", help=elsewhere.CORRUPT_HELP)
    if own.keep_outputs:
        yield click.option("--keep-outputs", is_flag=True, help=own.keep_outputs)
    if own.exif:
        yield click.option("--exif", type=click.Choice(["apply", "ignore"]), help=own.exif)
    if own.class_order:
        yield click.option("--class-order", metavar="ORDER", help=class_order.HELP)
    for name in own.preprocessing:
        flag = f"--{name.replace('_', '-')}"
        yield click.option(flag, name, help=HELP[name], metavar="VALUE")


def export(own: TaskOptions) -> Option:
    """Add the options for the form of an exported file, and for its check."""
    packed = "Store weights of 2 to 4 bits in 2 to 4 bits; they are unpacked on loading."
    signed = "Make int8 activations with zero points of 0, for engines that want them."
    normalise = "Put the normalisation into the file, which then takes uint8 images (n, H, W, C)."
    samples = "Largest number of calibration images for the check."
    towers = [
        click.option("--tower", "part", type=click.Choice(own.towers), help="Tower to export.")
    ]
    return _joined(
        click.option("--out", required=True, type=PATH, help="ONNX file to write."),
        *(towers if own.towers else ()),
        click.option("--packed", is_flag=True, help=packed),
        click.option("--signed", is_flag=True, help=signed),
        click.option("--with-preprocessing", is_flag=True, help=normalise),
        click.option("--check-samples", "samples", default=64, type=numbers.COUNT, help=samples),
        click.option(
            "--speed/--no-speed",
            default=True,
            help="Compare size and time with the float32 export.",
        ),
    )


mlp_checkpoint = click.option("--mlp-checkpoint", type=PATH, help="Reconstructed MLPs to use.")
out = click.option("--out", required=True, type=PATH, help="Checkpoint to write (.safetensors).")


def _bits_map(_: click.Context, __: click.Parameter, path: str | None) -> dict[str, Any] | None:
    return None if path is None else read_bits_map(Path(path))


def _widths(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not set(parts) <= set("2345678"):
        raise RecipeError(f"--widths is {shown(text)}: give bits from 2 to 8, such as 3,4,6.")
    return tuple(map(int, parts))


def _json_object(_: click.Context, __: click.Parameter, text: str) -> dict[str, Any]:
    content = parse_json(text, "--model-args", RecipeError)
    if not isinstance(content, dict):
        raise RecipeError("--model-args must be a JSON object, such as '{\"img_size\": 256}'.")
    return content


def take_recipe(task: str, options: dict[str, Any]) -> Recipe | None:
    """Remove the recipe options from ``options`` and return their recipe; None for ``fp``."""
    method, content = options["method"], given_recipe(options)
    if method == "fp":
        return None
    method = content.pop("method", method)
    if method not in METHODS:
        raise RecipeError(f"Unknown method '{method}'.{suggest(method, ['fp', *METHODS])}")
    return make_recipe(method, defaults(task), content)


def given_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the recipe options and return the given fields; options override the recipe file."""
    method, file = options.pop("method"), options.pop("recipe_file")
    given = given_fields(options)
    source = click.get_current_context().get_parameter_source("method")
    if source is not None and source.name != "DEFAULT":
        given["method"] = method
    content = read_recipe_file(file) if file is not None and method != "fp" else {}
    return content | given


def given_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Remove the options of recipe fields, and the budget; return those that are given."""
    names = [name for name in ("budget", *Recipe.model_fields) if name in options]
    found = {name: options.pop(name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def cell_request(task: str, options: dict[str, Any], recipe: Recipe | None = None) -> CellRequest:
    """Return the request of a command, made of all its ``options``. Raises RecipeError."""
    given = {name: options.pop(name) for name in HELP if name in options}
    options["preprocessing"] = parse_preprocessing(given)
    parts = []
    for kind in (ModelRequest, DataRequest):
        names = [field.name for field in fields(kind) if field.name in options]
        parts.append(kind(**{name: options.pop(name) for name in names}))
    return CellRequest(task, *parts, recipe, **options)
