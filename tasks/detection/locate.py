"""Image files that annotations name: each found once, and only below the folder of the data."""

import filecmp
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fimaq_core.errors import DataError
from tasks.common.data.files import FilesBelow
from tasks.common.data.images import counted


class Folder(FilesBelow):
    """Files below a folder, by names relative to it or absolute."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        bases = (path.absolute(), path.resolve())
        self._absolute = [f"{base.as_posix().rstrip('/')}/" for base in bases]

    def relative(self, name: str) -> str | None:
        """``name`` relative to the folder; None for an absolute path elsewhere."""
        if not name.startswith("/"):
            return name
        below = (name.removeprefix(base) for base in self._absolute if name.startswith(base))
        return next(below, None)


def image_folders(path: Path) -> list[Path]:
    """Folders in which the images of a file of annotations are looked for, in order.

    Of ``data/annotations/instances_val2017_small.json``: the folder with the file's name beside it,
    ``data/val2017_small``, ``data/val2017``, ``data/annotations/images``, ``data/annotations``.
    """
    parent, split = path.parent, path.stem.removeprefix("instances_")
    found = [
        parent / path.stem,
        parent.parent / split,
        parent.parent / split.partition("_")[0],
        parent / "images",
        parent,
    ]
    return list(dict.fromkeys(found))


def data_root(path: Path) -> Path:
    """Folder of the data of a file of annotations: its own, or the one above ``annotations``."""
    return path.parent.parent if path.parent.name == "annotations" else path.parent


def image_folder(path: Path, first: str) -> Path:
    """Folder of the images of a file of annotations, by the name of the first. Raises DataError."""
    path = path.absolute()
    folders, root = image_folders(path), data_root(path)
    for folder in map(Folder, folders):
        name = folder.relative(first)
        if name is not None and folder.find(name):
            return folder.folder
    name = Folder(root).relative(first)
    found = None if name is None else Folder(root).find(name)
    if found and "/" in found:
        return root / found.partition("/")[0]
    places = ", ".join(map(str, dict.fromkeys([*folders, root])))
    raise DataError(f"The images of {path} are not there: {first!r} was looked for in {places}.")


def locate(
    names: Sequence[str], folder: Path, root: Path | None, annotations: Path
) -> list[tuple[str, Path]]:
    """Find id and file of each image that the file ``annotations`` names; ids begin with a folder.

    ``names`` are relative to ``folder`` or to the data's ``root`` (if not None), or absolute and
    below one of them. Raises DataError for missing files, and if not each name has one file of its
    own.
    """
    places = [(Folder(folder), f"{folder.name}/")] + ([] if root is None else [(Folder(root), "")])
    found: list[tuple[str, Path]] = []
    missing, outside = [], []
    for name in names:
        files: dict[Path, str] = {}
        below = [
            (place, prefix, text)
            for place, prefix in places
            if (text := place.relative(name)) is not None
        ]
        for place, prefix, text in below:
            if (file := place.find(text)) is not None:
                files.setdefault(place.folder / file, prefix + text)
        if not files:
            (missing if below else outside).append(name)
            continue
        _check_alike(name, list(files), annotations)
        file, text = next(iter(files.items()))
        found.append((text, file))
    if outside:
        raise DataError(
            f"{annotations} names {counted(len(outside), 'image')} outside of the data's folder "
            f"{root or folder}, such as {outside[0]!r}: move such images there, or name them relative "
            "to it."
        )
    if missing:
        raise DataError(
            f"{annotations} names {counted(len(missing), 'image')} missing from {folder}, such as {missing[0]!r}."
        )
    twice = [str(file) for file, count in Counter(file for _, file in found).items() if count > 1]
    if twice:
        raise DataError(
            f"{annotations} lists {counted(len(twice), 'image')} twice under different names, such as {twice[0]}."
        )
    return found


def _check_alike(name: str, files: Sequence[Path], annotations: Path) -> None:
    """Refuse a name that stands for files of different content."""
    for file in files[1:]:
        if not filecmp.cmp(files[0], file, shallow=False):
            raise DataError(
                f"{annotations} names the image {name!r}, which stands for different files: "
                f"{files[0]} and {file}. Remove or rename one of them."
            )
