"""What data sets in files have in common: UTF-8 text, JSON, and names of images that must be there."""

import json
import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Sequence
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


def image_id(name: object, where: str, root: Path | None = None) -> str:
    """Id of an image: its path below the data's folder, with slashes. Raises DataError.

    Absolute paths are taken where ``root``, that folder, is given.
    """
    given = name
    if root is not None and isinstance(name, str) and name.startswith("/"):
        name = id_below(posixpath.normpath(name), root)
    # Plain string work: a path object for each of MS-COCO's images takes seconds.
    path = posixpath.normpath(name) if isinstance(name, str) else "."
    if path == "." or path.startswith("/") or ".." in str(given).split("/"):
        raise DataError(
            f"{where}: {given!r} is not the path of an image below the folder of the data."
        )
    return path


def composed(name: str) -> str:
    """Name in Unicode's composed form (NFC): systems store accents in several forms."""
    return unicodedata.normalize("NFC", name)


#: Names, in lower case, of files and folders that systems and tools leave among data.
_LEFTOVERS = {
    *("__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin"),
    *("system volume information", "@eadir", "lost+found", "__pycache__"),
}


def is_hidden(name: str) -> bool:
    """True for files and folders that are no data: ``.DS_Store``, ``._x.jpg``, ``Thumbs.db`` ..."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


class FilesBelow:
    """Files below a folder, found by name: as it is, else in another Unicode form (NFC, NFD).

    Each folder is listed once: asking for every file takes minutes on network storage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._real: dict[str, str | None] = {"": ""}
        self._listings: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str) -> str | None:
        """Path below the folder, with slashes, of the file ``name``; None where it is not there.

        Raises:
            DataError: only other Unicode forms of the name are there, and several of them.
        """
        parent, _, own = name.rpartition("/")
        if parent not in self._real:
            self._real[parent] = self.find(parent)
        place = self._real[parent]
        if place is None:
            return None
        candidates = self._listing(place).get(composed(own), [])
        if own not in candidates and len(candidates) > 1:
            files = f"{len(candidates)} files whose name is {own!r} in other Unicode forms"
            raise DataError(f"{self.folder / place} holds {files}: rename all but one.")
        if not candidates:
            return None
        found = own if own in candidates else candidates[0]
        return f"{place}/{found}" if place else found

    def _listing(self, place: str) -> dict[str, list[str]]:
        if place not in self._listings:
            names = self._listings[place] = {}
            try:
                for entry in os.listdir(self.folder / place):
                    names.setdefault(composed(entry), []).append(entry)
            except OSError:
                pass
        return self._listings[place]


def file_below(root: Path, name: str) -> Path:
    """File ``name`` below ``root``, also in another Unicode form, whether it is there or not."""
    path = root / name
    return path if os.path.isfile(path) else root / (FilesBelow(root).find(name) or name)


def found_files(folder: Path, images: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Files of ``images`` (paths below ``folder`` with slashes), and the names without a file.

    Raises:
        DataError: two names lead to one file, or a name leads to several.
    """
    below = FilesBelow(folder)
    names: dict[str, str] = {}
    paths, absent = [], []
    for image in images:
        found = below.find(image)
        if found is None:
            absent.append(image)
        elif names.setdefault(found, image) != image:
            pair = f"{names[found]!r} and {image!r}, the same name in two Unicode forms"
            raise DataError(f"{pair}, both lead to {folder / found}: list the image once.")
        else:
            paths.append(folder / found)
    return paths, absent


def id_below(name: str, root: Path | None) -> str:
    """Id behind a line of a list: a path below the data's folder is the image's id there."""
    path = Path(name)
    if root is None or not path.is_absolute():
        return name
    bases = (base for base in (root.absolute(), root.resolve()) if path.is_relative_to(base))
    return next((path.relative_to(base).as_posix() for base in bases), name)


def counted(count: int, what: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def named(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
