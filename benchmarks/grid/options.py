"""Options that several commands share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.grid.cell import Adapter, Places, default_adapter


def profile_option(command: Any) -> Any:
    """``--profile``."""
    words = "quickstart, demo, paper, ablation, paper-ablation, or a .yaml file."
    return click.option("--profile", default="quickstart", show_default=True, help=words)(command)


def results_option(command: Any) -> Any:
    """``--results``."""
    path, words = click.Path(path_type=Path), "Folder of runs and tables."
    option = click.option("--results", type=path, default="results", show_default=True, help=words)
    return option(command)


def text_options(texts: Mapping[str, str], metavar: str | None = None) -> Callable[[Any], Any]:
    """Options of text, empty by default, with their help."""

    def add(command: Any) -> Any:
        for name, words in reversed(texts.items()):
            command = click.option(f"--{name}", default="", metavar=metavar, help=words)(command)
        return command

    return add


#: ``--imagenet``, ``--coco`` and ``--flickr``, as :class:`~benchmarks.grid.cell.Places` takes them.
places_options = text_options(
    {
        "imagenet": "ImageNet-1k folder that holds val/ and train/.",
        "coco": "COCO folder that holds dataset_coco.json, train2014/ and val2014/ (captions), or "
        "annotations/, train2017/ and val2017/ (detection), or all of them.",
        "flickr": "Flickr30k folder that holds dataset_flickr30k.json and the images.",
    },
    "PATH",
)


def adapter() -> Adapter:
    """The adapter that a command uses: the real one, but in tests."""
    found = click.get_current_context().obj
    return found if isinstance(found, Adapter) else default_adapter()


def folder(text: str) -> Path | None:
    """A folder that was given as text; None for none."""
    return Path(text).expanduser() if text else None


def places(texts: Mapping[str, str]) -> Places:
    """Return the folders that :data:`places_options` were given."""
    return Places(**{name: folder(text) for name, text in texts.items()})
