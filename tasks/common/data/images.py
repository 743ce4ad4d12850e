"""Images as samples: reading, transforms with one seed per image, batches, and model outputs."""

import hashlib
import io
import logging
import math
import mmap
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fimaq_core.errors import DataError, ModelError
from fimaq_core.files import open_regular
from tasks.common.data.files import counted, named
from tasks.common.penultimate import penultimate

#: Formats that are opened. Pillow knows more: some start programs (EPS), or are no images.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF",
    "WEBP",
)  # fmt: skip
#: Bound on the pixels of an image. Pillow warns from there on.
MOST_PIXELS = 89_478_485
#: Bounds on the bytes of a file, and on the long side of an image as a multiple of the short side,
#: which preprocessing resizes to a fixed length.
_MOST_BYTES, _MOST_RATIO = 2**29, 100
#: Errors of Pillow for a file that cannot be read.
_BROKEN = (
    OSError, SyntaxError, ValueError, RuntimeError, TypeError, AttributeError, LookupError,
    ArithmeticError, AssertionError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
#: Formats whose 16-bit grey values are unsigned; other formats may hold signed values.
_WIDE_FORMATS = ("PNG", "PPM", "TIFF", "JPEG2000")
#: Numbers of two TIFF tags, and the value of the second for inverted grey.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
#: Numbers of the TIFF tags with the sides of a tile. A small image may have a large tile.
_TILE = 322, 323
#: Kinds of Pillow's warnings: a word in the warning, and the words for users. The last kind
#: matches all other warnings.
_WARNINGS = (
    ("exif", "damaged EXIF metadata"),
    ("metadata", "damaged metadata"),
    ("transparency", "a palette with transparency, which was dropped"),
    ("truncated", "a truncated part that Pillow does not need"),
    ("", "another flaw that Pillow ignores (--verbose shows which)"),
)

#: One sample: image, label and position.
Sample = tuple[Tensor, int, int]


class DamagedImage(Exception):
    """A file that is missing, is no image, is damaged, or is too large to be read safely."""


class UnknownRange(DamagedImage):
    """An image that cannot be converted to 8 bits, because its values have no defined range."""


class _Bounded(io.BufferedReader):
    """File that takes no memory for more bytes than it has: a header may promise a gigabyte."""

    def read(self, size: int | None = -1) -> bytes:
        """Read ``size`` bytes, or those that are left."""
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file, which may come from anyone. Pixels are read when the block asks for them.

    Raises:
        DamagedImage: the file is no regular file, has none of the :data:`FORMATS`, is damaged, has
            more than 89 million pixels, or is more than 100 times as long as wide. It is raised
            also for Pillow's errors inside the block.
    """
    try:
        with (
            open_regular(path, _MOST_BYTES) as file,
            Image.open(_Bounded(file.raw), formats=FORMATS) as image,
        ):
            short, long = sorted(image.size)
            if short * long > MOST_PIXELS or long > _MOST_RATIO * short:
                size = f"{image.width} x {image.height} pixels"
                raise DamagedImage(f"{size} would take too much memory when they are resized")
            tags = getattr(image, "tag_v2", {})
            if math.prod(max(1, int(tags.get(tag, 1))) for tag in _TILE) > MOST_PIXELS:
                raise DamagedImage("its tiles would take too much memory")
            yield image
    except UnidentifiedImageError as error:
        raise DamagedImage(f"it has none of the formats {', '.join(FORMATS)}") from error
    except _BROKEN as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DamagedImage(reason or type(error).__name__) from error


def grey_bits(image: Image.Image) -> int | None:
    """Return the number of bits of grey values with more than 8 bits; None for other images.

    Raises UnknownRange: the values are 32-bit integers, signed, or floats, which have no one range.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    if image.format in _WIDE_FORMATS and image.mode.startswith("I;16"):
        return int(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0])
    if image.format in ("PNG", "PPM") and image.mode == "I":
        return 16  # Pillow scales PPM to 16 bits; older versions open 16-bit PNG in mode I
    kind = "float" if image.mode == "F" else "integer"
    values = f"{kind} values without a defined range (Pillow's mode {image.mode})"
    raise UnknownRange(f"has {values}: convert it to 8 bits")


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to 8-bit RGB. Raises UnknownRange.

    16-bit grey keeps its high byte, as in OpenCV, and as in Pillow for 16-bit colour.
    """
    bits = grey_bits(image)
    if bits is None:
        return image.convert("RGB")
    values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 255 - values  # Pillow does this for 8-bit TIFF only
    return Image.fromarray(values).convert("RGB")


def open_rgb(path: Path) -> Image.Image:
    """Read an image file (the first frame of an animation) as 8-bit RGB. Raises DamagedImage."""
    with open_image(path) as image:
        return as_rgb(image)


def is_image(path: Path) -> bool:
    """Return True for an image file, and for a damaged file that has the suffix of an image."""
    if not path.is_file():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(path):
                return True
    except DamagedImage:
        return Image.registered_extensions().get(path.suffix.lower()) in FORMATS


def file_reader(paths: Sequence[Path]) -> Callable[[int], Image.Image]:
    """Return a function that reads the file at a position as RGB."""
    return lambda index: open_rgb(paths[index])


@dataclass(eq=False)
class Images(TorchDataset[Sample | DataError | None]):
    """Samples with stable ids. An item is (image, label, position).

    The item of a damaged image is None, or an error that the caller raises: an error that a
    data-loading process raises would reach the user inside a traceback.
    """

    ids: Sequence[str]
    targets: Sequence[int]  # labels
    read: Callable[[int], Image.Image]  # PIL image at a position
    transform: Callable[[Any], Tensor]  # PIL image to float32 tensor
    skip_corrupt: bool  # True: a damaged image becomes None instead of an error

    def __post_init__(self) -> None:
        # One byte per image, with one bit per kind of warning. Loading processes share this memory.
        self._warned = mmap.mmap(-1, max(1, len(self.ids)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample | DataError | None:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                image = self.read(index)
        except DataError as error:
            return error
        except DamagedImage as error:
            if self.skip_corrupt:
                return None
            damage = f"is damaged ({error}): repair or remove it"
            problem = error if isinstance(error, UnknownRange) else damage
            advice = "or leave such images out with --skip-corrupt"
            return DataError(f"The image {self.ids[index]} {problem}, {advice}.")
        for warning in caught:
            if issubclass(warning.category, (UserWarning, RuntimeWarning)):  # not for developers
                text = str(warning.message)
                logging.getLogger(__name__).info("%s: %s", self.ids[index], text)
                kind = [word in text.lower() for word, _ in _WARNINGS].index(True)
                self._warned[index] |= 1 << kind
        return self.transform(image), int(self.targets[index]), index

    def notes(self) -> list[str]:
        """Describe Pillow's warnings for the images read so far, one line per kind."""
        warned = np.frombuffer(self._warned[:], dtype=np.uint8)
        found = []
        for kind, (_, words) in enumerate(_WARNINGS):
            names = [self.ids[place] for place in np.flatnonzero(warned & (1 << kind))]
            if names:
                found.append(f"{counted(len(names), 'image')} with {words}: {named(names)}")
        return found


