"""Original images of samples by their ids, for people to look at: from a folder, or from what a reader knows."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.data.files import file_below, image_id
from tasks.common.data.images import DAMAGED, UnknownRange, open_rgb


def originals_below(root: Path, ids: Sequence[str]) -> dict[str, Image.Image]:
    """The image files that have these ids, RGB.

    Args:
        root: folder of the data.
        ids: paths below it with slashes.

    Raises:
        DataError: an id that leads out of the folder, or without a file, or of a file that is no image.
    """
    return {name: read_picture(_path_below(root, name), name) for name in ids}


def class_originals(root: Path, ids: Sequence[str]) -> dict[str, Image.Image]:
    """Likewise of ``<root>/val/<class>/<image>``; other ids are unknown. Raises DataError."""
    for name in ids:
        if not name.startswith("val/") or name.count("/") < 2:
            raise DataError(
                f"There is no sample {name!r} among labelled images: ids there are such as 'val/<class>/<image>'."
            )
    return originals_below(root, ids)


def known_originals(
    ids: Sequence[str], known: Sequence[str], read: Callable[[int], Image.Image], what: str
) -> dict[str, Image.Image]:
    """The images that ``read`` gives of the positions that ``ids`` have among ``known``, RGB.

    Raises:
        DataError: an id that ``what`` (for people) does not have, or a damaged image.
    """
    wanted = set(ids)
    positions = {name: position for position, name in enumerate(known) if name in wanted}
    found = {}
    for name in ids:
        if name not in positions:
            raise DataError(
                f"There is no sample {name!r} in {what} (ids there are such as {known[0]!r})."
            )
        try:
            found[name] = read(positions[name]).convert("RGB")
        except DAMAGED as error:
            raise DataError(f"The image {name} is damaged ({error}).") from error
    return found


def read_picture(path: Path, name: str) -> Image.Image:
    """The image file of the sample ``name``, RGB. Raises DataError."""
    try:
        if not path.is_file():
            raise DataError(f"There is no image of the sample {name!r}: {path} was looked for.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the evaluation has told of them
            return open_rgb(path)
    except UnknownRange as error:
        raise DataError(f"The image {path} {error}.") from error
    except DAMAGED as error:
        raise DataError(f"The image {path} is damaged ({error}).") from error


def _path_below(root: Path, name: str) -> Path:
    """Where an id leads; ids may come from files that others wrote. Raises DataError."""
    if image_id(name, "A sample's id") != name:
        raise DataError(
            f"There is no sample {name!r}: ids are paths below the folder of the data, in their shortest form."
        )
    return file_below(root, name)
