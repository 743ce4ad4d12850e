"""Digit pairs: a data set of 100 classes, made of real handwritten digits without a download.

A sample is two digits side by side with the label ``10 * left + right``. Single digits are so easy
that even a tiny model would hide the cost of quantization.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import v2

from tasks.common.data.augment import RandomDigitWarp
from tasks.common.demo import digits
from tasks.common.demo.digits import DIGIT_SIZE

HALF_SIZE = 32
CANVAS_SIZE = (HALF_SIZE, 2 * HALF_SIZE)
MAX_OFFSET = HALF_SIZE - DIGIT_SIZE
NUM_CLASSES = 100

# Pixel statistics of `train` in [0, 1]. They are fixed, so that preprocessing never changes.
PIXEL_MEAN = 0.0999
PIXEL_STD = 0.2748

_PAIRS = {"train": 8192, "val": 1000, "test": 2000}


@dataclass(frozen=True)
class PairPlan:
    """Digits and positions of n pairs; all arrays are int64."""

    left: np.ndarray  # (n,) index of the source digit
    right: np.ndarray  # (n,)
    offsets: np.ndarray  # (n, 2, 2): (top, left) of both digits, each in its half of the image
    targets: np.ndarray  # (n,) labels


def draw_pairs(part: str, count: int, rng: np.random.Generator) -> PairPlan:
    """Draw ``count`` pairs in random order; all classes, and all digits, come equally often."""
    targets = rng.permutation(np.arange(count) % NUM_CLASSES)
    dealer = digits.DigitDealer(part, rng)
    left, right = np.empty((2, count), dtype=np.int64)
    for i, target in enumerate(targets.tolist()):
        left[i] = dealer.deal(target // 10)
        right[i] = dealer.deal(target % 10, other=int(left[i]))
    offsets = rng.integers(0, MAX_OFFSET, size=(count, 2, 2), endpoint=True)
    return PairPlan(left=left, right=right, offsets=offsets, targets=targets)


def compose_pairs(plan: PairPlan) -> np.ndarray:
    """Render the pairs of a plan, uint8 (n, 32, 64)."""
    images, _ = digits.load_digits()
    canvases = np.zeros((len(plan.left), *CANVAS_SIZE), dtype=np.uint8)
    for side, sources in enumerate((plan.left, plan.right)):
        for i, (top, start) in enumerate(plan.offsets[:, side].tolist()):
            x = side * HALF_SIZE + start
            canvases[i, top : top + DIGIT_SIZE, x : x + DIGIT_SIZE] = images[sources[i]]
    return canvases


class DigitPairs(digits.DigitSamples):
    """One fixed part: 8,192 pairs in `train`, 1,000 in `val`, 2,000 in `test`.

    An id such as ``test/00017-1234+0456`` has the position and the indices of both digits.

    Example::

        image, label = DigitPairs("val", eval_transform())[0]  # (1, 32, 64) float32, 0..99
    """

    def __init__(self, part: str, transform: Callable[[Image.Image], Any] | None = None) -> None:
        digits.check_part(part, "digit pairs")
        self.part, self.transform = part, transform
        # One random stream per part, so that the size of one part does not change another.
        rng = np.random.default_rng([digits.SEED, digits.PARTS.index(part)])
        self.plan = draw_pairs(part, _PAIRS[part], rng)
        self.pixels = compose_pairs(self.plan)
        self.targets: list[int] = self.plan.targets.tolist()
        sources = zip(self.plan.left, self.plan.right, strict=True)
        self.ids = [
            f"{part}/{i:05d}-{left:04d}+{right:04d}" for i, (left, right) in enumerate(sources)
        ]
        self.classes = [f"{label:02d}" for label in range(NUM_CLASSES)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash (sha256, hex) of ids, labels and pixels."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        digest.update(np.asarray(self.targets, dtype="<i8").tobytes())
        digest.update(self.pixels.tobytes())
        return digest.hexdigest()


def eval_transform() -> v2.Compose:
    """Return the preprocessing of evaluation: PIL image ``L`` to normalized float32 (1, 32, 64)."""
    return v2.Compose([*digits.to_tensor(), v2.Normalize(mean=[PIXEL_MEAN], std=[PIXEL_STD])])


def train_transform() -> v2.Compose:
    """Return `eval_transform` with a random warp of each digit, without flips."""
    first, normalize = eval_transform().transforms[:-1], eval_transform().transforms[-1]
    return v2.Compose([*first, RandomDigitWarp(), normalize])
