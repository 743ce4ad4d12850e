"""Images with their captions: one part of a data set, whatever it was read from."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
from PIL import Image

from fimaq_core.errors import DataError
from tasks.common.record import Dataset


@dataclass(frozen=True, eq=False)
class PairSource:
    """One part of an image-caption data set, such as ``Karpathy test`` of ``MS-COCO``.

    ``captions`` are as written, those of an image together; ``image_of`` (captions,) int64 is the
    index of each one's image. Raises DataError for images without captions or listed twice.
    """

    name: str
    split: str
    image_ids: tuple[str, ...]
    captions: tuple[str, ...]
    image_of: np.ndarray
    read: Callable[[int], Image.Image]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        what = f"{self.name} {self.split}"
        if not self.image_ids:
            raise DataError(f"{what} holds no images.")
        twice = [name for name, count in Counter(self.image_ids).items() if count > 1]
        if twice:
            raise DataError(
                f"{what} lists {len(twice)} images more than once, such as {twice[0]!r}."
            )
        count = len(self.image_ids)
        owners = self.image_of
        fits = owners.shape == (len(self.captions),) and owners.dtype == np.int64
        if not fits or bool((owners < 0).any() | (owners >= count).any()):
            raise DataError(
                f"{what} does not say of which of its {count} images each of its {len(self.captions)} captions is."
            )
        bare = np.flatnonzero(np.bincount(owners, minlength=count) == 0)
        if len(bare):
            raise DataError(
                f"{what} has {len(bare)} images without a caption, such as {self.image_ids[bare[0]]!r}."
            )
        apart = np.flatnonzero(np.diff(owners) < 0)
        if len(apart):
            raise DataError(
                f"{what} does not keep the captions of an image together: see {self.image_ids[owners[apart[0] + 1]]!r}."
            )
        empty = [position for position, caption in enumerate(self.captions) if not caption.strip()]
        if empty:
            raise DataError(
                f"{what} has {len(empty)} empty captions, such as one of {self.image_ids[owners[empty[0]]]!r}."
            )

    @classmethod
    def of(
        cls,
        name: str,
        split: str,
        listed: Iterable[tuple[str, Sequence[str]]],
        read: Callable[[int], Image.Image],
        notes: Sequence[str] = (),
    ) -> "PairSource":
        """Make one from (image id, its captions) in order. Raises DataError."""
        ids, captions = zip(*pairs, strict=True) if (pairs := list(listed)) else ((), ())
        owners = np.repeat(np.arange(len(ids), dtype=np.int64), [len(own) for own in captions])
        return cls(name, split, ids, tuple(chain.from_iterable(captions)), owners, read, notes)

    @cached_property
    def starts(self) -> np.ndarray:
        """(images + 1,) int64: the captions of image i are ``captions[starts[i]:starts[i + 1]]``."""
        return np.searchsorted(self.image_of, np.arange(len(self.image_ids) + 1))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over image ids, captions and which belong together."""
        content = json.dumps([self.image_ids, self.captions, self.starts.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()

    def head(self, limit: int | None) -> "PairSource":
        """The first ``limit`` images with their captions, as a split of its own name."""
        if limit is None or limit >= len(self.image_ids):
            return self
        end = int(self.starts[limit])
        own = {"captions": self.captions[:end], "image_of": self.image_of[:end]}
        return replace(
            self, split=f"{self.split}[:{limit}]", image_ids=self.image_ids[:limit], **own
        )

    def describe(self) -> Dataset:
        """The record's entry."""
        return Dataset(
            name=self.name,
            split=self.split,
            count=len(self.image_ids),
            classes=0,
            fingerprint=self.fingerprint,
            captions=len(self.captions),
        )
