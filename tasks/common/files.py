"""What data sets in files have in common: UTF-8 text, JSON, and names of images that must be there."""

import json
import os
import posixpath
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fimaq_core.errors import DataError


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


def absent_files(folder: Path, images: Iterable[str]) -> list[str]:
    """Those of ``images`` (paths below ``folder`` with slashes) that are not there."""
    # One listing a folder: asking for every file takes minutes on network storage.
    names: dict[str, set[str]] = {}
    absent = []
    for image in images:
        parent, _, file = image.rpartition("/")
        if parent not in names:
            try:
                names[parent] = set(os.listdir(folder / parent))
            except OSError:
                names[parent] = set()
        if file not in names[parent]:
            absent.append(image)
    return absent


def id_below(name: str, root: Path | None) -> str:
    """Id behind a line of a list: a path below the data's folder is the image's id there."""
    path = Path(name)
    if root is None or not path.is_absolute():
        return name
    return path.relative_to(root.absolute()).as_posix() if path.is_relative_to(root.absolute()) else name
