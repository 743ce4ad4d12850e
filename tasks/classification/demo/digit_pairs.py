"""Two-digit images made from real handwritten digits: a 100-class data set without a download.

Ten digit classes saturate even for a tiny model, which would hide what quantization costs: a sample
is two digits side by side, labelled ``10 * left + right``.
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
from tasks.common.demo.digits import (
    DIGIT_SIZE,
    PARTS,
    SEED,
    DigitDealer,
    DigitSamples,
    check_part,
    load_digits,
    to_tensor,
)

HALF_SIZE = 32
CANVAS_SIZE = (HALF_SIZE, 2 * HALF_SIZE)
MAX_OFFSET = HALF_SIZE - DIGIT_SIZE
NUM_CLASSES = 100

# Of the `train` part's pixels in [0, 1]; constants, so that preprocessing never drifts.
PIXEL_MEAN = 0.0999
PIXEL_STD = 0.2748

_DATA = "digit pairs"
_PAIRS = {"train": 8192, "val": 1000, "test": 2000}


@dataclass(frozen=True)
class PairPlan:
    """Source digits of n pairs and their places, all int64.

    ``offsets`` (n, 2, 2) are top and left of the left, then of the right digit inside its half;
    ``targets`` are the labels ``10 * left + right``.
    """

    left: np.ndarray
    right: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray


def draw_pairs(part: str, count: int, rng: np.random.Generator) -> PairPlan:
    """Draw ``count`` pairs in random class order, with classes and digits used evenly."""
    check_part(part, _DATA)
    targets = rng.permutation(np.arange(count) % NUM_CLASSES)
    dealer = DigitDealer(part, rng)
    left, right = np.empty((2, count), dtype=np.int64)
    for i, target in enumerate(targets.tolist()):
        left[i] = dealer.deal(target // 10)
        right[i] = dealer.deal(target % 10, other=int(left[i]))
    offsets = rng.integers(0, MAX_OFFSET, size=(count, 2, 2), endpoint=True)
    return PairPlan(left=left, right=right, offsets=offsets, targets=targets)


def compose_pairs(plan: PairPlan) -> np.ndarray:
    """Render the pairs of a plan, uint8 (n, 32, 64)."""
    images, _ = load_digits()
    canvases = np.zeros((len(plan.left), *CANVAS_SIZE), dtype=np.uint8)
    for side, sources in enumerate((plan.left, plan.right)):
        for i, (source, (top, start)) in enumerate(
            zip(sources, plan.offsets[:, side].tolist(), strict=True)
        ):
            x = side * HALF_SIZE + start
            canvases[i, top : top + DIGIT_SIZE, x : x + DIGIT_SIZE] = images[source]
    return canvases


class DigitPairs(DigitSamples):
    """One fixed part: 8,192 pairs in `train`, 1,000 in `val`, 2,000 in `test`; else ValueError.

    Ids are such as ``test/00017-1234+0456``: position, then source index of both digits.
    """

    def __init__(self, part: str, transform: Callable[[Image.Image], Any] | None = None) -> None:
        check_part(part, _DATA)
        self.part, self.transform = part, transform
        # One stream per part: a change to the size of one part leaves the others as they are.
        self.plan = draw_pairs(part, _PAIRS[part], np.random.default_rng([SEED, PARTS.index(part)]))
        self.pixels = compose_pairs(self.plan)
        self.targets: list[int] = self.plan.targets.tolist()
        sources = zip(self.plan.left, self.plan.right, strict=True)
        self.ids = [
            f"{part}/{i:05d}-{left:04d}+{right:04d}" for i, (left, right) in enumerate(sources)
        ]
        self.classes = [f"{label:02d}" for label in range(NUM_CLASSES)]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ids, labels and pixels."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        digest.update(np.asarray(self.targets, dtype="<i8").tobytes())
        digest.update(self.pixels.tobytes())
        return digest.hexdigest()


def eval_transform() -> v2.Compose:
    """Preprocessing for evaluation: PIL image of mode ``L`` to normalised float32 (1, 32, 64)."""
    return v2.Compose([*to_tensor(), v2.Normalize(mean=[PIXEL_MEAN], std=[PIXEL_STD])])


def train_transform() -> v2.Compose:
    """`eval_transform` with each digit warped at random (never flipped)."""
    return v2.Compose(
        [*to_tensor(), RandomDigitWarp(), v2.Normalize(mean=[PIXEL_MEAN], std=[PIXEL_STD])]
    )
