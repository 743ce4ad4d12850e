"""Images as samples: read, transformed, seeded one by one, gathered into batches; damaged ones named."""

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from fimaq_core.errors import DataError


def file_reader(paths: Sequence[Path]) -> Callable[[int], Image.Image]:
    """Gives the image file of a position as RGB."""

    def read(index: int) -> Image.Image:
        with Image.open(paths[index]) as image:
            return image.convert("RGB")

    return read


class Images(TorchDataset[tuple[Tensor, int, int] | DataError | None]):
    """Samples with stable ids. An item is (image, label, position); for a damaged image None where such are skipped, else the
    error for the caller to raise (raised in a data-loading process, its message would arrive inside a traceback).

    Args:
        ids: sample ids, in order.
        targets: labels.
        read: gives the PIL image of a position.
        transform: PIL image to float32 tensor.
        skip_corrupt: whether damaged images become None instead of an error.
    """

    def __init__(
        self,
        ids: Sequence[str],
        targets: Sequence[int],
        read: Callable[[int], Image.Image],
        transform: Callable[[Any], Tensor],
        skip_corrupt: bool,
    ) -> None:
        self.ids, self.targets, self.read = ids, targets, read
        self.transform, self.skip_corrupt = transform, skip_corrupt

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | DataError | None:
        try:
            image = self.read(index)
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if self.skip_corrupt:
                return None
            return DataError(
                f"The image {self.ids[index]} is damaged ({error}): repair or remove it, or leave such images out with "
                "--skip-corrupt."
            )
        return self.transform(image), int(self.targets[index]), index


def seeded_item(images: Images, index: int, seed: int) -> Tensor | None:
    """Item ``index`` with every generator that transforms use seeded by (seed, index), and put back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        own = int.from_bytes(hashlib.sha256(f"{seed}/{images.ids[index]}".encode()).digest()[:4], "big")
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


def collate(items: list[tuple[Tensor, int, int] | DataError | None]) -> tuple[Tensor, Tensor, Tensor] | DataError | None:
    kept = []
    for item in items:
        if isinstance(item, DataError):
            return item
        if item is not None:
            kept.append(item)
    if not kept:
        return None
    images, labels, positions = zip(*kept, strict=True)
    return torch.stack(images), torch.tensor(labels), torch.tensor(positions)
