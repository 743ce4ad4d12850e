"""Original images of samples by id, for reports."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.data.files import file_below, image_id
from tasks.common.data.images import DamagedImage, UnknownRange, open_rgb


def originals_below(root: Path, ids: Sequence[str]) -> dict[str, Image.Image]:
    """Return the images with these ids (paths below ``root``) as RGB.

    Ids are not trusted. Raises DataError: an id leads out of the folder, its file is missing, or
    the file is no image.
    """
    found = {}
    for name in ids:
        if image_id(name, "A sample's id") != name:
            raise DataError(f"There is no sample {name!r}: ids are paths below the data folder.")
        path = file_below(root, name)
        try:
            if not path.is_file():
                raise DataError(f"There is no image of the sample {name!r}: {path} was looked for.")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the evaluation has reported these warnings
                found[name] = open_rgb(path)
        except UnknownRange as error:
            raise DataError(f"The image {path} {error}.") from error
        except DamagedImage as error:
            raise DataError(f"The image {path} is damaged ({error}).") from error
    return found


def class_originals(root: Path, ids: Sequence[str]) -> dict[str, Image.Image]:
    """Return the images of ids ``val/<class>/<image>`` as RGB. Raises DataError."""
    for name in ids:
        if not name.startswith("val/") or name.count("/") < 2:
            raise DataError(f"There is no sample {name!r}: ids are such as 'val/<class>/<image>'.")
    return originals_below(root, ids)


def known_originals(
    ids: Sequence[str], known: Sequence[str], read: Callable[[int], Image.Image], what: str
) -> dict[str, Image.Image]:
    """Return the images of ``ids`` as RGB; ``read`` takes a position in ``known``.

    ``known`` are the ids of the data ``what``. Raises DataError: an id is unknown, or an image is
    damaged.
    """
    positions = {name: position for position, name in enumerate(known)}
    found = {}
    for name in ids:
        if name not in positions:
            known_id = f"ids are such as {known[0]!r}"
            raise DataError(f"There is no sample {name!r} in {what}: {known_id}.")
        try:
            found[name] = read(positions[name]).convert("RGB")
        except DamagedImage as error:
            raise DataError(f"The image {name} is damaged ({error}).") from error
    return found
