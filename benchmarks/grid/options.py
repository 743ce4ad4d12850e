"""Command line options that several commands share."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.grid.cell import Adapter, Places, RunOptions, default_adapter

_PROFILE = "quickstart, demo, paper, ablation, paper-ablation, or a .yaml file."
_FOLDERS = {
    "imagenet": "ImageNet-1k folder with val/ and train/.",
    "coco": "COCO folder with dataset_coco.json, train2014/ and val2014/ (captions), or "
    "annotations/, train2017/ and val2017/ (detection), or all of them.",
    "flickr": "Flickr30k folder with dataset_flickr30k.json and the images.",
    "weights": "Folder with checkpoints named <model.tag>.safetensors, .pth or .bin.",
}

profile_option = click.option("--profile", default="quickstart", show_default=True, help=_PROFILE)
results_option = click.option(
    "--results", type=click.Path(path_type=Path), default="results", show_default=True,
    help="Folder of runs and tables.",
)  # fmt: skip


def collected(name: str, make: Callable[..., Any], *options: Callable[[Any], Any]) -> Any:
    """Return a decorator that adds click options, whose values the command gets as one argument.

    Example:
        >>> @click.command()
        ... @collected("size", Size, click.option("--width"), click.option("--height"))
        ... def draw(size: Size) -> None: ...  # size = Size(width=..., height=...)
    """

    def add(command: Any) -> Any:
        return functools.reduce(lambda result, option: option(result), reversed(options), command)

    def names() -> None:
        """Carry the options, so that click tells their names."""

    own = [option.name for option in add(names).__click_params__]

    def decorate(command: Callable[..., Any]) -> Any:
        @functools.wraps(command)
        def collect(**values: Any) -> Any:
            made = make(**{key: values.pop(key) for key in own})
            return command(**values, **{name: made})

        return add(collect)

    return decorate


def _folder(_: click.Context, __: click.Parameter, text: str | None) -> Path | None:
    return Path(text).expanduser() if text else None


#: ``--imagenet``, ``--coco``, ``--flickr``, ``--weights`` and ``--results`` as `RunOptions`.
folder_options = collected(
    "options",
    lambda results, weights, **places: RunOptions(results, Places(**places), weights),
    *(
        click.option(f"--{name}", metavar="PATH", callback=_folder, help=words)
        for name, words in _FOLDERS.items()
    ),
    results_option,
)


def adapter() -> Adapter:
    """Return the adapter of the running command; tests put in their own."""
    found = click.get_current_context().obj
    return found if isinstance(found, Adapter) else default_adapter()
