"""Images with their captions: one part of a data set from any kind of file."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.record import Dataset


@dataclass(frozen=True, eq=False)
class PairSource:
    """One part of an image-caption data set, such as ``Karpathy test`` of ``MS-COCO``.

    Raises DataError for images without captions, listed twice, or with an empty caption.

    Example:
        >>> source = PairSource("mine", "test", [("a.jpg", ["a dog", "a pet"])], lambda index: None)
        >>> source.captions
        ('a dog', 'a pet')
    """

    name: str
    split: str
    listed: Sequence[tuple[str, Sequence[str]]]  # id of each image, and its captions as written
    read: Callable[[int], Image.Image]  # image at a position
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        what = f"{self.name} {self.split}"
        if not self.listed:
            raise DataError(f"{what} holds no images.")
        counts = Counter(self.image_ids)
        problems = {
            "images more than once, such as": [name for name, n in counts.items() if n > 1],
            "images without a caption, such as": [name for name, own in self.listed if not own],
            "empty captions, such as one of": [
                name for name, own in self.listed for caption in own if not caption.strip()
            ],
        }
        for problem, names in problems.items():
            if names:
                raise DataError(f"{what} has {len(names)} {problem} {names[0]!r}.")

    @cached_property
    def image_ids(self) -> tuple[str, ...]:
        """Ids of the images, in order."""
        return tuple(name for name, _ in self.listed)

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """All captions; those of an image are neighbours."""
        return tuple(caption for _, own in self.listed for caption in own)

    @cached_property
    def starts(self) -> np.ndarray:
        """(images + 1,) int64: image i has ``captions[starts[i]:starts[i + 1]]``."""
        return np.cumsum([0, *(len(own) for _, own in self.listed)], dtype=np.int64)

    @cached_property
    def image_of(self) -> np.ndarray:
        """(captions,) int64: index of the image of each caption."""
        return np.repeat(np.arange(len(self.listed), dtype=np.int64), np.diff(self.starts))

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of image ids, captions and their assignment."""
        content = json.dumps([self.image_ids, self.captions, self.starts.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()

    def head(self, limit: int | None) -> "PairSource":
        """Return the first ``limit`` images with their captions, as a split with its own name."""
        if limit is None or limit >= len(self.listed):
            return self
        return replace(self, split=f"{self.split}[:{limit}]", listed=self.listed[:limit])

    def describe(self) -> Dataset:
        """Return the entry for the record."""
        return Dataset(
            name=self.name,
            split=self.split,
            count=len(self.listed),
            classes=0,
            fingerprint=self.fingerprint,
            captions=len(self.captions),
        )
