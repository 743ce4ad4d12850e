"""What caption files have in common: UTF-8 text, JSON, and names of images that must be there."""

import json
import os
import posixpath
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fimaq_core.errors import DataError
from tasks.common.images import file_reader
from tasks.retrieval.pairs import PairSource

#: Parts of a data set that a run uses.
PARTS = ("train", "test")
#: Splits that a caption file may name; of restval and val nothing is used.
SPLITS = ("train", "restval", "val", "test")


def state_of(path: Path) -> tuple[int, int]:
    """Time of change (ns) and size of a file: while they stay, what was read of it does. Raises DataError."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    return state.st_mtime_ns, state.st_size


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, without a byte order mark; line ends as they are. Raises DataError."""
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte {error.start} (counted from 0) is 0x{error.object[error.start]:02x}."
        ) from error


def parse_json(text: str, where: str, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Content of JSON text. Raises DataError."""
    try:
        return json.loads(text, object_hook=hook)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}.") from error


def image_id(name: object, where: str) -> str:
    """Id of an image: its path below the data's folder, with slashes. Raises DataError."""
    # Plain string work: a path object for each of MS-COCO's images takes seconds.
    path = posixpath.normpath(name) if isinstance(name, str) else "."
    if path == "." or path.startswith("/") or ".." in str(name).split("/"):
        raise DataError(f"{where}: {name!r} is not the path of an image below the folder of the data.")
    return path


def check_split(split: object, where: str) -> str:
    """The split, if it is one of the known. Raises DataError."""
    if split not in SPLITS:
        raise DataError(f"{where}: there is no split {split!r}; known are {', '.join(SPLITS)}.")
    return str(split)


def file_pairs(
    name: str, split: str, folder: Path, listed: Sequence[tuple[str, Sequence[str]]], captions_file: Path
) -> PairSource:
    """Pairs whose image ids are paths below ``folder``.

    Args:
        listed: (image id, its captions) in order.
        captions_file: where they come from.

    Raises:
        DataError: an image that is not there, or what :class:`PairSource` refuses.
    """
    # One listing a folder: asking for every file takes minutes on network storage.
    names: dict[str, set[str]] = {}
    absent = []
    for image, _ in listed:
        parent, _, file = image.rpartition("/")
        if parent not in names:
            try:
                names[parent] = set(os.listdir(folder / parent))
            except OSError:
                names[parent] = set()
        if file not in names[parent]:
            absent.append(image)
    if absent:
        raise DataError(
            f"{captions_file} names {len(absent)} images of the split {split!r} that are not in {folder}, such as {absent[0]!r}."
        )
    return PairSource.of(name, split, listed, file_reader([folder / image for image, _ in listed]))
