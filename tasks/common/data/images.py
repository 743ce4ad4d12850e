"""Images as samples: read, transformed, seeded one by one, gathered into batches."""

import hashlib
import logging
import mmap
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from fimaq_core.errors import DataError, ModelError
from tasks.common.data.files import counted, named

#: Raised by Pillow for files that it cannot read, and by :func:`as_rgb`.
DAMAGED = (
    OSError,
    UnidentifiedImageError,
    SyntaxError,
    ValueError,
    RuntimeError,
    Image.DecompressionBombError,
)

#: Formats whose 16-bit grey values have the full range; others store signed values in that mode.
_WIDE_FORMATS = ("PNG", "PPM", "TIFF", "JPEG2000")
#: Numbers of TIFF's tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0

#: Kinds of Pillow's warnings: a word in their text, and how a note describes such images.
#: The last kind takes all others.
_WARNINGS = (
    ("exif", "damaged EXIF metadata"),
    ("metadata", "damaged metadata"),
    ("transparency", "a palette with transparency, which was dropped"),
    ("decompression bomb", "so many pixels that Pillow warns of a decompression bomb"),
    ("truncated", "a truncated part that Pillow could do without"),
    ("", "another flaw that Pillow read past (--verbose shows which)"),
)


class UnknownRange(ValueError):
    """An image whose values cannot be converted to 8 bits, since no range is defined for them."""


def grey_bits(image: Image.Image) -> int | None:
    """Bits of an image of wide grey values (mode ``I``, ``I;16``, ``F``); None for all other modes.

    Raises:
        UnknownRange: 32-bit integers, signed values or floats, whose range differs between writers.
    """
    if not image.mode.startswith(("I", "F")):
        return None
    if image.format in _WIDE_FORMATS and image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        return int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    if image.format in ("PNG", "PPM") and image.mode == "I":
        return 16  # Pillow scales PPM to 16 bits, and older versions open 16-bit PNG in this mode
    kind = "float" if image.mode == "F" else "integer"
    values = f"{kind} values without a defined range (Pillow's mode {image.mode})"
    raise UnknownRange(f"has {values}: convert it to 8 bits")


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to 8-bit RGB.

    Of 16-bit grey the high byte is taken, as Pillow does for 16-bit colour and OpenCV for grey.

    Raises:
        UnknownRange: see :func:`grey_bits`.
    """
    bits = grey_bits(image)
    if bits is None:
        return image.convert("RGB")
    values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 255 - values  # Pillow inverts 8-bit TIFF only
    return Image.fromarray(values).convert("RGB")


def open_rgb(path: Path) -> Image.Image:
    """Read an image file, of an animation the first frame, as 8-bit RGB. Raises :data:`DAMAGED`."""
    with Image.open(path) as image:
        # Pillow maps files that it knows the name of, and then swaps the sides of turned TIFF.
        image.filename = ""
        return as_rgb(image)


def is_image(path: Path) -> bool:
    """True for a file that Pillow takes for an image, or that has the ending of one: it is damaged."""
    if not path.is_file():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # Pillow also knows films, printed pages and containers that it cannot decode.
                kind = Image.MIME.get(image.format or "", "image/")
                return kind.startswith("image/") and not isinstance(image, ImageFile.StubImageFile)
    except Image.DecompressionBombError:
        return True
    except DAMAGED:
        kind = Image.registered_extensions().get(path.suffix.lower(), "")
        return Image.MIME.get(kind, "").startswith("image/")


def file_reader(paths: Sequence[Path]) -> Callable[[int], Image.Image]:
    """Return a function that gives the image file of a position as RGB."""
    return lambda index: open_rgb(paths[index])


@dataclass(eq=False)
class Images(TorchDataset[tuple[Tensor, int, int] | DataError | None]):
    """Samples with stable ids. An item is (image, label, position).

    For a damaged image it is None where such are skipped, else the error for the caller to raise
    (raised in a data-loading process, its message would arrive inside a traceback).

    Attributes:
        ids: sample ids, in order.
        targets: labels.
        read: gives the PIL image of a position.
        transform: PIL image to float32 tensor.
        skip_corrupt: whether damaged images become None instead of an error.
    """

    ids: Sequence[str]
    targets: Sequence[int]
    read: Callable[[int], Image.Image]
    transform: Callable[[Any], Tensor]
    skip_corrupt: bool

    def __post_init__(self) -> None:
        # One bit per kind of warning, in memory that data-loading processes share.
        self._warned = mmap.mmap(-1, max(1, len(self.ids)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | DataError | None:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                image = self.read(index)
        except DataError as error:
            return error
        except DAMAGED as error:
            if self.skip_corrupt:
                return None
            damage = f"is damaged ({error}): repair or remove it"
            problem = error if isinstance(error, UnknownRange) else damage
            advice = "or leave such images out with --skip-corrupt"
            return DataError(f"The image {self.ids[index]} {problem}, {advice}.")
        self._note(index, caught)
        return self.transform(image), int(self.targets[index]), index

    def _note(self, index: int, caught: Sequence[warnings.WarningMessage]) -> None:
        for warning in caught:
            if not issubclass(warning.category, (UserWarning, RuntimeWarning)):
                continue  # a message for programmers
            text = str(warning.message)
            logging.getLogger(__name__).info("%s: %s", self.ids[index], text)
            kind = [word in text.lower() for word, _ in _WARNINGS].index(True)
            self._warned[index] |= 1 << kind

    def notes(self) -> list[str]:
        """Describe what Pillow warned of in the images read so far, one line per kind."""
        warned = np.frombuffer(self._warned[:], dtype=np.uint8)
        found = []
        for kind, (_, words) in enumerate(_WARNINGS):
            names = [self.ids[place] for place in np.flatnonzero(warned & (1 << kind))]
            if names:
                found.append(f"{counted(len(names), 'image')} with {words}: {named(names)}")
        return found


def seeded_item(images: Images, index: int, seed: int) -> Tensor | None:
    """Item ``index`` with every generator that transforms use seeded by (seed, index), and put back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        own = int.from_bytes(
            hashlib.sha256(f"{seed}/{images.ids[index]}".encode()).digest()[:4], "big"
        )
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
    items: list[tuple[Tensor, int, int] | DataError | None],
) -> tuple[Tensor, Tensor, Tensor] | DataError | None:
    """Stack items; a damaged image comes alone, and None if there is none left."""
    kept = [item for item in items if item is not None]
    damaged = next((item for item in kept if isinstance(item, DataError)), None)
    if damaged is not None or not kept:
        return damaged
    images, labels, positions = zip(*kept, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(positions)


@dataclass(frozen=True)
class Outputs:
    """A model's outputs on one batch.

    ``values`` (B, ...) float32 are on the model's device, ``targets`` and ``positions`` (B,) on the CPU;
    ``done`` images are behind it, damaged ones included.
    """

    values: Tensor
    targets: Tensor
    positions: Tensor
    done: int


def image_outputs(
    model: Callable[[Tensor], Tensor],
    images: Images,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> Iterator[Outputs]:
    """Yield the outputs of ``model`` on ``images`` in their order; images that were skipped are missing.

    Raises:
        DataError: a damaged image (unless skipped).
        ModelError: the model does not take these images.
    """
    loader = DataLoader(
        images,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    done = 0
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
            raise ModelError(
                f"The model does not take images of shape {tuple(pixels.shape[1:])}: {error}"
            ) from error
        yield Outputs(values, targets, positions, done)
