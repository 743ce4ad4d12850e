"""Corruptions of evaluated images (Hendrycks and Dietterich, 2019), one seed per image."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from fimaq_core.errors import DataError
from tasks.common.data.elsewhere import read_corruption
from tasks.common.data.folders import Source

#: Least side of an image; the corruptions take no smaller one.
_LEAST_SIDE = 32


def corrupted(
    source: Source, transform: Callable[[Any], Tensor], text: str
) -> tuple[Source, Callable[[Any], Tensor]]:
    """Return ``source`` with corrupted images, and the rest of ``transform`` for these.

    As in ImageNet-C, images are corrupted after resizing and cropping, since the severities are
    made for that size. ImageNet-C also stores them as JPEG, which is not done here.

    Args:
        source: images to corrupt.
        transform: composed transform of PIL images; its first steps return PIL images.
        text: corruption and severity, such as ``gaussian_noise:3``.

    Raises DataError: unknown corruption, or its package is missing.
    """
    name, severity = read_corruption(text)
    function = _library().corruption_dict[name]
    seeded = "seed" in inspect.signature(function).parameters
    steps = list(getattr(transform, "transforms", ()))
    first, probe = 0, Image.new("RGB", (256, 256))
    while isinstance(after := steps[first](probe), Image.Image):
        first, probe = first + 1, after
    resize = Compose(steps[:first])

    def read(index: int) -> Image.Image:
        image = resize(source.read(index))
        if min(image.size) < _LEAST_SIDE:
            size = f"{image.width} x {image.height} pixels"
            raise DataError(f"Corruptions need images of 32 x 32 pixels, and these have {size}.")
        digest = hashlib.sha256(f"{text}/{source.ids[index]}".encode()).digest()
        return corrupt(image, name, severity, int.from_bytes(digest[:4], "big"), seeded=seeded)

    return replace(source, name=f"{source.name}, {text}", read=read), Compose(steps[first:])


def corrupt(
    image: Image.Image, name: str, severity: int, seed: int, *, seeded: bool
) -> Image.Image:
    """Return the corrupted image in the same mode. NumPy's global generator keeps its state.

    ``seeded`` is True for a corruption that takes the seed as an argument.
    """
    state = np.random.get_state()
    np.random.seed(seed)
    own = {"seed": seed} if seeded else {}
    try:
        pixels = _library().corrupt(
            np.asarray(image.convert("RGB")), severity=severity, corruption_name=name, **own
        )
    finally:
        np.random.set_state(state)
    return Image.fromarray(pixels).convert(image.mode)


def _library() -> Any:
    try:
        import imagecorruptions  # slow to import
    except ImportError as error:
        raise DataError(
            "Corruptions need the package imagecorruptions-imaug: install the extra with "
            "pip install '.[corruptions]' in the project's folder."
        ) from error
    return imagecorruptions
