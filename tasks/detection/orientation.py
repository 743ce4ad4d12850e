"""EXIF orientation of image files, read from their headers.

Annotations are made in the pixels as stored or in the turned image, and their file does not say
which. Where the tag swaps the sides, the annotated size tells; otherwise the user has to.
"""

import struct
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.data.images import counted

Exif = Literal["apply", "ignore"]

_ORIENTATION = 0x0112
#: Tags that swap width and height.
_SWAPPED = (5, 6, 7, 8)
#: Errors of an image file whose header cannot be read.
UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
#: Errors of a damaged EXIF block; such a block has no orientation.
_DAMAGED = (SyntaxError, ValueError, KeyError, TypeError, EOFError, OSError, struct.error)


class Orientation(NamedTuple):
    """Orientation tag of an image file: 1 to 8 as in EXIF, 1 where there is none.

    ``stored`` is (height, width) of the stored pixels. ``applied`` is True where the image is
    turned as its tag says, and None where nothing tells.
    """

    tag: int
    stored: tuple[int, int]
    applied: bool | None

    @property
    def words(self) -> str:
        """How the image was read, for messages about its size; empty without a tag."""
        height, width = self.stored
        if self.tag == 1:
            return ""
        if self.applied:
            return f" (turned by its EXIF orientation tag {self.tag}; {width} x {height} as stored)"
        return f" (as stored; its EXIF orientation tag {self.tag} is ignored)"

    def advice(self, size: tuple[int, int]) -> str:
        """Advice to decide otherwise, where that fits the annotated (height, width)."""
        other = self.stored[::-1] if self.tag in _SWAPPED and not self.applied else self.stored
        if self.tag == 1 or size != other:
            return ""
        option, way = ("ignore", "as stored") if self.applied else ("apply", "turned by its tag")
        return f" They fit the image {way}: try --exif {option}."


def orientation_of(path: Path, size: tuple[int, int], exif: Exif | None) -> Orientation:
    """Read the orientation without decoding, and decide by user or size. Raises OSError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The orientation of a TIFF is part of its format, not EXIF, and every decoder applies it.
        with Image.open(path) as image:
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
    turned = stored[::-1] if tag in _SWAPPED else stored
    if turned == stored:
        # A size that fits neither way is refused by the reader.
        return Orientation(tag, stored, None if size == stored else True)
    return Orientation(tag, stored, size != stored)


def turned(array: np.ndarray, tag: int) -> np.ndarray:
    """Turn stored pixels (H, W, ...) as an orientation tag says."""
    if tag in (2, 3, 7, 8):
        array = array[:, ::-1]
    if tag in (3, 4, 6, 7):
        array = array[::-1]
    return np.ascontiguousarray(array.swapaxes(0, 1) if tag in _SWAPPED else array)


def ask(images: list[str], what: str) -> DataError:
    """Make the error that asks the user for a decision on ``images`` of the data ``what``."""
    return DataError(
        f"{counted(len(images), 'image')} of {what} (such as {images[0]}) have an EXIF orientation tag, and their sizes do "
        "not tell whether the annotations were made in the turned image (half a turn, mirrored or "
        "square). Give --exif apply if boxes fit the image as viewers show it and mmdet reads it, or "
        "--exif ignore if they fit the stored pixels."
    )


def _png_block(path: Path) -> bytes:
    """EXIF block of a PNG; Pillow finds one behind the pixels only after decoding them."""
    with path.open("rb", buffering=0) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, 1)
    return b""
