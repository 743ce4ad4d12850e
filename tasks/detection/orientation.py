"""EXIF orientation of image files, read from their headers.

Annotations refer either to the stored pixels or to the turned image, and their file does not say
which. If the tag swaps the sides, the annotated size tells; otherwise the user has to decide.
"""

import struct
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.data.files import counted
from tasks.common.data.images import open_image

Exif = Literal["apply", "ignore"]

_ORIENTATION = 0x0112
#: Tags that swap width and height.
_SWAPPED = (5, 6, 7, 8)
#: Errors of a damaged EXIF block. It counts as a block without an orientation.
_DAMAGED = (
    SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError,
    OSError, struct.error,
)  # fmt: skip
#: Bounds on the chunks of a PNG that are searched for an EXIF block, and on the bytes of the block.
_MOST_CHUNKS, _MOST_EXIF = 10**6, 2**20


class Orientation(NamedTuple):
    """EXIF orientation of an image file."""

    tag: int  # 1 to 8; 1 for a file without a tag
    stored: tuple[int, int]  # (height, width) of the stored pixels
    applied: bool | None  # True if the image is turned by the tag; None: the user has to decide

    @property
    def words(self) -> str:
        """Describe in messages how the image was read; empty without a tag."""
        height, width = self.stored
        if self.tag == 1:
            return ""
        if self.applied:
            return f" (turned by its EXIF orientation tag {self.tag}; {width} x {height} as stored)"
        return f" (as stored; its EXIF orientation tag {self.tag} is ignored)"

    def advice(self, size: tuple[int, ...]) -> str:
        """Recommend the other decision if it fits the annotated ``size`` (height, width)."""
        other = self.stored[::-1] if self.tag in _SWAPPED and not self.applied else self.stored
        if self.tag == 1 or size != other:
            return ""
        option, way = ("ignore", "as stored") if self.applied else ("apply", "turned by its tag")
        return f" The annotated size fits the image {way}: try --exif {option}."


def orientation_of(path: Path, size: tuple[int, ...], exif: Exif | None) -> Orientation:
    """Read the orientation without decoding the image, and decide by ``exif`` or ``size``.

    ``size`` is the annotated (height, width). Raises DamagedImage.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A TIFF's own orientation is not in an EXIF block; every decoder applies it.
        with open_image(path) as image:
            stored = (image.height, image.width)
            block = _png_block(path) if image.format == "PNG" else image.info.get("exif", b"")
        found = Image.Exif()
        try:
            found.load(block)
            tag = found.get(_ORIENTATION)
        except _DAMAGED:
            tag = 1
    if tag not in range(2, 9):
        return Orientation(1, stored, False)
    if exif is not None:
        return Orientation(tag, stored, exif == "apply")
    if tag in _SWAPPED and stored[0] != stored[1]:
        return Orientation(tag, stored, size != stored)
    # If the size fits neither way, the reader refuses the image.
    return Orientation(tag, stored, None if size == stored else True)


def turned(array: np.ndarray, tag: int) -> np.ndarray:
    """Turn stored pixels (H, W, ...) as an orientation tag says."""
    if tag in (2, 3, 7, 8):
        array = array[:, ::-1]
    if tag in (3, 4, 6, 7):
        array = array[::-1]
    return np.ascontiguousarray(array.swapaxes(0, 1) if tag in _SWAPPED else array)


def ask(images: list[str], what: str) -> DataError:
    """Make the error that asks the user to decide about ``images`` of the data ``what``."""
    return DataError(
        f"{counted(len(images), 'image')} of {what} (such as {images[0]}) have an EXIF orientation "
        "tag, and their sizes do not tell whether the annotations were made in the turned image "
        "(it is square, mirrored or turned by half). Give --exif apply if boxes fit the image as "
        "viewers show it and mmdet reads it, or --exif ignore if they fit the stored pixels."
    )


def _png_block(path: Path) -> bytes:
    """Read the EXIF block of a PNG. Pillow would have to decode the pixels before it."""
    with path.open("rb", buffering=0) as file:
        file.seek(8)
        for _ in range(_MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8:
                break
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return file.read(min(length, _MOST_EXIF))
            file.seek(length + 4, 1)
    return b""
