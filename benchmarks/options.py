"""Options that several commands share."""

from pathlib import Path
from typing import Any

import click

from benchmarks.cells import Adapter, default_adapter


def profile_option(command: Any) -> Any:
    """``--profile``."""
    words = "quickstart, demo, paper, ablation, paper-ablation, or a .yaml file."
    return click.option("--profile", default="quickstart", show_default=True, help=words)(command)


def results_option(command: Any) -> Any:
    """``--results``."""
    return click.option(
        "--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True,
        help="Folder of runs and tables.",
    )(command)  # fmt: skip


def places_options(command: Any) -> Any:
    """``--imagenet``, ``--coco`` and ``--flickr``, as :class:`~benchmarks.cells.Places` takes them."""
    for name, words in (
        ("--flickr", "Flickr30k folder that holds dataset_flickr30k.json and the images."),
        (
            "--coco",
            "COCO folder that holds dataset_coco.json, train2014/ and val2014/ (captions), or annotations/, train2017/ "
            "and val2017/ (detection), or all of them.",
        ),
        ("--imagenet", "ImageNet-1k folder that holds val/ and train/."),
    ):
        command = click.option(name, default="", metavar="PATH", help=words)(command)
    return command


def adapter() -> Adapter:
    """The adapter that a command uses: the real one, but in tests."""
    found = click.get_current_context().obj
    return found if isinstance(found, Adapter) else default_adapter()


def folder(text: str) -> Path | None:
    """A folder that was given as text; None for none."""
    return Path(text).expanduser() if text else None
