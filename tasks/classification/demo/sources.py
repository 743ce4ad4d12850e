"""Images of other kinds to calibrate the models on digit pairs with, without a download."""

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

from tasks.classification.demo.digit_pairs import (
    CANVAS_SIZE,
    HALF_SIZE,
    MAX_OFFSET,
    PIXEL_MEAN,
    PIXEL_STD,
)
from tasks.common.data.folders import Source
from tasks.common.demo.digits import DIGIT_SIZE, SEED

#: Images of each kind.
COUNT = 2048
#: Side of a written digit within its square of :data:`.DIGIT_SIZE` pixels, as in MNIST.
_WRITTEN = 20


def noise(rng: np.random.Generator) -> Image.Image:
    """Draw normal noise with mean and deviation of the digit pairs' pixels."""
    values = rng.normal(PIXEL_MEAN, PIXEL_STD, CANVAS_SIZE)
    return Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))


def other_digits(rng: np.random.Generator) -> Image.Image:
    """Draw two digits of other writers: 8 x 8 pixels (UCI, in scikit-learn), smoothly enlarged."""
    canvas, border = Image.new("L", CANVAS_SIZE[::-1]), (DIGIT_SIZE - _WRITTEN) // 2
    for half, index in enumerate(rng.integers(len(_uci_digits()), size=2)):
        digit = Image.fromarray(_uci_digits()[index]).resize((_WRITTEN, _WRITTEN))
        left, top = rng.integers(0, MAX_OFFSET, size=2, endpoint=True) + border
        canvas.paste(digit, (half * HALF_SIZE + int(left), int(top)))
    return canvas


def photo(rng: np.random.Generator) -> Image.Image:
    """Cut a grey part out of a photograph (two of scikit-learn), half or more of its height."""
    whole = Image.fromarray(_photos()[rng.integers(len(_photos()))])
    height = int(rng.integers(whole.height // 2, whole.height * 3 // 4))
    width = 2 * height if 2 * height <= whole.width else whole.width
    left, top = rng.integers(whole.width - width + 1), rng.integers(whole.height - height + 1)
    part = whole.crop((int(left), int(top), int(left) + width, int(top) + height))
    return part.resize(CANVAS_SIZE[::-1], Image.Resampling.BICUBIC)


#: Functions that draw one image (32, 64) by the name of the kind.
KINDS: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "noise": noise,
    "other-digits": other_digits,
    "photos": photo,
}


def calibration_source(kind: str) -> Source:
    """Return the images of a kind in :data:`KINDS`; each has random numbers of its own."""
    draw, number = KINDS[kind], [*KINDS].index(kind)
    ids = [f"{kind}/{index:05d}" for index in range(COUNT)]

    def read(index: int) -> Image.Image:
        return draw(np.random.default_rng([SEED, 2, number, index]))

    return Source(kind, "train", ids, [0] * COUNT, 1, read)


@cache
def _uci_digits() -> np.ndarray:
    """Return the digits (1797, 8, 8) uint8 of scikit-learn."""
    from sklearn.datasets import load_digits

    images: np.ndarray = load_digits().images
    return (images * (255 / 16)).astype(np.uint8)


@cache
def _photos() -> list[np.ndarray]:
    """Return the photographs (427, 640) uint8 of scikit-learn, in grey."""
    from sklearn.datasets import load_sample_images

    return [
        np.asarray(Image.fromarray(image).convert("L")) for image in load_sample_images().images
    ]
