"""Image files that annotations name: found once each, below the data's folder only."""

import filecmp
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fimaq_core.errors import DataError
from tasks.common.files import FilesBelow
from tasks.common.images import counted
from tasks.detection.layout import data_root, image_folders


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


def image_folder(path: Path, first: str) -> Path:
    """Find the folder of the images of a file of annotations by its first image.

    Args:
        path: of the file.
        first: name of its first image, which is below one of
            :func:`~tasks.detection.layout.image_folders` or below the data's folder.

    Raises:
        DataError: it is in none of them.
    """
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
    names: Sequence[str],
    folder: Path,
    root: Path | None,
    annotations: Path,
) -> list[tuple[str, Path]]:
    """Find the file of each image.

    Args:
        names: in the annotations, relative to ``folder`` or ``root``, or absolute and below one of
            them.
        folder: of the images.
        root: folder of the data set, in which ``folder`` is; None looks in ``folder`` only.
        annotations: the file, for people.

    Returns:
        Id and file of each image. Ids are paths below the parent of ``folder``, however an image is
        named.

    Raises:
        DataError: a file that is not there, that several names stand for, or a name that stands for
            several different files.
    """
    places = [(Folder(folder), f"{folder.name}/")] + ([] if root is None else [(Folder(root), "")])
    found: list[tuple[str, Path]] = []
    missing, outside = [], []
    for name in names:
        below = False
        files: dict[Path, str] = {}
        for place, prefix in places:
            text = place.relative(name)
            if text is not None:
                below = True
                file = place.find(text)
                if file is not None:
                    files.setdefault(place.folder / file, prefix + text)
        if not below:
            outside.append(name)
        elif not files:
            missing.append(name)
        else:
            _check_alike(name, list(files), annotations)
            found += [(text, file) for file, text in files.items()][:1]
    if outside:
        raise DataError(
            f"{annotations} names {counted(len(outside), 'image')} outside of the data's folder "
            f"{root or folder}, such as {outside[0]!r}: move such images there, or name them relative "
            "to it."
        )
    if missing:
        raise DataError(f"{annotations} names {counted(len(missing), 'image')} missing from {folder}, such as {missing[0]!r}.")
    twice = [str(file) for file, count in Counter(file for _, file in found).items() if count > 1]
    if twice:
        raise DataError(f"{annotations} lists {counted(len(twice), 'image')} twice under different names, such as {twice[0]}.")
    return found


def _check_alike(name: str, files: Sequence[Path], annotations: Path) -> None:
    """Refuse a name that stands for files of different content."""
    for file in files[1:]:
        if not filecmp.cmp(files[0], file, shallow=False):
            raise DataError(
                f"{annotations} names the image {name!r}, which stands for different files: "
                f"{files[0]} and {file}. Remove or rename one of them."
            )