def seeded_item(images: Images, index: int, seed: int) -> Tensor | None:
    """Return the image at ``index``, transformed with a seed made of ``seed`` and the image's id.

    The global generators of Python, NumPy and PyTorch keep their state. Raises DataError.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    digest = hashlib.sha256(f"{seed}/{images.ids[index]}".encode()).digest()
    own = int.from_bytes(digest[:4], "big")
    with torch.random.fork_rng(devices=[]):
        random.seed(own)
        np.random.seed(own)
        torch.manual_seed(own)
        try:
            item = images[index]
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
    if isinstance(item, DataError):
        raise item
    return None if item is None else item[0]


def collate(
    items: list[Sample | DataError | None],
) -> tuple[Tensor, Tensor, Tensor] | DataError | None:
    """Stack the items of a batch. Return the error of a damaged image, or None for no images."""
    kept = [item for item in items if item is not None]
    damaged = next((item for item in kept if isinstance(item, DataError)), None)
    if damaged is not None or not kept:
        return damaged
    images, labels, positions = zip(*kept, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(positions)


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model for one batch."""

    values: Tensor  # (B, ...) float32, on the device of the model
    targets: Tensor  # (B,) on the CPU
    positions: Tensor  # (B,) on the CPU
    done: int  # number of images read so far, including damaged images
    feature: Tensor | None = None  # (B, d) penultimate features, if the model's kind is known


def image_outputs(
    model: Callable[[Tensor], Tensor],
    images: Images,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> Iterator[Outputs]:
    """Yield the outputs of ``model`` for ``images`` in their order, without skipped images.

    Raises DataError: an image is damaged. Raises ModelError: the model does not take these images.
    """
    cuda = device.type == "cuda"
    loader = DataLoader(
        images, batch_size, num_workers=workers, collate_fn=collate, pin_memory=cuda
    )
    done = 0
    with penultimate(model) as feature:
        for batch in loader:
            done = min(done + batch_size, len(images))
            if isinstance(batch, DataError):
                raise batch
            if batch is None:
                continue
            pixels, targets, positions = batch
            try:
                with torch.no_grad():
                    values = model(pixels.to(device, non_blocking=True)).float()
            except (RuntimeError, AssertionError) as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                words = f"The model does not take images of shape {tuple(pixels.shape[1:])}"
                raise ModelError(f"{words}: {error}") from error
            yield Outputs(values, targets, positions, done, feature())
