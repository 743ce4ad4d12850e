"""Two-digit images made from real handwritten digits: a 100-class data set that needs no download.

Ten digit classes saturate even for a tiny model, which would hide what quantization costs. A sample is therefore two
digits side by side, labelled ``10 * left + right``. The three parts are composed from disjoint sets of digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import v2

from tasks.common.augment import RandomDigitWarp
from tasks.common.digits import DIGIT_SIZE, PARTS, SEED, DigitDealer, DigitSamples, check_part, load_digits, to_tensor

HALF_SIZE = 32
CANVAS_SIZE = (HALF_SIZE, 2 * HALF_SIZE)
MAX_OFFSET = HALF_SIZE - DIGIT_SIZE
NUM_CLASSES = 100

# Mean and standard deviation of the `train` part's pixels in [0, 1]; constants, so that preprocessing never drifts.
PIXEL_MEAN = 0.0999
PIXEL_STD = 0.2748

_DATA = "digit pairs"
_PAIRS = {"train": 8192, "val": 1000, "test": 2000}


@dataclass(frozen=True)
class PairPlan:
    """Which digits make up which pair, and where they are placed.

    Attributes:
        left: Source index of the left digit, int64 of shape ``(n,)``.
        right: Source index of the right digit, int64 of shape ``(n,)``.
        offsets: ``(top, left)`` of the left then of the right digit inside its half, int64 of shape ``(n, 2, 2)``.
        targets: Label ``10 * left + right``, int64 of shape ``(n,)``.
    """

    left: np.ndarray
    right: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray


def draw_pairs(part: str, count: int, rng: np.random.Generator) -> PairPlan:
    """Draws pairs of the digits of one part, with classes and digits used as evenly as the count allows.

    Args:
        part: One of `PARTS`.
        count: Number of pairs.
        rng: Source of all randomness; the same state gives the same plan.

    Returns:
        The plan of ``count`` pairs, in random class order.
    """
    check_part(part, _DATA)
    targets = rng.permutation(np.arange(count) % NUM_CLASSES)
    dealer = DigitDealer(part, rng)
    left = np.empty(count, dtype=np.int64)
    right = np.empty(count, dtype=np.int64)
    for i, target in enumerate(targets.tolist()):
        left[i] = dealer.deal(target // 10)
        right[i] = dealer.deal(target % 10, other=int(left[i]))
    offsets = rng.integers(0, MAX_OFFSET, size=(count, 2, 2), endpoint=True)
    return PairPlan(left=left, right=right, offsets=offsets, targets=targets)


def compose_pairs(plan: PairPlan) -> np.ndarray:
    """Renders the pairs of a plan.

    Args:
        plan: The plan of ``n`` pairs.

    Returns:
        The canvases, uint8 of shape ``(n, 32, 64)``.
    """
    images, _ = load_digits()
    canvases = np.zeros((len(plan.left), *CANVAS_SIZE), dtype=np.uint8)
    for side, sources in enumerate((plan.left, plan.right)):
        for i, (source, (top, start)) in enumerate(zip(sources, plan.offsets[:, side].tolist(), strict=True)):
            x = side * HALF_SIZE + start
            canvases[i, top : top + DIGIT_SIZE, x : x + DIGIT_SIZE] = images[source]
    return canvases


class DigitPairs(DigitSamples):
    """One fixed part of the digit-pair data set.

    Attributes:
        part: Name of the part.
        transform: Applied to each image when it is read, or None.
        plan: The pairs' source digits and offsets.
        pixels: All images, uint8 of shape ``(n, 32, 64)``.
        ids: Stable sample ids such as ``test/00017-1234+0456``: position, then source index of both digits.
        targets: Labels 0..99.
        classes: Class names ``"00"`` to ``"99"``.
    """

    def __init__(self, part: str, transform: Callable[[Image.Image], Any] | None = None) -> None:
        """Composes the part.

        Args:
            part: One of `PARTS`: 8,192 pairs in `train`, 1,000 in `val`, 2,000 in `test`.
            transform: Maps a 64x32 PIL image of mode ``L`` to what the model takes, see `eval_transform`.

        Raises:
            ValueError: If there is no such part.
        """
        check_part(part, _DATA)
        self.part = part
        self.transform = transform
        # One stream per part: a change to the size of one part leaves the others as they are.
        rng = np.random.default_rng([SEED, PARTS.index(part)])
        self.plan = draw_pairs(part, _PAIRS[part], rng)
        self.pixels = compose_pairs(self.plan)
        self.targets: list[int] = self.plan.targets.tolist()
        self.ids: list[str] = [
            f"{part}/{i:05d}-{left:04d}+{right:04d}"
            for i, (left, right) in enumerate(zip(self.plan.left, self.plan.right, strict=True))
        ]
        self.classes: list[str] = [f"{label:02d}" for label in range(NUM_CLASSES)]

    def told(self, index: int) -> int:
        """Returns the label of an image."""
        return self.targets[index]

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over ids, labels and pixels: equal exactly if the data are equal."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        digest.update(np.asarray(self.targets, dtype="<i8").tobytes())
        digest.update(self.pixels.tobytes())
        return digest.hexdigest()


def eval_transform() -> v2.Compose:
    """Returns the preprocessing for evaluation: PIL image of mode ``L`` to normalised float32 ``(1, 32, 64)``."""
    return v2.Compose([*to_tensor(), _normalize()])


def train_transform() -> v2.Compose:
    """Returns the training preprocessing: `eval_transform` with each digit warped at random (never flipped)."""
    return v2.Compose([*to_tensor(), RandomDigitWarp(), _normalize()])


def _normalize() -> v2.Normalize:
    return v2.Normalize(mean=[PIXEL_MEAN], std=[PIXEL_STD])
