"""Search for the image files that annotations name, only below the folder of the data."""

import filecmp
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fimaq_core.errors import DataError
from tasks.common.data.files import FilesBelow, id_below
from tasks.common.data.images import counted


def data_root(path: Path) -> Path:
    """Return the data's folder: that of the annotation file, or the one above ``annotations``."""
    return path.parent.parent if path.parent.name == "annotations" else path.parent


def image_folder(path: Path, first: str) -> Path:
    """Find the folder of the images of an annotation file, by the ``first`` image's name.

    For ``data/annotations/instances_val2017_small.json`` these folders are tried in order:
    ``data/annotations/instances_val2017_small``, ``data/val2017_small``, ``data/val2017``,
    ``data/annotations/images``, ``data/annotations``; then the folders in ``data``. Raises
    DataError.
    """
    path = path.absolute()
    parent, split, root = path.parent, path.stem.removeprefix("instances_"), data_root(path)
    beside = [parent.parent / split, parent.parent / split.partition("_")[0]]
    folders = list(dict.fromkeys([parent / path.stem, *beside, parent / "images", parent]))
    for folder in folders:
        if _find(first, FilesBelow(folder))[1]:
            return folder
    _, file = _find(first, FilesBelow(root))
    if file and "/" in file:
        return root / file.partition("/")[0]
    places = ", ".join(map(str, dict.fromkeys([*folders, root])))
    raise DataError(f"The images of {path} are missing: {first!r} was searched for in {places}.")


def _find(name: str, files: FilesBelow) -> tuple[str | None, str | None]:
    """Return ``name`` relative to the folder (None for a path elsewhere), and its file there."""
    text = id_below(name, files.folder) if name.startswith("/") else name
    return (None, None) if text.startswith("/") else (text, files.find(text))


def locate(
    names: Sequence[str], folder: Path, root: Path | None, annotations: Path
) -> list[tuple[str, Path]]:
    """Find id and file of each image that the file ``annotations`` names; ids begin with a folder.

    ``names`` are relative to ``folder`` or to the data's ``root`` (if it is given), or absolute and
    below one of the two. Raises DataError unless each name has exactly one file of its own.
    """
    places = [(FilesBelow(folder), f"{folder.name}/")]
    if root is not None:
        places.append((FilesBelow(root), ""))
    found: list[tuple[str, Path]] = []
    missing, outside = [], []
    for name in names:
        inside, files = False, {}
        for place, prefix in places:
            text, file = _find(name, place)
            inside |= text is not None
            if file is not None:
                files.setdefault(place.folder / file, f"{prefix}{text}")
        if files:
            (file, image_id), *others = files.items()
            found.append((image_id, file))
            for other, _ in others:
                if not filecmp.cmp(file, other, shallow=False):
                    raise DataError(
                        f"{annotations} names the image {name!r}, which stands for different "
                        f"files: {file} and {other}. Remove or rename one of them."
                    )
        else:
            (missing if inside else outside).append(name)
    if outside:
        raise DataError(
            f"{annotations} names {counted(len(outside), 'image')} outside of the data's folder "
            f"{root or folder}, such as {outside[0]!r}: move such images there, or name them "
            "relative to it."
        )
    if missing:
        raise DataError(
            f"{annotations} names {counted(len(missing), 'image')} missing from {folder}, such as "
            f"{missing[0]!r}."
        )
    twice = [str(file) for file, count in Counter(file for _, file in found).items() if count > 1]
    if twice:
        raise DataError(
            f"{annotations} lists {counted(len(twice), 'image')} twice under different names, such "
            f"as {twice[0]}."
        )
    return found
