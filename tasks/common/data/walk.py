"""Search of the files in class folders: each file once, also where links lead in circles."""

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fimaq_core.errors import DataError
from tasks.common.data.files import is_hidden


class Found(NamedTuple):
    """Files below class folders; hidden files and folders are passed over."""

    samples: list[tuple[str, int]]  # path and label, by class name, folder and file name
    others: list[str]  # paths of files that are no images, and of pipes, sockets and devices
    repeated: list[str]  # paths of links to files and folders that were found before


class _Entry(NamedTuple):
    label: str  # name of the class
    place: str  # the folder
    name: str

    @property
    def path(self) -> str:
        return os.path.join(self.place, self.name)


def files_by_class(folder: Path, classes: Sequence[str], is_image: Callable[[str], bool]) -> Found:
    """Find the images below the class folders, each once.

    Links are followed, also out of ``folder``. Of several links to a file the first counts, and
    none if the file itself is there. A link to ``folder`` or around it is a repeated one. A link to
    nothing counts if ``is_image`` says so, and fails when it is read.

    Args:
        folder: the part of a data set, such as ``val``.
        classes: names of the class folders by label.
        is_image: function of the path of a file, or of a link to nothing.

    Raises:
        DataError: a folder cannot be read.
    """
    real = os.path.realpath(folder)
    seen = {real, *map(str, Path(real).parents)}
    roots = [_Entry(name, os.fspath(folder), name) for name in sorted(classes)]
    # Folders wait on the left and links to folders on the right: a folder comes before its links.
    waiting = deque(sorted(roots, key=lambda one: os.path.islink(one.path)))
    files: list[_Entry] = []
    links: list[_Entry] = []
    others, repeated = [], []
    while waiting:
        parent = waiting.popleft()
        if (real := os.path.realpath(parent.path)) in seen:
            repeated.append(parent.path)
            continue
        seen.add(real)
        for entry, kind, is_link in _entries(parent):
            if kind == stat.S_IFDIR:
                (waiting.append if is_link else waiting.appendleft)(entry)
            elif kind not in (stat.S_IFREG, None) or not is_image(entry.path):
                others.append(entry.path)
            else:
                (links if is_link else files).append(entry)
    if links:
        folders = {place: os.path.realpath(place) for _, place, _ in files}
        known = {os.path.join(folders[place], name) for _, place, name in files}
        for entry in sorted(links):
            real = os.path.realpath(entry.path)
            if real in known:
                repeated.append(entry.path)
            else:
                files.append(entry)
            known.add(real)
    labels = {name: label for label, name in enumerate(classes)}
    samples = [(entry.path, labels[entry.label]) for entry in sorted(files)]
    return Found(samples, sorted(others), sorted(repeated))


def _entries(parent: _Entry) -> Iterator[tuple[_Entry, int | None, bool]]:
    """List a folder: entry, kind (a link has that of its target, or None), and whether it links."""
    try:
        with os.scandir(parent.path) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if is_hidden(entry.name):
                    continue
                kind = None
                if not (is_link := entry.is_symlink()) and entry.is_file():
                    kind = stat.S_IFREG  # known without another question to the disk
                else:
                    with suppress(OSError):
                        kind = stat.S_IFMT(os.stat(entry.path).st_mode)
                yield _Entry(parent.label, parent.path, entry.name), kind, is_link
    except OSError as error:
        raise DataError(f"Cannot read the folder {parent.path}: {error.strerror}.") from error
