"""Command line options that several commands share."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.grid.cell import Adapter, Places, RunOptions, default_adapter
from benchmarks.grid.datasets import HELP

_FOLDERS = {
    "imagenet": "ImageNet-1k folder with val/ and train/.",
    "coco": "COCO folder with dataset_coco.json, train2014/ and val2014/ (captions), or "
    "annotations/, train2017/ and val2017/ (detection), or all of them.",
    "flickr": "Flickr30k folder with dataset_flickr30k.json and the images.",
    "weights": "Folder with checkpoints named <model.tag>.safetensors, .pth or .bin.",
}

_RESULTS: dict[str, Any] = {"default": "results", "show_default": True}
_RESULTS |= {"type": click.Path(path_type=Path), "help": "Folder of runs and tables."}
PROFILE: dict[str, Any] = {"default": "quickstart", "show_default": True}
PROFILE["help"] = (
    "quickstart, demo, frontier, paper, ablation, paper-ablation, paper-parts, quantizers, or a "
    ".yaml file."
)
DATASETS: dict[str, Any] = {"default": "", "metavar": "LIST", "help": HELP}
profile_option = click.option("--profile", **PROFILE)
datasets_option = click.option("--datasets", **DATASETS)
results_option = click.option("--results", **_RESULTS)


def collected(
    name: str, make: Callable[..., Any], **options: dict[str, Any]
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that adds click options and passes their values as one argument.

    The command gets ``make(**values)`` as its argument ``name``.

    Example:
        >>> @click.command()
        ... @collected("size", Size, width={"type": int}, height={"type": int})
        ... def draw(size: Size) -> None: ...  # size = Size(width=..., height=...)
    """

    def decorate(command: Callable[..., Any]) -> Any:
        @functools.wraps(command)
        def collect(**values: Any) -> Any:
            made = make(**{key: values.pop(key) for key in options})
            return command(**values, **{name: made})

        for key, settings in reversed(options.items()):
            collect = click.option(f"--{key.replace('_', '-')}", **settings)(collect)
        return collect

    return decorate


def _folder(_: click.Context, __: click.Parameter, text: str | None) -> Path | None:
    return Path(text).expanduser() if text else None


#: ``--imagenet``, ``--coco``, ``--flickr``, ``--weights`` and ``--results`` as `RunOptions`.
folder_options = collected(
    "options",
    lambda results, weights, **places: RunOptions(results, Places(**places), weights),
    **{
        name: {"metavar": "PATH", "callback": _folder, "help": words}
        for name, words in _FOLDERS.items()
    },
    results=_RESULTS,
)


def adapter() -> Adapter:
    """Return the adapter of the running command, which tests can replace."""
    found = click.get_current_context().obj
    return found if isinstance(found, Adapter) else default_adapter()
