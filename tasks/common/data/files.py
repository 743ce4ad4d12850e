"""Files of data sets: UTF-8 text, JSON, ids of images, and search of files by name."""

import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fimaq_core import documents
from fimaq_core.errors import DataError

#: Bound on the size of a data file in bytes. The largest of COCO 2017 has 450 million.
MOST_BYTES = 2**31

#: Files and folders, in lower case, that operating systems and tools create among data.
_LEFTOVERS = {
    "__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin",
    "system volume information", "@eadir", "lost+found", "__pycache__",
}  # fmt: skip


def state_of(path: Path) -> tuple[int, int]:
    """Return (time in ns, size) of a file; they differ after a change. Raises DataError."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    return state.st_mtime_ns, state.st_size


def read_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Return UTF-8 text without byte order mark and with its own line ends. Raises DataError."""
    return documents.read_text(path, DataError, most_bytes=most_bytes)


def parse_json(text: str, where: str, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return the content of JSON text; ``hook`` is applied to each object. Raises DataError."""
    return documents.parse_json(text, where, DataError, hook)


def image_id(name: object, where: str, root: Path | None = None) -> str:
    """Return the id of the image ``name``: its path below the data folder, with slashes.

    An absolute path needs ``root``, the data folder. ``where`` is the place of the name in a file.
    Raises DataError: the name is no path below the data folder.
    """
    given = name
    if root is not None and isinstance(name, str) and name.startswith("/"):
        name = id_below(posixpath.normpath(name), root)
    # Names stay text: Path objects for all images of MS-COCO would take seconds.
    path = posixpath.normpath(name) if isinstance(name, str) else "."
    if path == "." or path.startswith("/") or ".." in str(given).split("/"):
        wanted = "is not the path of an image below the folder of the data"
        raise DataError(f"{where}: {given!r} {wanted}.")
    return path


def composed(name: str) -> str:
    """Return ``name`` in composed Unicode form (NFC), since file systems use several forms."""
    return unicodedata.normalize("NFC", name)


def is_hidden(name: str) -> bool:
    """Return True for files and folders that are no data, such as ``Thumbs.db``."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


class FilesBelow:
    """Search of files below a folder by name, in any Unicode form; the given form comes first.

    Each folder is listed once, since a test of every file would take minutes on network storage.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Path below the folder as stored, by the name that was searched; None if there is none.
        self._found: dict[str, str | None] = {"": ""}
        #: Stored names in each listed folder, by composed name.
        self._listings: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str) -> str | None:
        """Return the path of the file ``name`` below the folder, with slashes, or None.

        Raises DataError: several files have this name, all in other Unicode forms.
        """
        parent, _, own = name.rpartition("/")
        if parent not in self._found:
            self._found[parent] = self.find(parent)
        place = self._found[parent]
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
            with suppress(OSError):
                for entry in os.listdir(self.folder / place):
                    names.setdefault(composed(entry), []).append(entry)
        return self._listings[place]


def file_below(root: Path, name: str) -> Path:
    """Return the path of the file ``name`` below ``root``; the file may be missing."""
    path = root / name
    return path if os.path.isfile(path) else root / (FilesBelow(root).find(name) or name)


def found_files(folder: Path, images: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Return the files of ``images`` (paths below ``folder``), and the names without a file.

    Raises DataError: two names lead to one file, or one name leads to several files.
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
    """Return the id of an image in a list; an absolute path below ``root`` becomes relative."""
    path = Path(name)
    if root is None or not path.is_absolute():
        return name
    bases = (base for base in (root.absolute(), root.resolve()) if path.is_relative_to(base))
    return next((path.relative_to(base).as_posix() for base in bases), name)


def counted(count: int, what: str) -> str:
    """Return a count with its noun: ``1 image``, ``2 images``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def named(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
